"""Removal of the instances with the highest or lowest scores, and retraining without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError, check_whole
from turnover.evaluation.retraining import Retraining, check_scores, outputs_without

SIDES = ("helpful", "harmful")


@dataclass(frozen=True)
class Removal:
    """Change of the targets' mean cost when instances are removed.

    Every array is float64 (counts,). Positive: the targets cost more without the instances. Standard
    errors are over seeds (nan with one).

    Attributes:
        counts: how many instances were removed.
        change: without the instances chosen by score, mean over targets and seeds.
        standard_error: standard error of ``change``.
        random: without as many random instances.
        random_standard_error: standard error of ``random``.
    """

    counts: tuple[int, ...]
    change: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    random: NDArray[np.float64]
    random_standard_error: NDArray[np.float64]


def removal_curve(
    scores: NDArray[np.floating],
    retraining: Retraining,
    counts: Sequence[int],
    seeds: Sequence[int],
    *,
    side: str = "helpful",
    together: bool = False,
    draws: int = 5,
) -> Removal:
    """Remove the most helpful (or harmful) instances, retrain, and measure the cost of the targets.

    Takes ``seeds * (1 + counts * (targets + draws))`` trainings, or one in place of ``targets`` if
    ``together``.

    Args:
        scores: (targets, train), positive = helpful.
        retraining: the training, and the targets with their labels.
        counts: how many instances to remove, each >= 1.
        seeds: of the trainings, with and without the instances.
        side: ``"helpful"`` removes the highest scores, ``"harmful"`` the lowest.
        together: remove the instances with the highest sum of scores over the targets once for all
            targets, instead of others for each target.
        draws: random removals to compare with, for each count.

    Raises:
        InputError: an unknown side, counts that leave nothing to train on, or shapes that do not fit.
    """
    targets, train = len(retraining.targets), len(retraining.inputs)
    check_scores(scores, retraining)
    if side not in SIDES:
        raise InputError(f"unknown side {side!r}; there are {', '.join(SIDES)}")
    if not counts or min(counts) < 1 or max(counts) >= train:
        raise InputError(f"counts must be in 1 to {train - 1}, got {list(counts)}")
    check_whole("draws", draws, 1)
    rows = np.asarray(scores).sum(axis=0, keepdims=True) if together else np.asarray(scores)
    order = np.argsort(-rows if side == "helpful" else rows, axis=1, kind="stable")
    generator = np.random.default_rng(0)
    orders = [*order, *(generator.permutation(train) for _ in range(draws))]
    removed = [each[:count] for count in counts for each in orders]
    outputs = outputs_without(retraining, removed, seeds).astype(np.float64)
    rise = (outputs[0] - outputs[1:]).reshape(len(counts), len(orders), len(seeds), targets)
    by_score, by_chance = rise[:, : len(order)], rise[:, len(order) :]
    if not together:
        by_score = np.diagonal(by_score, axis1=1, axis2=3)  # (counts, seeds, targets)
        by_score = by_score[:, None]
    return Removal(tuple(counts), *_over_seeds(by_score), *_over_seeds(by_chance))


def _over_seeds(rise: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard error over seeds of (counts, removals, seeds, targets)."""
    each = rise.mean(axis=(1, 3))  # (counts, seeds)
    if each.shape[1] < 2:
        return each[:, 0], np.full(len(each), np.nan)
    return each.mean(axis=1), each.std(axis=1, ddof=1) / np.sqrt(each.shape[1])
