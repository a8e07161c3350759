"""Removing what scores say matters most, and retraining: does it matter?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from turnover import objectives
from turnover.errors import InputError
from turnover.evaluation.leave_one_out import check_scores
from turnover.evaluation.recipe import Build, Masked, Recipe
from turnover.evaluation.retraining import minus_cost, retrain
from turnover.evaluation.subsets import Subsets
from turnover.objectives import Objective

SIDES = ("helpful", "harmful")


@dataclass(frozen=True)
class Removal:
    """Change of the targets' mean cost when instances are removed.

    Every array is float64 (counts,). Positive: the targets cost more without the instances. Standard
    errors are over seeds (nan with one).

    Attributes:
        counts: how many instances were removed.
        change: by score, mean over targets and seeds.
        standard_error: of ``change``.
        random: by as many instances drawn at random.
        random_standard_error: of ``random``.
    """

    counts: tuple[int, ...]
    change: NDArray[np.float64]
    standard_error: NDArray[np.float64]
    random: NDArray[np.float64]
    random_standard_error: NDArray[np.float64]


def removal_curve(
    scores: NDArray[np.floating],
    build: Build,
    inputs: Tensor,
    labels: Tensor,
    recipe: Recipe,
    counts: Sequence[int],
    seeds: Sequence[int],
    *,
    on: Tensor,
    on_labels: Tensor,
    side: str = "helpful",
    together: bool = False,
    draws: int = 5,
    objective: Objective = objectives.margin,
    ids: Tensor | None = None,
    masked: Masked | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
    engine: str = "process",
) -> Removal:
    """Remove the most helpful (or harmful) instances, retrain, and see what the targets cost.

    Takes ``seeds * (1 + counts * (targets + draws))`` trainings, or one in place of ``targets`` if
    ``together``.

    Args:
        scores: (targets, train), positive = helpful.
        build: makes the networks.
        inputs: float32 (train, ...).
        labels: int64 (train,).
        recipe: how they are trained.
        counts: how many instances to remove, each >= 1.
        seeds: of the trainings, with and without the instances.
        on: (targets, ...), the targets' inputs.
        on_labels: int64 (targets,).
        side: ``"helpful"`` removes the highest scores, ``"harmful"`` the lowest.
        together: remove what has the highest sum of scores over the targets, once for all of them,
            and not for each target its own.
        draws: random removals to compare with, for each count.
        objective: cost of a prediction.
        ids: int64 (train,), what masks depend on.
        masked: train under turn-over masks.
        cache: folder that keeps finished trainings.
        progress: show a progress bar.
        engine: what trains the networks, as :func:`~turnover.evaluation.train` takes it.

    Raises:
        InputError: an unknown side, counts that leave nothing to train on, or shapes that do not fit.
    """
    train, targets = len(inputs), len(on)
    check_scores(scores, targets, train)
    if side not in SIDES:
        raise InputError(f"unknown side {side!r}; there are {', '.join(SIDES)}")
    if not counts or min(counts) < 1 or max(counts) >= train:
        raise InputError(f"counts must lie in 1 to {train - 1}, got {list(counts)}")
    if draws < 1:
        raise InputError(f"draws must be >= 1, got {draws}")
    rows = np.asarray(scores).sum(axis=0, keepdims=True) if together else np.asarray(scores)
    order = np.argsort(-rows if side == "helpful" else rows, axis=1, kind="stable")
    generator = np.random.default_rng(0)
    drawn = np.stack([generator.permutation(train) for _ in range(draws)])
    gone = [np.concatenate([order, drawn])[:, :count] for count in counts]
    keep = np.ones((1 + len(counts) * len(gone[0]), train), dtype=np.bool_)
    for index, removed in enumerate(gone):
        first = 1 + index * len(removed)
        np.put_along_axis(keep[first : first + len(removed)], removed, False, axis=1)
    logits = retrain(
        build,
        inputs,
        labels,
        recipe,
        Subsets(keep),
        seeds,
        on=on,
        ids=ids,
        masked=masked,
        cache=cache,
        progress=progress,
        engine=engine,
    )
    outputs = minus_cost(logits, on_labels, objective).astype(np.float64)
    rise = (outputs[0] - outputs[1:]).reshape(len(counts), len(gone[0]), len(seeds), targets)
    by_score, by_chance = rise[:, : len(order)], rise[:, len(order) :]
    if not together:
        by_score = np.diagonal(by_score, axis1=1, axis2=3)  # (counts, seeds, targets)
        by_score = by_score[:, None]
    return Removal(tuple(counts), *_over_seeds(by_score), *_over_seeds(by_chance))


def _over_seeds(rise: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard error over seeds of (counts, removals, seeds, targets)."""
    each = rise.mean(axis=(1, 3))  # (counts, seeds)
    if each.shape[1] < 2:
        return each[:, 0], np.full(len(each), np.nan)
    return each.mean(axis=1), each.std(axis=1, ddof=1) / np.sqrt(each.shape[1])
