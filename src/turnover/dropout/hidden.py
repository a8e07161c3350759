"""Out-of-sample predictions of the training instances, from one training run.

The hidden sub-network of an instance never learned it. Its prediction serves where k-fold predictions do, at
a k-th of the cost: confident learning, stacking, reviews of labels. ``held_out`` calibrates two differences:
the sub-network has a part of the units, and other instances did not learn more in place of this one.
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

from turnover.batches import Adapter, Batch
from turnover.batches.loaders import length_of, warn_left_out
from turnover.dropout.modules import device_of, evaluating
from turnover.dropout.network import Network
from turnover.dropout.row_order import check_site_order
from turnover.errors import InputError
from turnover.ids import check_training_ids, ghost_ids
from turnover.io.bars import tqdm
from turnover.objectives import logits_and_labels, logits_of

_CALIBRATION_GHOSTS = 2**33
"""First ghost of the rows that calibrate, distinct from those of noise floors and test losses."""
_LARGEST = 1000.0
"""The largest temperature, and the inverse of the smallest."""
_BISECTIONS = 60


@dataclass(frozen=True)
class HiddenPredictions:
    """Predictions of the hidden sub-networks.

    Attributes:
        probabilities: float32 (train, classes); rows sum to 1.
        train_ids: int64 (train,), the ids of the rows.
        exposed_share: share of the exposed sub-network's logits, 0 to the spec's ``keep``; 0: none.
        temperature: divisor of the logits; 1 without calibration.
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

    ``held_out`` rows, which were not trained on and run under ghosts, calibrate two numbers:

    - a temperature, with which the hidden sub-networks are as confident as the whole network: it
      minimizes their mean divergence (Kullback-Leibler) from the whole network.
    - a share of the exposed sub-network. Units that an instance trained leave less for similar instances
      to teach, so its hidden sub-network is less confident of its label than a network that was retrained
      without it. Logits are ``hidden + share (exposed - hidden)``; the share gives training rows the mean
      loss of the held-out rows (0 if they have it already, at most the spec's ``keep``, which to first
      order is the whole network).

    Args:
        network: a classifier trained under masks.
        train_batches: batches with labels and the ids they were trained under.
        held_out: batches with labels of the same kind (the same annotators), not trained on; ``None``:
            no calibration.
        adapter: turns a batch into model inputs, labels and ids; ``None``: the network's (set by a
            trainer), by default :func:`turnover.batches.as_batch`.
        progress: show a progress bar.

    Returns:
        :class:`HiddenPredictions`, rows in the order of the batches.

    Raises:
        InputError: no batches, batches without ids or (to calibrate) labels, ghosts as ids, a model
            without a classifier's logits, logits that are not finite, or a site that sees the rows in
            another order.
    """
    adapter = adapter or network.adapter
    warn_left_out(train_batches)
    hidden, exposed, ids, labels = [], [], [], []
    ordered = False
    with evaluating(network.model):
        calibration = (
            None if held_out is None else _calibrated(network, held_out, adapter, progress=progress)
        )
        total = length_of(train_batches)
        shown = tqdm(iter(train_batches), "hidden predictions", total, disable=not progress)
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


def _calibrated(
    network: Network, held_out: Iterable[Any], adapter: Adapter, *, progress: bool
) -> tuple[float, float]:
    """The temperature, and the mean loss of held-out rows at this temperature."""
    hidden, whole, labels, seen = [], [], [], 0
    for given in tqdm(held_out, "calibration", length_of(held_out), disable=not progress):
        batch = adapter(given)
        ghosts = ghost_ids(len(batch), start=_CALIBRATION_GHOSTS + seen)
        seen += len(batch)
        hidden.append(_logits(network, batch, network.hidden(ghosts)))
        whole.append(_logits(network, batch, network.mean()))
        labels.append(_labels(batch, hidden[-1]))
    if not hidden:
        raise InputError("no held-out batches given")
    logits, wanted = torch.cat(hidden).double(), torch.cat(whole).double().softmax(dim=1)
    # The divergence is convex in the inverse temperature; its derivative is 0 where the mean logit is the
    # same under both distributions.
    mean = (wanted * logits).sum(dim=1).mean()
    low, high = 1 / _LARGEST, _LARGEST
    for _ in range(_BISECTIONS):
        inverse = (low * high) ** 0.5
        if ((inverse * logits).softmax(dim=1) * logits).sum(dim=1).mean() < mean:
            low = inverse
        else:
            high = inverse
    return 1 / high, float(functional.cross_entropy(high * logits, torch.cat(labels)))


def _share(hidden: Tensor, step: Tensor, labels: Tensor, wanted: float, most: float) -> float:
    """The smallest share of the step, up to ``most``, with the wanted mean loss."""

    def loss(share: float) -> float:
        return float(functional.cross_entropy(hidden + share * step, labels))

    low, high = 0.0, most
    if loss(low) <= wanted or loss(high) >= wanted:
        return low if loss(low) <= wanted else high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if loss(middle) > wanted else (low, middle)
    return high


def _labels(batch: Batch, logits: Tensor) -> Tensor:
    if batch.labels is None:
        raise InputError("calibration of hidden predictions needs labels, and a batch has none")
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
