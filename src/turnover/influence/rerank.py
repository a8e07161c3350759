"""Rerank: linear scores of all ids, then exact ones for those at either end.

The linear estimator ranks nearly as the exact one does, so what is most helpful or harmful exactly is
nearly always among somewhat more candidates taken linearly. The same is done to ghosts, so that what
stands beside an exact score is the noise floor of exact scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover.influence.engine import Scores, TargetBlock, to_numpy
from turnover.influence.topk import Extremes

EXACT_GHOSTS = 100
"""Ghosts of every target that are scored exactly."""
_DEPTH = 4
"""Linear ranks that the estimate of recall looks at, in multiples of the candidates."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Reranked:
    """Exact scores of the candidates of every target of a block.

    Attributes:
        positions: int64 (targets, candidates), into the ids, linearly most helpful first.
        scores: float32 (targets, candidates), exact.
        standard_error: float32, likewise, over networks; ``None`` for one.
        ghosts: float32 (targets, exact ghosts), of the noise floor.
        offset: float64 (targets,), and ``slope``: exact score expected of a linear one,
            ``offset + slope * linear``.
        slope: float64 (targets,).
        recall: float32 (targets,), estimated share of the ``wanted`` exactly most helpful and of the
            most harmful ones that are among the candidates.
    """

    positions: NDArray[np.int64]
    scores: NDArray[np.float32]
    standard_error: NDArray[np.float32] | None
    ghosts: NDArray[np.float32]
    offset: Floats
    slope: Floats
    recall: NDArray[np.float32]


def rerank(
    block: TargetBlock,
    linear: Iterable[Tensor],
    ids: Tensor,
    ghosts: Tensor,
    *,
    targets: int,
    candidates: int,
    wanted: int,
) -> Reranked:
    """Find the candidates of every target, and score them exactly.

    Args:
        block: the targets.
        linear: their linear scores (targets, ids) of the ids, in blocks and in order.
        ids: int64 (ids,).
        ghosts: int64 (ghosts,), for the noise floor; the first 100 are scored exactly.
        targets: number of targets.
        candidates: ids on each side that are scored exactly.
        wanted: ids on each side whose recall is estimated.
    """
    extremes = Extremes(targets, _DEPTH * candidates)
    for part in linear:
        extremes.add(part)
    positions, found = extremes.result()
    # With few ids all of them are candidates.
    ends = np.r_[
        0:candidates, max(candidates, positions.shape[1] - candidates) : positions.shape[1]
    ]
    ends = ends[ends < positions.shape[1]]
    between = np.setdiff1d(np.arange(positions.shape[1]), ends)
    sample = ghosts[:EXACT_GHOSTS]
    linear_ghosts = block.linear(ghosts).mean.cpu().double().numpy()
    scores, errors, exact_ghosts = [], [], []
    for row, target in enumerate(block.targets()):
        chosen = ids[torch.from_numpy(positions[row, ends])]
        both = target.exact(torch.cat([chosen, sample.to(chosen.device)]))
        scores.append(to_numpy(both.mean[0, : len(chosen)]))
        exact_ghosts.append(to_numpy(both.mean[0, len(chosen) :]))
        if both.standard_error is not None:
            errors.append(to_numpy(both.standard_error[0, : len(chosen)]))
    exact = np.stack(scores)
    offset, slope, spread, on_floor = calibrated(linear_ghosts, np.stack(exact_ghosts))
    expected = offset[:, None] + slope[:, None] * found[:, between]
    # What lies further in looks as ghosts do there.
    half, left = positions.shape[1] // 2, len(ids) - positions.shape[1]
    high, low = found[:, max(half - 1, 0), None], found[:, half, None]
    inner = (linear_ghosts < high) & (linear_ghosts > low)
    weights = inner * (left / np.maximum(inner.sum(axis=1, keepdims=True), 1))
    further = offset[:, None] + slope[:, None] * linear_ghosts
    return Reranked(
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


def calibrated(
    linear: Floats, exact: NDArray[np.float32]
) -> tuple[Floats, Floats, Floats, NDArray[np.float32]]:
    """Regression of the exact ghosts on the linear ones, and exact ghosts on the better noise floor.

    The linear scores of all ghosts are control variates: the mean and deviation of exact ghosts are
    told nearly as well as from all of them, though only some were scored exactly.

    Args:
        linear: float64 (targets, ghosts).
        exact: float32 (targets, exact ghosts), of the first ghosts.

    Returns:
        offset, slope and residual deviation (targets,), and float32 (targets, exact ghosts) with the
        mean and deviation so told.
    """
    some, values = linear[:, : exact.shape[1]], exact.astype(np.float64)
    count = values.shape[1]
    centred = some - some.mean(axis=1, keepdims=True)
    variance = (centred**2).sum(axis=1)
    covariance = (centred * values).sum(axis=1)
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


def _recall(
    exact: NDArray[np.float32], expected: Floats, weights: Floats, spread: Floats, wanted: int
) -> NDArray[np.float32]:
    """Estimated share of the exact extremes that are among the candidates: (targets,).

    An id that is no candidate has an exact score that is normal about what its linear score lets
    expect. The share is that of the candidates in what lies beyond the score where both together are
    as many as are wanted.

    Args:
        exact: of the candidates (targets, candidates).
        expected: of what is no candidate (targets, others), and ``weights``: how many ids each stands for.
        weights: float64 (targets, others).
        spread: float64 (targets,), of exact scores about the expected ones.
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


def put_on_scale(reranked: Reranked, linear: Scores) -> NDArray[np.float32]:
    """Linear scores (targets, ids) on the scale of the exact ones."""
    values = linear.mean.cpu().double().numpy()
    return np.asarray(reranked.offset[:, None] + reranked.slope[:, None] * values, dtype=np.float32)
