"""Before hours of training: two rows go through all that a training and its run will ask of a model.

Forward, backward, saving and loading; what fails here would have failed at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from turnover.data.base import Data
from turnover.data.encoded import Encoded
from turnover.dropout.masks import MaskSpec
from turnover.dropout.modules import device_of, evaluating
from turnover.dropout.network import Network, attach
from turnover.errors import BindingError, InputError
from turnover.ids import ghost_ids
from turnover.models.base import Pipeline
from turnover.models.encoders import first_line
from turnover.models.pipeline import load
from turnover.tasks.training import autocast, native_bfloat16

_FOLDER = "rehearsal"
_BESIDE, _SAVED = 1e-3, 1e-5
"""Differences that rounding makes, as shares of the largest output."""


def made_ready(
    pipeline: Pipeline,
    model: nn.Module,
    sites: Sequence[str],
    spec: MaskSpec,
    train_data: Data,
    test_data: Data,
    folder: Path,
) -> tuple[Encoded, Encoded, bool]:
    """What every training begins with: data as the model takes them, a rehearsal, and the head's input.

    Arguments and errors as in :func:`rehearse`.

    Returns:
        Training data, test data, and whether the training can compute in bfloat16 here.
    """
    training, test = pipeline.encode(train_data), pipeline.encode(test_data)
    bfloat16 = rehearse(pipeline, model, sites, spec, training, test, train_data, folder)
    pipeline.prepare(model, training)
    return training, test, bfloat16


def rehearse(
    pipeline: Pipeline,
    model: nn.Module,
    sites: Sequence[str],
    spec: MaskSpec,
    training: Encoded,
    test: Encoded,
    train_data: Data,
    folder: Path,
) -> bool:
    """Try a model on the shortest and the longest row, as it will be trained, saved and loaded.

    Weights, modes and torch's generators are as before, and nothing is left in the folder.

    Args:
        sites: what is masked.
        training: ``train_data`` as the model takes them.
        folder: where the model is saved for a moment.

    Returns:
        Whether the training can compute in bfloat16 here.

    Raises:
        InputError: something fails, a row's output depends on the rows beside or before it, or a
            loaded model is not what was saved.
    """
    name = pipeline.config.model
    with torch.random.fork_rng(), _as_before(model):
        network = attach(model, sites, spec)
        try:
            _check_rows(network, training, name)
            if _longest(test) > _longest(training):
                _check_rows(network, test, name)
            bfloat16 = _check_step(network, training, name)
        finally:
            network.detach()
        _check_saved(pipeline, model, train_data, _ends(training)[-1:], folder / _FOLDER)
    return bfloat16


def _ends(data: Encoded) -> list[int]:
    """The first and the last of the rows in the order they are run in: of texts, of their length."""
    order = [row for chunk in data.chunks(range(len(data))) for row in chunk]
    return [order[0], order[-1]] if len(order) > 1 else order


def _longest(data: Encoded) -> int:
    """Numbers that the longest row is."""
    return _first(data.batch(_ends(data)[-1:]).inputs).numel()


def _check_rows(network: Network, data: Encoded, name: str) -> None:
    """A row's output is its own: alone and first, or after others and beside them."""
    rows = _ends(data)
    ids = ghost_ids(len(rows))

    def outputs(chosen: list[int]) -> Tensor:
        batch = data.batch([rows[i] for i in chosen])
        with _trying(name, "its forward", batch.inputs), network.exposed(ids[chosen]):
            return _run(network.model, batch)

    places = list(range(len(rows)))
    longest = outputs(places[-1:])
    alone = torch.cat([outputs([place]) for place in places[:-1]] + [longest])
    together = outputs(places)
    if not bool(torch.isfinite(alone).all()):
        raise InputError(f"model {name!r}: its outputs are not finite numbers")
    if _differ(alone, together, _BESIDE):
        raise InputError(
            f"model {name!r} ({_kind(network.model)}) gives a row another output beside a longer one, or "
            f"after it: it does not leave out the padding (attention_mask), draws at random or keeps a state"
        )


def _check_step(network: Network, data: Encoded, name: str) -> bool:
    """One forward and backward as in training; whether it works in bfloat16."""
    model, rows = network.model, _ends(data)
    batch = data.training_batch(rows, torch.Generator().manual_seed(0))
    assert batch.labels is not None
    device = device_of(model)
    labels = batch.labels.to(device)

    def step(*, bfloat16: bool) -> None:
        with (
            _trying(name, "its training step", batch.inputs),
            network.exposed(data.ids[rows]),
            autocast(device, bfloat16=bfloat16),
        ):
            logits = batch.to(device).call(model).float()
            torch.autograd.backward(functional.cross_entropy(logits, labels))

    model.train()
    if native_bfloat16(device):
        try:
            step(bfloat16=True)
        except InputError:
            model.zero_grad()
        else:
            return True
    step(bfloat16=False)
    return False


def _check_saved(
    pipeline: Pipeline, model: nn.Module, data: Data, rows: Sequence[int], folder: Path
) -> None:
    """A saved and loaded model takes the rows as the model does, and says the same of them."""
    name = pipeline.config.model
    shutil.rmtree(folder, ignore_errors=True)  # of a try that was killed
    folder.mkdir()
    try:
        with _trying(name, "saving it"):
            pipeline.save(folder, model, len(data.classes))
        with _trying(name, "loading what was saved"):
            loaded, other = load(folder)
    finally:
        shutil.rmtree(folder)
    some = data.take(list(rows))
    places = range(len(rows))
    here, there = (one.encode(some).batch(places) for one in (pipeline, loaded))
    if not _same(here.inputs, there.inputs):
        raise InputError(f"model {name!r}: once saved and loaded, its tokenizer gives other tokens")
    with evaluating(model), _trying(name, "its forward", here.inputs):
        found, again = _run(model, here), _run(other.to(device_of(model)), there)
    if _differ(found, again, _SAVED):
        raise InputError(
            f"model {name!r} ({_kind(model)}): once saved and loaded, it gives other outputs"
        )


def _run(model: nn.Module, batch: Any) -> Tensor:
    device = device_of(model)
    with torch.no_grad(), autocast(device, bfloat16=False):
        logits: Tensor = batch.to(device).call(model).float()
    return logits


def _differ(one: Tensor, other: Tensor, share: float) -> bool:
    if one.shape != other.shape:
        return True
    return bool((one - other).abs().max() > share * one.abs().max())


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _kind(model: nn.Module) -> str:
    return type(getattr(model, "encoder", model)).__name__


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Eval mode; modes, buffers and gradients are put back after."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        with evaluating(model):
            yield
    finally:
        model.zero_grad()
        for name, value in model.named_buffers():
            value.copy_(buffers[name])


@contextmanager
def _trying(name: str, what: str, inputs: Any = None) -> Iterator[None]:
    """Makes one line of whatever a model or its libraries raise."""
    try:
        yield
    except (InputError, OSError):
        raise
    except BindingError as error:
        raise InputError(
            f"model {name!r} cannot be trained under masks, for which every site has to keep one row for "
            f"each text or image: {first_line(error)}"
        ) from error
    except Exception as error:
        raise InputError(
            f"model {name!r} cannot be trained here: {what}{_shown(inputs)} fails with "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _shown(inputs: Any) -> str:
    return "" if inputs is None else f" on a batch of shape {tuple(_first(inputs).shape)}"


def _first(inputs: Any) -> Tensor:
    found: Tensor = inputs if isinstance(inputs, Tensor) else next(iter(inputs.values()))
    return found
