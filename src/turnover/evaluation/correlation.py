"""Rank correlation over targets, with its uncertainty and its ceiling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, islice

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from turnover.errors import InputError

_RESAMPLES = 500
_SPLITS = 50

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Correlation:
    """Mean rank correlation over targets.

    Attributes:
        mean: Spearman's correlation over cases (subsets or instances), mean over targets; 0 for a
            target whose predictions are constant.
        low: lower end of the bootstrap's 95% interval, over targets and cases.
        high: upper end of that interval.
        ceiling: correlation that the expected outputs would reach, since the truth is a mean of few
            noisy trainings: by the agreement of halves of the seeds; nan with one seed.
        per_target: float64 (targets,).
        resamples: means of the bootstrap's resamples, float64 (500,). Two methods that are judged by the
            same truth with the same seed see the same resamples, so their difference is paired.
    """

    mean: float
    low: float
    high: float
    ceiling: float
    per_target: Floats
    resamples: Floats


def correlate(predicted: Floats, runs: Floats, *, seed: int = 0) -> Correlation:
    """Correlate the ranks of predictions (targets, cases) with those of the mean of runs.

    Runs are noisy readings of the truth, (runs, targets, cases); the seed is that of the bootstrap.
    """
    truth = runs.mean(axis=0)
    per_target = spearman(predicted, truth)
    generator = np.random.default_rng(seed)
    of_targets, of_cases = (_resampled(generator, size) for size in predicted.shape)
    means = _bootstrap(predicted, truth, of_targets, of_cases)
    low, high = np.quantile(means, [0.025, 0.975])
    return Correlation(
        float(per_target.mean()), float(low), float(high), _ceiling(runs), per_target, means
    )


def spearman(first: Floats, second: Floats) -> Floats:
    """Return Spearman's correlation along the last axis; 0 where one side is constant."""
    ranks = (rankdata(values, axis=-1) for values in (first, second))
    first, second = (one - one.mean(axis=-1, keepdims=True) for one in ranks)
    scale = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return _ratio((first * second).sum(axis=-1), scale)


def check_finite(name: str, values: NDArray[np.floating]) -> None:
    """Refuse values that are not finite, and name the first of them."""
    wrong = np.argwhere(~np.isfinite(values))
    if len(wrong):
        raise InputError(f"{name} must be finite, and at {wrong[0].tolist()} they are not")


def _ratio(values: Floats, scale: Floats) -> Floats:
    """Divide; 0 where the scale is 0."""
    ratios: Floats = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
    return ratios


def _resampled(generator: np.random.Generator, size: int) -> Floats:
    """Count how often each thing is drawn: (resamples, size)."""
    return generator.multinomial(size, np.full(size, 1 / size), size=_RESAMPLES).astype(np.float64)


def _bootstrap(predicted: Floats, truth: Floats, of_targets: Floats, of_cases: Floats) -> Floats:
    """Return the mean correlation of every resample: (resamples,)."""
    ranks = _Ranks(predicted), _Ranks(truth)
    means = np.empty(len(of_cases))
    for index, (targets, weights) in enumerate(zip(of_targets, of_cases, strict=True)):
        first, second = (rank.of(weights) for rank in ranks)  # (targets, cases)
        first -= (first @ weights)[:, None] / weights.sum()
        second -= (second @ weights)[:, None] / weights.sum()
        scale = np.sqrt((first**2 @ weights) * (second**2 @ weights))
        means[index] = _ratio((first * second) @ weights, scale) @ targets / targets.sum()
    return means


class _Ranks:
    """Mid-ranks of values (targets, cases) in resamples; sorts once, for all resamples."""

    def __init__(self, values: Floats) -> None:
        self._order = np.argsort(values, axis=1, kind="stable")
        lowest = rankdata(values, method="min", axis=1).astype(np.int64) - 1
        highest = rankdata(values, method="max", axis=1).astype(np.int64)
        self._lowest, self._highest = lowest, highest  # where a value's ties begin and end

    def of(self, weights: Floats) -> Floats:
        """Return the ranks if each case comes so often, (cases,)."""
        below = np.zeros((self._order.shape[0], self._order.shape[1] + 1))
        np.cumsum(weights[self._order], axis=1, out=below[:, 1:])
        less = np.take_along_axis(below, self._lowest, axis=1)
        ranks: Floats = (less + np.take_along_axis(below, self._highest, axis=1) + 1) / 2
        return ranks


def _ceiling(runs: Floats) -> float:
    """Estimate the correlation of the expected truth with the mean of runs (seeds, targets, cases).

    The correlation of two halves of the seeds, extrapolated to all seeds by Spearman and Brown's formula,
    is the reliability of the truth; its square root is the correlation with the noiseless truth.
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
    # Noise around 0 has both signs: cut off at 0 it would raise the ceiling.
    size = np.abs(agreement)
    times = seeds / half
    reliability = times * size / (1 + (times - 1) * size)
    return float(np.mean(np.sign(agreement) * np.sqrt(reliability)))


def _splits(seeds: int, half: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield pairs of disjoint halves; of an odd number each leaves out one seed."""
    pairs = (
        (first, second)
        for first in combinations(range(seeds), half)
        for second in combinations([seed for seed in range(seeds) if seed not in first], half)
        if first < second
    )
    return islice(pairs, _SPLITS)
