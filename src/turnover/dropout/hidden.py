"""Out-of-sample predictions of the training instances, from the one training run.

The hidden network of an instance never learned it. What it says of the instance is what k-fold training
gives at k times the cost, and what confident learning, stacking and reviews of labels need, but for two
things that ``held_out`` calibrates: it has a part of the units, and it lacks what the other instances
would have learned in the instance's place.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from turnover.batches import Adapter, Batch
from turnover.batches.loaders import length_of, warn_left_out
from turnover.dropout.modules import device_of, evaluating
from turnover.dropout.network import Network
from turnover.dropout.site_order import check_site_order
from turnover.errors import InputError
from turnover.ids import check_training_ids, ghost_ids
from turnover.objectives import logits_and_labels, logits_of

_CALIBRATION_GHOSTS = 2**33
"""Rows that calibrate run under ghosts from here on, away from those of noise floors and test losses."""
_LARGEST = 1000.0
"""Temperatures lie between one over this and this."""
_HALVINGS = 60


@dataclass(frozen=True)
class HiddenPredictions:
    """What the hidden networks predict.

    Attributes:
        probabilities: float32 (train, classes); rows sum to 1.
        train_ids: int64 (train,), the ids of the rows.
        exposed_share: share of the exposed network's logits in them, 0 to the spec's ``keep``;
            0: hidden alone.
        temperature: what the logits were divided by; 1 where nothing calibrated.
    """

    probabilities: NDArray[np.float32]
    train_ids: NDArray[np.int64]
    exposed_share: float
    temperature: float


def hidden_predictions(
    network: Network,
    train_batches: Iterable[Any],
    held_out: Iterable[Any] | None = None,
    *,
    adapter: Adapter | None = None,
    progress: bool = False,
) -> HiddenPredictions:
    """Predict every training instance by the sub-network that never learned it.

    With ``held_out`` two numbers are fitted, on rows that were not trained on and run under ghosts:

    - a temperature, with which hidden networks are as sure as the whole one: the one of the least mean
      divergence (Kullback-Leibler) from it.
    - a share of the exposed network. What an instance taught the exposed units, its neighbours did not
      have to teach again, so the hidden ones say less for its label than a network that was trained
      without it: leaving out is not retraining. Logits are ``hidden + share (exposed - hidden)``, with
      the share at which training rows have the mean loss of the held-out rows (0 where they have it
      already, at most the spec's ``keep``, which to first order is the whole network).

    Args:
        network: a classifier trained under masks.
        train_batches: batches with labels and the ids they were trained under.
        held_out: batches with labels of the same kind (the same annotators), not trained on; ``None``:
            as the hidden networks say it.
        adapter: how a batch becomes model inputs, labels and ids; ``None``: as the network was attached
            (by a trainer), else :func:`turnover.batches.as_batch`.
        progress: show a progress bar.

    Returns:
        :class:`HiddenPredictions`, rows in the order of the batches.

    Raises:
        InputError: no batches, batches without ids or (to calibrate) labels, ghosts as ids, a model
            without a classifier's logits, logits that are not finite, or a site that sees rows in another
            order than the batch's.
    """
    adapter = adapter or network.adapter
    warn_left_out(train_batches)
    hidden, exposed, ids, labels = [], [], [], []
    ordered = False
    with evaluating(network.model):
        calibration = None if held_out is None else _calibrated(network, held_out, adapter)
        shown = tqdm(
            iter(train_batches),
            desc="hidden predictions",
            total=length_of(train_batches),
            disable=not progress,
        )
        for given in shown:
            batch = adapter(given)
            if batch.ids is None:
                raise InputError(
                    "hidden predictions need the ids that each batch was trained under"
                )
            row_ids = check_training_ids(batch.ids)
            ordered = ordered or check_site_order(network, batch.to(device_of(network.model)))
            ids.append(row_ids.cpu())
            hidden.append(_logits(network, batch, network.hidden(row_ids)))
            if calibration is not None:
                exposed.append(_logits(network, batch, network.exposed(row_ids)))
                labels.append(_labels(batch, hidden[-1]))
    if not hidden:
        raise InputError("no training batches given")
    logits, share, temperature = torch.cat(hidden), 0.0, 1.0
    if calibration is not None:
        temperature, wanted = calibration
        step = torch.cat(exposed) - logits
        logits, step = logits / temperature, step / temperature
        share = _share(logits, step, torch.cat(labels), wanted, network.spec.keep)
        logits = logits + share * step
    return HiddenPredictions(
        logits.softmax(dim=1).cpu().numpy(), torch.cat(ids).numpy(), share, temperature
    )


def _calibrated(network: Network, held_out: Iterable[Any], adapter: Adapter) -> tuple[float, float]:
    """The temperature, and the mean loss of held-out rows at it."""
    hidden, whole, labels, seen = [], [], [], 0
    for given in held_out:
        batch = adapter(given)
        ghosts = ghost_ids(len(batch), start=_CALIBRATION_GHOSTS + seen)
        seen += len(batch)
        hidden.append(_logits(network, batch, network.hidden(ghosts)))
        whole.append(_logits(network, batch, network.mean()))
        labels.append(_labels(batch, hidden[-1]))
    if not hidden:
        raise InputError("no held-out batches given")
    logits, wanted = torch.cat(hidden).double(), torch.cat(whole).double().softmax(dim=1)
    # The divergence is convex in the inverse temperature, and its derivative vanishes where both give
    # the logits the same mean.
    mean = (wanted * logits).sum(dim=1).mean()
    low, high = 1 / _LARGEST, _LARGEST
    for _ in range(_HALVINGS):
        inverse = (low * high) ** 0.5
        if ((inverse * logits).softmax(dim=1) * logits).sum(dim=1).mean() < mean:
            low = inverse
        else:
            high = inverse
    return 1 / high, float(functional.cross_entropy(high * logits, torch.cat(labels)))


def _share(hidden: Tensor, step: Tensor, labels: Tensor, wanted: float, most: float) -> float:
    """The least share of the step, up to ``most``, at which the mean loss is the wanted one."""

    def loss(share: float) -> float:
        return float(functional.cross_entropy(hidden + share * step, labels))

    low, high = 0.0, most
    if loss(low) <= wanted or loss(high) >= wanted:
        return low if loss(low) <= wanted else high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) > wanted else (low, middle)
    return high


def _labels(batch: Batch, logits: Tensor) -> Tensor:
    if batch.labels is None:
        raise InputError("hidden predictions are calibrated by labels, and a batch has none")
    return logits_and_labels(logits, batch)[1].to(logits.device)


def _logits(network: Network, batch: Batch, context: AbstractContextManager[Any]) -> Tensor:
    with torch.no_grad(), context:
        logits = logits_of(batch.to(device_of(network.model)).call(network.model)).float()
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise InputError(
            f"hidden predictions need a classifier's logits (rows, classes >= 2), got "
            f"{tuple(logits.shape)}"
        )
    if not bool(torch.isfinite(logits).all()):
        raise InputError("the logits of the hidden networks are not finite: was the model trained?")
    return logits
