"""The linear estimator: one backward pass for each target, then mask codes times gradients.

Influence is linearized in the mask at the mean network: the derivative of the objective by every mask
entry, times (hidden mask - exposed mask). Kobayashi et al. 2020, equation 6, to first order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from turnover.batches import Batch
from turnover.dropout.masks import MaskSpec
from turnover.ids import ghost_ids
from turnover.influence.engine import Engine, Scores, TargetBlock, over_networks, to_numpy
from turnover.influence.gradients import Run, finite, mask_gradients
from turnover.influence.plan import PILOT_IDS, Pilot
from turnover.influence.products import CodeProduct, usable
from turnover.influence.protocol import Estimator, Method, register

Floats = NDArray[np.float64]

_TABLE_ROWS = 16
"""Rows in one look-up table: wider ones fall out of the cache."""
_FEW_ROWS = 32
"""Up to here looking bytes up is faster than a matrix product (measured on 2 cores)."""
_TABLE_IDS = 2048
"""Ids at once from which on the tables are worth making: about 4,000 make up for them."""
_BYTES = 2**22
"""Packed draws of one pass by tables."""
_PRODUCT_IDS = 512
"""Ids in one matrix product; more of them would fall out of the cache."""
_GPU_BYTES = 2**29
"""Masks and sums of one product on a GPU."""


@dataclass(frozen=True)
class Linear(Method):
    """Options of the linear estimator: one backward pass for each target, whatever the number of ids.

    Derivatives of a target's objective by the mask entries at the mean network, times the hidden minus the
    exposed mask of each id: the first order of :class:`turnover.Exact`. It ranks nearly as that does, at the
    price of a matrix product. There is nothing to set.

    Source: Kobayashi et al. 2020 (arXiv 2012.04207), equation 6, to first order.

    Example::

        influence = turnover.Influence(network, method=turnover.Linear())  # or method="linear"
        result = influence.estimate(targets, train_ids)
    """


class LinearEstimator(Estimator):
    """Scores ids by derivatives of the targets' objectives by the masks."""

    differentiates = True

    def scores(self, block: TargetBlock, ids: Tensor) -> Scores:
        """See :class:`Estimator`."""
        return over_networks([scorer.scores(ids) for scorer in self._scorers(block)])

    def own(self, block: TargetBlock, ids: Tensor) -> tuple[Scores, Tensor]:
        """See :class:`Estimator`; all ghosts are scored."""
        own = over_networks([scorer.own(ids)[None] for scorer in self._scorers(block)])
        return own, self.scores(block, ghost_ids(self.ghosts)).mean

    def errors(
        self, block: TargetBlock, ids: Tensor, positions: NDArray[np.int64], columns: int
    ) -> NDArray[np.float32]:
        """See :class:`Estimator`; ids that several targets share are scored once."""
        errors = np.empty(positions.shape, dtype=np.float32)
        wanted = np.unique(positions)
        for start in range(0, len(wanted), columns):
            some = wanted[start : start + columns]
            found = self.scores(block, ids[torch.from_numpy(some)]).standard_error
            assert found is not None
            row, rank = np.nonzero((positions >= some[0]) & (positions <= some[-1]))
            errors[row, rank] = to_numpy(found)[row, np.searchsorted(some, positions[row, rank])]
        return errors

    def work(self, ids: int, *, first: bool, top: int | None) -> dict[str, int]:  # noqa: ARG002
        """See :class:`Estimator`."""
        return {"backward": int(first), "pair": ids + (self.ghosts if first else 0)}

    def own_work(self) -> dict[str, int]:
        """See :class:`Estimator`: pairs take no time beside the derivatives."""
        return {"backward": 1}

    def seconds(self, pilot: Pilot) -> dict[str, float]:
        """See :class:`Estimator`; pairs are timed with as many targets as are multiplied at once."""
        return pilot.once("linear", lambda: self._seconds(pilot))

    def ghost_scores(self, pilot: Pilot) -> NDArray[np.float64]:
        """See :class:`Estimator`."""
        return pilot.once("linear ghosts", partial(super().ghost_scores, pilot))

    def _seconds(self, pilot: Pilot) -> dict[str, float]:
        backward = pilot.timed(lambda: list(pilot.block.each(derivatives)))
        rows, ids, scorers = self.rows(pilot.targets), torch.arange(PILOT_IDS), []
        for engine, found in zip(self.engines, pilot.block.each(derivatives), strict=True):
            repeated = found.repeat(-(-rows // len(found)), 1)[:rows]
            scorers.append(scorer_of(engine, repeated))
        pairs = pilot.timed(lambda: [scorer.scores(ids) for scorer in scorers])
        return {"backward": backward / len(pilot.first), "pair": pairs / (rows * len(ids))}

    def _scorers(self, block: TargetBlock) -> list[LinearScorer]:
        def make() -> list[LinearScorer]:
            found = zip(block.engines, block.each(derivatives), strict=True)
            return [scorer_of(engine, gradients) for engine, gradients in found]

        return block.once("linear", make)


register("linear", Linear, LinearEstimator)


def derivatives(engine: Engine, batches: Sequence[Batch]) -> Tensor:
    """Derivatives of targets' objectives by the mask entries: float32 (targets, units)."""
    independent: set[Run] = engine.once("independent", set)
    parts = []
    for batch in batches:
        part = mask_gradients(
            engine.network,
            engine.objective,
            engine.moved(batch),
            engine.sites,
            independent,
            engine.halving,
        )
        parts.append(finite(part, "mask derivative"))
        engine.counts.advance("backward", len(batch))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def scorer_of(engine: Engine, coefficients: Tensor) -> LinearScorer:
    """A scorer of rows of coefficients under a network's masks at the scored sites."""
    network = engine.network
    return LinearScorer(coefficients, network.spec, network.known_units(engine.sites))


def calibrated(
    linear: Floats, exact: NDArray[np.float32]
) -> tuple[Floats, Floats, Floats, NDArray[np.float32]]:
    """Regress exact ghosts on linear ones, and put exact ghosts on the noise floor of all.

    The linear scores of all ghosts are control variates: with them a few exact ghosts give the mean and
    deviation of all nearly as well as all would.

    Args:
        linear: float64 (targets, ghosts).
        exact: float32 (targets, exact ghosts), of the first ghosts.

    Returns:
        offset, slope and residual deviation (targets,), and float32 (targets, exact ghosts) with that
        mean and deviation.
    """
    some, values = linear[:, : exact.shape[1]], exact.astype(np.float64)
    count = values.shape[1]
    centered = some - some.mean(axis=1, keepdims=True)
    variance = (centered**2).sum(axis=1)
    covariance = (centered * values).sum(axis=1)
    slope = np.divide(covariance, variance, out=np.zeros_like(variance), where=variance > 0)
    offset = values.mean(axis=1) - slope * some.mean(axis=1)
    residual = values - offset[:, None] - slope[:, None] * some
    left = (residual**2).sum(axis=1) / max(count - 2, 1)
    mean = offset + slope * linear.mean(axis=1)
    sd = np.sqrt(slope**2 * linear.var(axis=1, ddof=1) + left)
    own = values.std(axis=1, ddof=1)
    scale = np.divide(sd, own, out=np.zeros_like(sd), where=own > 0)
    floor = mean[:, None] + (values - values.mean(axis=1, keepdims=True)) * scale[:, None]
    return offset, slope, np.sqrt(left), floor.astype(np.float32)


class LinearScorer:
    """Rows of coefficients, ready to be multiplied by (hidden mask - exposed mask) of any ids.

    Masks are expanded to numbers for a block of ids that fits the cache. Few rows and many ids take even
    less: eight draws at a time are looked up in tables of their sums. On a GPU the numbers are integers
    (:mod:`turnover.influence.products`).

    Args:
        coefficients: float32 (rows, mask units): derivatives by the mask entries.
        spec: the masks.
        units: mask units by site, in the order of the columns.
    """

    def __init__(self, coefficients: Tensor, spec: MaskSpec, units: Mapping[str, int]) -> None:
        self._spec = spec
        self._units = dict(units)
        keep = spec.keep
        # With a draw b the hidden minus the exposed mask is (1 - b) / (1 - p) - b / p: the mean of both
        # draws, plus or minus half their difference.
        self._base = coefficients.sum(dim=1) * (0.5 / (1 - keep) - 0.5 / keep)
        step = coefficients * (-0.5 / (keep * (1 - keep)))
        sites = torch.split(step, list(self._units.values()), dim=1)
        self._steps = torch.cat([self._by_draw(part) for part in sites], dim=1)
        self._product = CodeProduct(self._steps) if usable(self._steps) else None
        self._few = len(coefficients) <= _FEW_ROWS and coefficients.device.type == "cpu"

    @cached_property
    def _tables(self) -> list[Tensor]:
        return [_sums_by_byte(rows) for rows in torch.split(self._steps, _TABLE_ROWS)]

    def scores(self, ids: Tensor) -> Tensor:
        """Every row times (hidden - exposed mask) of every id: float32 (rows, ids)."""
        scores = self._steps.new_empty((len(self._steps), len(ids)))
        self._fill(scores.T, ids)
        return scores

    def by_id(self, ids: Tensor) -> Tensor:
        """:meth:`scores` with the ids first: float32 (ids, rows)."""
        scores = self._steps.new_empty((len(ids), len(self._steps)))
        self._fill(scores, ids)
        return scores

    def _fill(self, scores: Tensor, ids: Tensor) -> None:
        # By the number of these ids alone: bits must not depend on what was scored before.
        by_tables = self._few and len(ids) >= _TABLE_IDS
        size, ids = self._ids_at_once(by_tables=by_tables), ids.to(self._steps.device)
        parts = zip(torch.split(ids, size), torch.split(scores, size), strict=True)
        for part, block in parts:
            packed = self._packed(part)
            if self._product is not None:
                self._product.into(packed, block.T)
            elif by_tables:
                block.copy_(self._looked_up(packed))
            else:
                torch.mm(_signs(packed), self._steps.T, out=block)
        if self._spec.keep != 0.5:
            scores.add_(self._base)

    def _ids_at_once(self, *, by_tables: bool) -> int:
        rows, draws = self._steps.shape
        if self._steps.device.type != "cpu":
            return max(_PRODUCT_IDS, _GPU_BYTES // (4 * draws + 24 * rows))
        return max(_PRODUCT_IDS, _BYTES * 8 // draws) if by_tables else _PRODUCT_IDS

    def own(self, ids: Tensor) -> Tensor:
        """Row i times (hidden - exposed mask) of ``ids[i]`` alone: float32 (rows,)."""
        signs = _signs(self._packed(ids.to(self._steps.device)))
        return torch.einsum("ru,ru->r", self._steps, signs) + self._base

    def _packed(self, ids: Tensor) -> Tensor:
        return torch.cat([self._spec.packed(ids, s, units) for s, units in self._units.items()], 1)

    def _by_draw(self, columns: Tensor) -> Tensor:
        """Coefficients of a site's draws: columns of a pair cancel; whole bytes, padded with 0."""
        rows, units = columns.shape
        draws = self._spec.draws(units)
        padded = columns.new_zeros((rows, -(-draws // 8) * 8))
        if self._spec.balanced:
            padded[:, :draws] = columns[:, 0::2]
            padded[:, : units // 2] -= columns[:, 1::2]
        else:
            padded[:, :draws] = columns
        return padded

    def _looked_up(self, packed: Tensor) -> Tensor:
        offsets = torch.arange(packed.shape[1], dtype=torch.int32, device=packed.device) * 256
        entries = packed.to(torch.int32) + offsets
        parts = [functional.embedding_bag(entries, t, mode="sum") for t in self._tables]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _sums_by_byte(steps: Tensor) -> Tensor:
    """For every byte of draws and each of its 256 values, the sum it adds: (bytes * 256, rows)."""
    by_byte = steps.T.reshape(-1, 8, len(steps))  # (bytes, bit, rows)
    sums = torch.zeros_like(by_byte[:, :1])
    for bit in range(8):
        step = by_byte[:, bit : bit + 1]
        sums = torch.cat([sums - step, sums + step], dim=1)
    return sums.flatten(0, 1)


def _signs(packed: Tensor) -> Tensor:
    """Draws as +1 and -1: float32 (ids, 8 * bytes)."""
    table = _sums_by_byte(torch.eye(8, device=packed.device))  # (256, 8)
    return table.index_select(0, packed.flatten().to(torch.int32)).view(len(packed), -1)
