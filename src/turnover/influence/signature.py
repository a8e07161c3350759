"""Signatures of objectives: numbers that an objective computes on a few targets.

A stored result keeps them beside its targets, to refuse another objective of the same name, or a network of
the same weights with another activation function or adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover.batches import Batch
from turnover.dropout.modules import device_of
from turnover.ids import ghost_ids
from turnover.influence.engine import Engine
from turnover.influence.gradients import differentiate, mask_gradients
from turnover.influence.protocol import Estimator
from turnover.objectives import costs

_log = logging.getLogger(__name__)
_ROWS, _SPREAD = 32, 8
"""Targets of a block that get a signature at most, and how many of them are spread evenly over the block."""
_HALF = (torch.float16, torch.bfloat16)
_COARSE, _FINE = 1e-2, 1e-4
"""Relative differences between machines, of 16 and of 32 bits."""
_ABSOLUTE = 1e-6
_ROUNDED = 2.0**-24
"""A loss of 0 after rounding; an objective that is smaller everywhere has small values."""
_LARGEST, _NOT_A_NUMBER = 1e100, 1e300


class Signed(NamedTuple):
    """Signatures of the targets of a block, and their relative tolerance between machines."""

    values: NDArray[np.float64]
    tolerance: float

    def difference(self, stored: NDArray[np.float64]) -> tuple[int, int] | None:
        """Row and column of the first number that differs from stored ones; ``None``: all agree.

        Targets that either left out are not compared.
        """
        scale = np.fmax(np.abs(stored), np.abs(self.values))
        # Numbers that cancel to small ones have the errors of the larger ones beside them.
        beside = np.nan_to_num(scale).max(axis=0, initial=0.0, where=scale < _LARGEST)
        absolute = _ABSOLUTE if beside.max(initial=0.0) >= _ROUNDED else 0.0
        allowed = self.tolerance * (scale + 0.1 * beside) + absolute
        differ = np.argwhere(np.abs(stored - self.values) > allowed)
        return (int(differ[0][0]), int(differ[0][1])) if len(differ) else None


def signature_columns(estimator: Estimator) -> int:
    """Count the numbers that describe the objective on one target."""
    return len(estimator.engines) * (1 + estimator.differentiates + 2 * estimator.runs_masked)


def signatures(estimator: Estimator, batches: Sequence[Batch]) -> NDArray[np.float64]:
    """Compute the objective on some targets of a block, under each network.

    At the mean network; of an estimator that differentiates also the norm of its derivative by the masks, and
    of one that runs masked networks its values under both masks of a ghost.

    Args:
        estimator: with networks in eval mode.
        batches: the targets of the block.

    Returns:
        float64 (targets, columns), finite; NaN for the targets that are left out.
    """
    rows = sum(map(len, batches))
    found = np.full((rows, signature_columns(estimator)), np.nan)
    chosen = _chosen(batches, rows)
    start = 0
    for batch in batches:
        within = chosen[(chosen >= start) & (chosen < start + len(batch))]
        if len(within):
            values = _of_batch(estimator, batch, within - start)
            # NaN marks a target that was left out.
            found[within] = np.nan_to_num(values, nan=_NOT_A_NUMBER)
        start += len(batch)
    return found


def precision(engines: Sequence[Engine]) -> dict[str, str | None]:
    """Describe the settings of torch that change scores, as JSON values."""
    devices = sorted({device_of(engine.network.model).type for engine in engines})
    autocast = [
        str(torch.get_autocast_dtype(device))
        for device in devices
        if torch.is_autocast_enabled(device)
    ]
    return {
        "default_dtype": str(torch.get_default_dtype()),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "autocast": ", ".join(autocast) or None,
    }


def tolerance(engines: Sequence[Engine]) -> float:
    """Relative tolerance of signatures between machines."""
    models = [engine.network.model for engine in engines]
    half = any(parameter.dtype in _HALF for model in models for parameter in model.parameters())
    autocast = any(torch.is_autocast_enabled(device_of(model).type) for model in models)
    return _COARSE if half or autocast else _FINE


def _chosen(batches: Sequence[Batch], rows: int) -> NDArray[np.int64]:
    """Targets that get a signature: all of few; else the first of every label, and some spread evenly."""
    if rows <= _ROWS:
        return np.arange(rows)
    spread = np.linspace(0, rows - 1, _SPREAD).round().astype(np.int64)
    labels = [batch.labels for batch in batches]
    if any(one is None or one.shape != (len(b),) for one, b in zip(labels, batches, strict=True)):
        return spread
    every = torch.cat([one.detach().cpu() for one in labels if one is not None]).double().numpy()
    first = np.sort(np.unique(every, return_index=True)[1])
    most = _ROWS - _SPREAD
    if len(first) > most:  # also where labels are no classes
        first = first[np.linspace(0, len(first) - 1, most).round().astype(np.int64)]
    return np.union1d(first, spread)


def _of_batch(estimator: Estimator, batch: Batch, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Signatures of some rows of a batch: (rows, columns)."""
    if 2 * len(rows) < len(batch):
        try:
            return np.concatenate(
                [_whole(estimator, batch.rows(row, row + 1)) for row in rows.tolist()]
            )
        except Exception:  # noqa: BLE001 - a user's model or objective that takes no batch of one row
            _log.debug("signatures of single rows failed; taking whole batches", exc_info=True)
    return _whole(estimator, batch)[rows]


def _whole(estimator: Estimator, batch: Batch) -> NDArray[np.float64]:
    return np.concatenate(estimator.halving.by_rows(batch, partial(_of_rows, estimator)))


def _of_rows(estimator: Estimator, batch: Batch) -> NDArray[np.float64]:
    columns = [
        column
        for engine in estimator.engines
        for column in _columns(engine, engine.moved(batch), estimator)
    ]
    return np.stack([column.detach().double().cpu().numpy() for column in columns], axis=1)


def _columns(engine: Engine, batch: Batch, estimator: Estimator) -> Iterator[Tensor]:
    network, objective = engine.network, engine.objective
    if estimator.differentiates:
        yield from _derived(engine, batch)
    else:
        with torch.no_grad(), network.mean():
            yield costs(objective, batch.call(network.model), batch)
    if not estimator.runs_masked:
        return
    for hidden in (False, True):
        binding = network.masking.bind(ghost_ids(1), hidden, every_row=True, sites=engine.sites)
        with torch.no_grad(), network.masking.open(binding):
            yield costs(objective, batch.call(network.model), batch)


def _derived(engine: Engine, batch: Batch) -> tuple[Tensor, Tensor]:
    """Costs by the mean network, and the norms of their derivatives by the masks: (rows,) each."""
    network = engine.network
    with torch.enable_grad(), network.masking.probing(engine.sites) as probes:
        values = costs(engine.objective, batch.call(network.model), batch)
        if not probes or not values.requires_grad:  # whose error names the cause
            gradients = mask_gradients(network, engine.objective, batch, engine.sites)
            return values, gradients.norm(dim=1)
        found = differentiate(values, [one for runs in probes.values() for one in runs])
    squares = [one.double().square().sum(dim=1) for one in found if one is not None]
    return values, torch.stack(squares).sum(dim=0).sqrt() if squares else torch.zeros_like(values)
