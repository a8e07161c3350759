"""Rerank: linear scores of all ids, then exact ones for those at either end.

The linear estimator ranks nearly as the exact one does, so the exactly most helpful or harmful ids are
nearly always among somewhat more linear candidates. The same is done to ghosts, so that an exact score is
compared with the noise floor of exact scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover.errors import InputError, check_whole
from turnover.ids import ghost_ids
from turnover.influence.engine import Engine, Scores, TargetBlock, to_numpy
from turnover.influence.exact import Exact, ExactEstimator
from turnover.influence.linear import Floats, Linear, LinearEstimator, calibrated
from turnover.influence.plan import Pilot
from turnover.influence.protocol import Estimator, Method, register
from turnover.influence.sinks import Region
from turnover.influence.topk import Extremes
from turnover.results.arrays import Variable

_EXACT_GHOSTS = 100
"""Ghosts of every target that are scored exactly."""
_DEPTH = 4
"""Linear ranks that the estimate of recall uses, in multiples of the candidates."""
_RECALLED = 10


@dataclass(frozen=True)
class Rerank(Method):
    """Options of rerank: linear scores of all ids, then exact ones of the candidates at both ends.

    ``result.exact`` marks the exact pairs; the others are linear scores on the exact ones' scale.
    ``result.recall`` estimates the share of the exact extremes that are among the candidates.

    Attributes:
        candidates: ids on each side of each target that are scored exactly.
        block: as of :class:`turnover.Exact`.

    Raises:
        InputError: candidates or a block of less than 1.

    Source: both estimators are of Kobayashi et al. 2020 (arXiv 2012.04207); the noise floor of exact scores
    comes from 100 exact ghosts, with the linear scores of all as control variates.

    Example::

        influence = turnover.Influence(network, method=turnover.Rerank(candidates=100))
        best = influence.estimate(targets, train_ids, top=20)
    """

    candidates: int = 50
    block: int | None = None

    def __post_init__(self) -> None:
        check_whole("candidates", self.candidates, 1)
        Exact(self.block)  # checks it


class RerankEstimator(Estimator):
    """Ranks ids by :class:`LinearEstimator`, and scores the extremes by :class:`ExactEstimator`."""

    differentiates = True
    runs_masked = True
    ranks_first = True
    block_shape = (32, None)  # the exact part of a block takes the time

    def __init__(self, options: Rerank, engines: Sequence[Engine], ghosts: int) -> None:
        super().__init__(options, engines, ghosts)
        self._linear = LinearEstimator(Linear(), engines, ghosts)
        self._exact = ExactEstimator(Exact(options.block), engines, ghosts)
        self.floor_ghosts = min(_EXACT_GHOSTS, ghosts)
        self.on_itself = self._linear  # a row on itself has no rank

    def scores(self, block: TargetBlock, ids: Tensor) -> Scores:
        """See :class:`Estimator`: the scores that rank."""
        return self._linear.scores(block, ids)

    def forget(self) -> None:
        """See :class:`Estimator`."""
        self._exact.forget()

    def work(self, ids: int, *, first: bool, top: int | None) -> dict[str, int]:  # noqa: ARG002
        """See :class:`Estimator`; all scores are kept after a second pass."""
        exact = min(2 * self.options.candidates, ids) + self.floor_ghosts
        return {"backward": 1, "pair": (2 if top is None else 1) * ids, "exact": exact}

    def variables(self, dims: tuple[str, str], chunks: tuple[int, int]) -> dict[str, Variable]:
        """See :class:`Estimator`."""
        recall = {"recall": Variable(dims[:1], "float32", chunks[:1])}
        return recall | ({"exact": Variable(dims, "bool", chunks)} if dims[1] == "train" else {})

    def check_top(self, top: int | None) -> None:
        """See :class:`Estimator`."""
        if top is not None and top > self.options.candidates:
            raise InputError(
                f"top={top} asks for more than the {self.options.candidates} candidates that are scored "
                f"exactly: raise candidates, or lower top"
            )

    def seconds(self, pilot: Pilot) -> dict[str, float]:
        """See :class:`Estimator`."""
        return self._linear.seconds(pilot) | self._exact.seconds(pilot)

    def ghost_scores(self, pilot: Pilot) -> NDArray[np.float64]:
        """See :class:`Estimator`."""
        return self._exact.ghost_scores(pilot)

    def memory(self, pilot: Pilot) -> int:
        """See :class:`Estimator`; all scores of a block are kept twice where all are wanted."""
        dense = 5 * self.rows() * pilot.ids if pilot.top is None else 0
        return super().memory(pilot) + dense

    def fill(self, region: Region, top: int | None) -> None:
        """See :class:`Estimator`."""
        if region.has("recall"):
            self.skip(self.work(len(region.ids), first=True, top=top), region.targets)
            return
        found = self._reranked(region, top or _RECALLED)
        region.put("ghost", found.ghosts)
        if top is None:
            self._put_all(region, found)
        else:
            order = np.argsort(-found.scores, axis=1, kind="stable")
            if order.shape[1] > 2 * top:
                order = np.concatenate([order[:, :top], order[:, -top:]], axis=1)
            positions = np.take_along_axis(found.positions, order, axis=1)
            region.put("score", np.take_along_axis(found.scores, order, axis=1))
            region.put("train_id", region.ids.numpy()[positions])
            if found.standard_error is not None:
                errors = np.take_along_axis(found.standard_error, order, axis=1)
                region.put("standard_error", errors)
        region.put("recall", found.recall)

    def _put_all(self, region: Region, found: _Reranked) -> None:
        """Put the exact scores of candidates among linear ones on their scale."""
        start = 0
        for part in torch.split(region.ids, region.columns):
            some = slice(start, start + len(part))
            linear = self._linear.counted_scores(region.block, part)
            scores = found.on_scale(linear)
            inside = (found.positions >= some.start) & (found.positions < some.stop)
            row, column = np.nonzero(inside)
            at = found.positions[row, column] - some.start
            scores[row, at] = found.scores[row, column]
            exact = np.zeros(scores.shape, dtype=bool)
            exact[row, at] = True
            region.put("score", scores, some)
            region.put("exact", exact, some)
            if found.standard_error is not None and linear.standard_error is not None:
                errors = to_numpy(linear.standard_error) * np.abs(found.slope[:, None])
                errors[row, at] = found.standard_error[row, column]
                region.put("standard_error", errors.astype(np.float32), some)
            start = some.stop

    def _reranked(self, region: Region, wanted: int) -> _Reranked:
        """Find the candidates of every target, and score them exactly.

        Args:
            region: targets and ids.
            wanted: ids on each side whose recall is estimated.
        """
        candidates, ghosts = self.options.candidates, ghost_ids(self.ghosts)
        block, ids = region.block, region.ids
        extremes = Extremes(region.targets, _DEPTH * candidates)
        for part in torch.split(ids, region.columns):
            extremes.add(self._linear.counted_scores(block, part).mean)
        positions, found = extremes.result()
        # With few ids all of them are candidates.
        ends = np.r_[
            0:candidates, max(candidates, positions.shape[1] - candidates) : positions.shape[1]
        ]
        ends = ends[ends < positions.shape[1]]
        between = np.setdiff1d(np.arange(positions.shape[1]), ends)
        sample = ghosts[: self.floor_ghosts]
        linear_ghosts = self._linear.scores(block, ghosts).mean.cpu().double().numpy()
        scores, errors, exact_ghosts = [], [], []
        for row, target in enumerate(block.targets()):
            chosen = ids[torch.from_numpy(positions[row, ends])]
            both = self._exact.scores(target, torch.cat([chosen, sample]))
            scores.append(to_numpy(both.mean[0, : len(chosen)]))
            exact_ghosts.append(to_numpy(both.mean[0, len(chosen) :]))
            if both.standard_error is not None:
                errors.append(to_numpy(both.standard_error[0, : len(chosen)]))
        exact = np.stack(scores)
        offset, slope, spread, on_floor = calibrated(linear_ghosts, np.stack(exact_ghosts))
        expected = offset[:, None] + slope[:, None] * found[:, between]
        # Ids further in are distributed as ghosts are there.
        half, left = positions.shape[1] // 2, len(ids) - positions.shape[1]
        high, low = found[:, max(half - 1, 0), None], found[:, half, None]
        inner = (linear_ghosts < high) & (linear_ghosts > low)
        weights = inner * (left / np.maximum(inner.sum(axis=1, keepdims=True), 1))
        further = offset[:, None] + slope[:, None] * linear_ghosts
        return _Reranked(
            positions=positions[:, ends],
            scores=exact,
            standard_error=np.stack(errors) if errors else None,
            ghosts=on_floor,
            offset=offset,
            slope=slope,
            recall=_recall(
                exact,
                np.concatenate([expected, further], axis=1),
                np.concatenate([np.ones_like(expected), weights], axis=1),
                spread,
                wanted,
            ),
        )


register("rerank", Rerank, RerankEstimator)


@dataclass(frozen=True)
class _Reranked:
    """Exact scores of the candidates of every target of a block.

    Attributes:
        positions: int64 (targets, candidates), into the ids, linearly most helpful first.
        scores: float32 (targets, candidates), exact.
        standard_error: float32, likewise, over networks; ``None`` for one.
        ghosts: float32 (targets, exact ghosts), of the noise floor.
        offset: float64 (targets,); an exact score is expected at ``offset + slope * linear``.
        slope: float64 (targets,).
        recall: float32 (targets,), estimated share of the exact extremes among the candidates.
    """

    positions: NDArray[np.int64]
    scores: NDArray[np.float32]
    standard_error: NDArray[np.float32] | None
    ghosts: NDArray[np.float32]
    offset: Floats
    slope: Floats
    recall: NDArray[np.float32]

    def on_scale(self, linear: Scores) -> NDArray[np.float32]:
        """Linear scores (targets, ids) on the scale of the exact ones."""
        values = linear.mean.cpu().double().numpy()
        return np.asarray(self.offset[:, None] + self.slope[:, None] * values, dtype=np.float32)


def _recall(
    exact: NDArray[np.float32], expected: Floats, weights: Floats, spread: Floats, wanted: int
) -> NDArray[np.float32]:
    """Estimate the share of the exact extremes that are among the candidates: (targets,).

    The exact score of any other id is normal about the score that its linear one predicts. The share is that
    of the candidates among the ``wanted`` highest scores of both, and among the lowest.

    Args:
        exact: of the candidates (targets, candidates).
        expected: of the others (targets, others).
        weights: how many ids each of the others represents, likewise.
        spread: deviation of exact scores from the expected ones (targets,).
        wanted: ids on each side.
    """
    wanted = min(wanted, exact.shape[1] // 2)
    if not wanted:
        return np.ones(len(exact), dtype=np.float32)
    recall = np.empty(len(exact))
    ranks = np.arange(wanted + 1)
    for row, scores in enumerate(exact.astype(np.float64)):
        scale = max(float(spread[row]), 1e-30) * math.sqrt(2)
        found = 0.0
        for sign in (1.0, -1.0):
            best = np.sort(sign * scores)[::-1][:wanted]
            distance = torch.from_numpy((best[:, None] - sign * expected[row]) / scale)
            missed = torch.erfc(distance).numpy() @ weights[row] / 2
            found += float(np.interp(wanted, np.r_[0.0, ranks[1:] + missed], ranks))
        recall[row] = found / (2 * wanted)
    return recall.astype(np.float32)
