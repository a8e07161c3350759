"""Rank correlation over targets, with its uncertainty and with the best that can be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

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


def correlate(predicted: Floats, runs: Floats, *, seed: int = 0) -> Correlation:
    """Rank correlation of predictions with the mean of several runs.

    Args:
        predicted: (targets, cases).
        runs: (runs, targets, cases), noisy readings of the truth.
        seed: of the bootstrap over targets and cases.
    """
    truth = runs.mean(axis=0)
    per_target = spearman(predicted, truth)
    generator = np.random.default_rng(seed)
    of_targets, of_cases = (_resampled(generator, size) for size in predicted.shape)
    means = _bootstrap(predicted, truth, of_targets, of_cases)
    low, high = np.quantile(means, [0.025, 0.975])
    return Correlation(
        float(per_target.mean()), float(low), float(high), _ceiling(runs), per_target
    )


def spearman(first: Floats, second: Floats) -> Floats:
    """Spearman's correlation along the last axis; 0 where one side is constant."""
    return _pearson(rankdata(first, axis=-1), rankdata(second, axis=-1))


def _pearson(first: Floats, second: Floats) -> Floats:
    first = first - first.mean(axis=-1, keepdims=True)
    second = second - second.mean(axis=-1, keepdims=True)
    scale = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    product = (first * second).sum(axis=-1)
    correlations: Floats = np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)
    return correlations


def _resampled(generator: np.random.Generator, size: int) -> Floats:
    """How often each of ``size`` things is drawn: (resamples, size)."""
    return generator.multinomial(size, np.full(size, 1 / size), size=_RESAMPLES).astype(np.float64)


def _bootstrap(predicted: Floats, truth: Floats, of_targets: Floats, of_cases: Floats) -> Floats:
    """Mean correlation of every resample: (resamples,)."""
    ranks = _Ranks(predicted), _Ranks(truth)
    means = np.empty(len(of_cases))
    for index, (targets, weights) in enumerate(zip(of_targets, of_cases, strict=True)):
        first, second = (rank.of(weights) for rank in ranks)  # (targets, cases)
        first -= (first @ weights)[:, None] / weights.sum()
        second -= (second @ weights)[:, None] / weights.sum()
        scale = np.sqrt((first**2 @ weights) * (second**2 @ weights))
        product = (first * second) @ weights
        each = np.divide(product, scale, out=np.zeros_like(product), where=scale > 0)
        means[index] = each @ targets / targets.sum()
    return means


class _Ranks:
    """Mid-ranks of values (targets, cases) of which each may be there several times or not at all.

    Sorted once: a resample then costs a sum along the order.
    """

    def __init__(self, values: Floats) -> None:
        self._order = np.argsort(values, axis=1, kind="stable")
        lowest = rankdata(values, method="min", axis=1).astype(np.int64) - 1
        highest = rankdata(values, method="max", axis=1).astype(np.int64)
        self._lowest, self._highest = lowest, highest  # where a value's ties begin and end

    def of(self, weights: Floats) -> Floats:
        """Ranks under how often each is there, (cases,)."""
        below = np.zeros((self._order.shape[0], self._order.shape[1] + 1))
        np.cumsum(weights[self._order], axis=1, out=below[:, 1:])
        less = np.take_along_axis(below, self._lowest, axis=1)
        ranks: Floats = (less + np.take_along_axis(below, self._highest, axis=1) + 1) / 2
        return ranks


def _ceiling(runs: Floats) -> float:
    """What the expected truth would correlate with the mean of the runs (seeds, targets, cases).

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
