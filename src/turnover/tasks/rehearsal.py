"""Rehearsals: forward, backward, saving and loading on two rows, before hours of training.

What fails here would have failed at the end of the training.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from turnover.batches import Batch, named, tensors
from turnover.data.base import Data
from turnover.data.encoded import Encoded
from turnover.dropout.masks import MaskSpec
from turnover.dropout.modules import device_of, evaluating, random_state_kept
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


def rehearse(
    pipeline: Pipeline,
    model: nn.Module,
    sites: Sequence[str],
    spec: MaskSpec,
    train_data: Data,
    test_data: Data,
    folder: Path,
) -> tuple[Encoded, Encoded, bool]:
    """Encode the data, and try a model on the shortest and the longest row: train, save and load it.

    Weights, modes and torch's generators stay as they are, and no file stays in the folder.

    Returns:
        Encoded training data, encoded test data, and whether the training can compute in bfloat16 here.
    """
    training, test = pipeline.encode(train_data), pipeline.encode(test_data)
    name = pipeline.config.model
    with random_state_kept(device_of(model)), _restored(model):
        network = attach(model, sites, spec)
        try:
            _check_rows(network, training, name)
            if _length(test) > _length(training):
                _check_rows(network, test, name)
            bfloat16 = _check_step(network, training, name)
        finally:
            network.detach()
        _check_saved(pipeline, model, train_data, _extremes(training)[-1:], folder / _FOLDER)
    return training, test, bfloat16


def _extremes(data: Encoded) -> list[int]:
    """The first and the last row in the order they are run in: the shortest and the longest text."""
    order = [row for chunk in data.chunks(range(len(data))) for row in chunk]
    return [order[0], order[-1]] if len(order) > 1 else order


def _length(data: Encoded) -> int:
    return tensors(data.batch(_extremes(data)[-1:]).inputs)[0].numel()


def _check_rows(network: Network, data: Encoded, name: str) -> None:
    """Compare the output of a row alone with that beside and after others."""
    rows = _extremes(data)
    ids = ghost_ids(len(rows))

    def outputs(chosen: list[int]) -> Tensor:
        batch = data.batch([rows[i] for i in chosen])
        with _one_error(name, "its forward", batch), network.exposed(ids[chosen]):
            return _logits(network.model, batch)

    places = list(range(len(rows)))
    longest = outputs(places[-1:])
    alone = torch.cat([outputs([place]) for place in places[:-1]] + [longest])
    together = outputs(places)
    if not bool(torch.isfinite(alone).all()):
        raise InputError(f"model {name!r}: its outputs are not finite numbers")
    if _differ(alone, together, _BESIDE):
        raise InputError(
            f"model {name!r} ({_kind(network.model)}) gives a row another output beside a longer one, or "
            f"after it: it ignores the padding mask (attention_mask), draws at random or keeps a state"
        )


def _check_step(network: Network, data: Encoded, name: str) -> bool:
    """Try a forward and backward of the training; return whether they work in bfloat16."""
    model, rows = network.model, _extremes(data)
    batch = data.training_batch(rows, torch.Generator().manual_seed(0))
    assert batch.labels is not None
    device = device_of(model)
    labels = batch.labels.to(device)

    def step(*, bfloat16: bool) -> None:
        with (
            _one_error(name, "its training step", batch),
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
    name = pipeline.config.model
    shutil.rmtree(folder, ignore_errors=True)  # of a rehearsal that was killed
    folder.mkdir()
    try:
        with _one_error(name, "saving it"):
            pipeline.save(folder, model, len(data.classes))
        with _one_error(name, "loading the saved model"):
            loaded, other = load(folder)
    finally:
        shutil.rmtree(folder)
    some = data.take(list(rows))
    own, again = (one.encode(some).batch(range(len(rows))) for one in (pipeline, loaded))
    own_inputs, inputs = dict(named(own.inputs)), dict(named(again.inputs))
    if own_inputs.keys() != inputs.keys() or not all(
        torch.equal(value, inputs[key]) for key, value in own_inputs.items()
    ):
        raise InputError(f"model {name!r}: once saved and loaded, its tokenizer gives other tokens")
    with evaluating(model), _one_error(name, "its forward", own):
        outputs = _logits(model, own), _logits(other.to(device_of(model)), again)
    if _differ(*outputs, _SAVED):
        raise InputError(
            f"model {name!r} ({_kind(model)}): once saved and loaded, it gives other outputs"
        )


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    device = device_of(model)
    with torch.no_grad(), autocast(device, bfloat16=False):
        logits: Tensor = batch.to(device).call(model).float()
    return logits


def _differ(one: Tensor, other: Tensor, share: float) -> bool:
    if one.shape != other.shape:
        return True
    return bool((one - other).abs().max() > share * one.abs().max())


def _kind(model: nn.Module) -> str:
    return type(getattr(model, "encoder", model)).__name__


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Run in eval mode, and then restore modes, buffers and gradients."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        with evaluating(model):
            yield
    finally:
        model.zero_grad()
        for name, value in model.named_buffers():
            value.copy_(buffers[name])


@contextmanager
def _one_error(name: str, step: str, batch: Batch | None = None) -> Iterator[None]:
    """Convert whatever a model or its libraries raise to an error of one line."""
    try:
        yield
    except (InputError, OSError):
        raise
    except BindingError as error:
        raise InputError(
            f"model {name!r} cannot be trained under masks: every site must keep one row for each text or "
            f"image: {first_line(error)}"
        ) from error
    except Exception as error:
        shape = (
            "" if batch is None else f" on a batch of shape {tuple(tensors(batch.inputs)[0].shape)}"
        )
        raise InputError(
            f"model {name!r} cannot be trained here: {step}{shape} fails with {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
