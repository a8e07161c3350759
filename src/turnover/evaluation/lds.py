"""Linear datamodeling score: do sums of scores rank the outputs of retrained networks?

Park et al. 2023 (arXiv 2303.14186), with two additions: the score with class counts removed, and the
score that a perfect predictor would read. The class counts of a subset alone explain much of an
output, so that "same class = 1" already scores high; removed, they explain nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from turnover.errors import InputError
from turnover.evaluation.subsets import Subsets

_RESAMPLES = 500
_SPLITS = 50
# Least squares leaves a residual of rounding errors, whose ranks would correlate with anything.
_ROUNDING = 1e-6

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Correlation:
    """Mean rank correlation over targets.

    Attributes:
        mean: Spearman's correlation over subsets, mean over targets; 0 for a target whose predictions
            are constant.
        low: lower end of the bootstrap's 95% interval, over targets and subsets.
        high: upper end of it.
        ceiling: what the expected outputs themselves would read, since the truth is a mean of few
            noisy trainings: from the agreement of halves of the seeds; nan with one seed.
        per_target: float64 (targets,).
    """

    mean: float
    low: float
    high: float
    ceiling: float
    per_target: Floats


@dataclass(frozen=True)
class Lds:
    """Linear datamodeling score.

    Attributes:
        raw: as it is.
        class_removed: with the class counts of the subsets partialled out of prediction and truth.
    """

    raw: Correlation
    class_removed: Correlation


def lds(
    scores: NDArray[np.floating],
    subsets: Subsets,
    outputs: NDArray[np.floating],
    *,
    labels: NDArray[np.integer],
    seed: int = 0,
) -> Lds:
    """Correlate sums of scores over subsets with the outputs of networks trained on them.

    Args:
        scores: (targets, train), positive = helpful.
        subsets: K subsets of the training instances.
        outputs: (subsets, seeds, targets), minus the cost (see
            :func:`~turnover.evaluation.minus_cost`): higher = better.
        labels: int (train,), classes of the training instances.
        seed: of the bootstrap.

    Raises:
        InputError: shapes that do not fit, values that are not finite, or fewer than 3 subsets.
    """
    scores, outputs, labels = np.asarray(scores), np.asarray(outputs), np.asarray(labels)
    _check(scores, subsets, outputs, labels)
    predicted = scores.astype(np.float64) @ subsets.keep.T.astype(np.float64)  # (targets, subsets)
    runs = outputs.astype(np.float64).transpose(1, 2, 0)  # (seeds, targets, subsets)
    counts = np.stack([subsets.keep[:, labels == c].sum(axis=1) for c in np.unique(labels)], axis=1)
    generator = np.random.default_rng(seed)
    weights = [_resampled(generator, size, _RESAMPLES) for size in predicted.shape]
    return Lds(
        _correlation(predicted, runs, weights[0], weights[1]),
        _correlation(_without(predicted, counts), _without(runs, counts), weights[0], weights[1]),
    )


def spearman(first: Floats, second: Floats) -> Floats:
    """Spearman's correlation along the last axis; 0 where one side is constant."""
    return _pearson(rankdata(first, axis=-1), rankdata(second, axis=-1))


def _check(
    scores: NDArray[np.floating],
    subsets: Subsets,
    outputs: NDArray[np.floating],
    labels: NDArray[np.integer],
) -> None:
    count, train = subsets.keep.shape
    if scores.ndim != 2 or scores.shape[1] != train:
        raise InputError(f"scores must be (targets, {train}), got {scores.shape}")
    if outputs.ndim != 3 or outputs.shape[0] != count or outputs.shape[2] != len(scores):
        raise InputError(
            f"outputs must be (subsets, seeds, targets) = ({count}, seeds, {len(scores)}), got "
            f"{outputs.shape}"
        )
    if labels.shape != (train,):
        raise InputError(f"labels must be ({train},), got {labels.shape}")
    if count < 3:
        raise InputError(f"a rank correlation needs at least 3 subsets, got {count}")
    for name, values in (("scores", scores), ("outputs", outputs)):
        if not np.isfinite(values).all():
            where = np.argwhere(~np.isfinite(values))[0].tolist()
            raise InputError(f"{name} must be finite, and at {where} they are not")


def _without(values: Floats, counts: NDArray[np.integer]) -> Floats:
    """Residuals (..., subsets) of least squares on counts (subsets, classes) and a constant."""
    design = np.column_stack([np.ones(len(counts)), counts - counts.mean(axis=0)])
    left, size, _ = np.linalg.svd(design, full_matrices=False)
    basis = left[:, size > size[0] * 1e-10]  # the counts of subsets of one size sum to a constant
    residuals = values - (values @ basis) @ basis.T
    spread = np.linalg.norm(values - values.mean(axis=-1, keepdims=True), axis=-1, keepdims=True)
    rest = np.linalg.norm(residuals, axis=-1, keepdims=True)
    return np.where(rest > _ROUNDING * spread, residuals, 0.0)


def _pearson(first: Floats, second: Floats) -> Floats:
    first = first - first.mean(axis=-1, keepdims=True)
    second = second - second.mean(axis=-1, keepdims=True)
    scale = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    product = (first * second).sum(axis=-1)
    correlations: Floats = np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)
    return correlations


def _correlation(
    predicted: Floats, runs: Floats, of_targets: Floats, of_subsets: Floats
) -> Correlation:
    truth = runs.mean(axis=0)
    per_target = spearman(predicted, truth)
    means = _bootstrap(predicted, truth, of_targets, of_subsets)
    low, high = np.quantile(means, [0.025, 0.975])
    return Correlation(
        float(per_target.mean()), float(low), float(high), _ceiling(runs), per_target
    )


def _resampled(generator: np.random.Generator, size: int, resamples: int) -> Floats:
    """How often each of ``size`` things is drawn: (resamples, size)."""
    return generator.multinomial(size, np.full(size, 1 / size), size=resamples).astype(np.float64)


def _bootstrap(predicted: Floats, truth: Floats, of_targets: Floats, of_subsets: Floats) -> Floats:
    """Mean correlation of every resample: (resamples,)."""
    ranks = _Ranks(predicted), _Ranks(truth)
    means = np.empty(len(of_subsets))
    for index, (targets, weights) in enumerate(zip(of_targets, of_subsets, strict=True)):
        first, second = (rank.of(weights) for rank in ranks)  # (targets, subsets)
        first -= (first @ weights)[:, None] / weights.sum()
        second -= (second @ weights)[:, None] / weights.sum()
        scale = np.sqrt((first**2 @ weights) * (second**2 @ weights))
        product = (first * second) @ weights
        each = np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)
        means[index] = each @ targets / targets.sum()
    return means


class _Ranks:
    """Mid-ranks of values (targets, subsets) of which each may be there several times or not at all.

    Sorted once: a resample then costs a sum along the order.
    """

    def __init__(self, values: Floats) -> None:
        self._order = np.argsort(values, axis=1, kind="stable")
        lowest = rankdata(values, method="min", axis=1).astype(np.int64) - 1
        highest = rankdata(values, method="max", axis=1).astype(np.int64)
        self._lowest, self._highest = lowest, highest  # where a value's ties begin and end

    def of(self, weights: Floats) -> Floats:
        """Ranks under how often each is there, (subsets,)."""
        below = np.zeros((self._order.shape[0], self._order.shape[1] + 1))
        np.cumsum(weights[self._order], axis=1, out=below[:, 1:])
        less = np.take_along_axis(below, self._lowest, axis=1)
        ranks: Floats = (less + np.take_along_axis(below, self._highest, axis=1) + 1) / 2
        return ranks


def _ceiling(runs: Floats) -> float:
    """What the expected truth would correlate with the mean of the runs (seeds, targets, subsets).

    The correlation of two halves of the seeds, stepped up to all seeds by Spearman and Brown's
    formula, is the reliability of the truth; its square root is the correlation with what the truth
    is a noisy reading of.
    """
    seeds = len(runs)
    if seeds < 2:
        return float("nan")
    half = seeds // 2
    agreements = [
        spearman(runs[list(first)].mean(axis=0), runs[list(second)].mean(axis=0))
        for first, second in _splits(seeds, half)
    ]
    agreement = np.mean(agreements, axis=0)  # (targets,)
    # Noise around 0 has both signs, and cut off at 0 it would add up to a ceiling.
    size = np.abs(agreement)
    times = seeds / half
    reliability = times * size / (1 + (times - 1) * size)
    return float(np.mean(np.sign(agreement) * np.sqrt(reliability)))


def _splits(seeds: int, half: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Pairs of disjoint halves; with an odd number each leaves one seed out in turn."""
    count = 0
    for first in combinations(range(seeds), half):
        rest = [seed for seed in range(seeds) if seed not in first]
        for second in combinations(rest, half):
            if first < second:
                yield first, second
                count += 1
                if count == _SPLITS:
                    return
