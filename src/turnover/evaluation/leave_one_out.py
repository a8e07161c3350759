"""Retraining without one instance: the definition of influence, where noise lets it be read.

On networks that are not convex one instance's effect mostly drowns in the noise of training: look at
the ceiling first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from turnover import objectives
from turnover.errors import InputError
from turnover.evaluation.correlation import Correlation, correlate
from turnover.evaluation.recipe import Build, Masked, Recipe
from turnover.evaluation.retraining import minus_cost, retrain
from turnover.evaluation.subsets import Subsets
from turnover.objectives import Objective


@dataclass(frozen=True)
class LeaveOneOut:
    """Effects of single instances, and how scores agree with them.

    Attributes:
        effects: float32 (targets, instances), rise of a target's cost without the instance, mean over
            seeds: positive = the instance helped.
        standard_error: float32 (targets, instances), of that mean; nan with one seed.
        correlation: of scores and effects, over the instances.
    """

    effects: NDArray[np.float32]
    standard_error: NDArray[np.float32]
    correlation: Correlation


def leave_one_out(
    scores: NDArray[np.floating],
    build: Build,
    inputs: Tensor,
    labels: Tensor,
    recipe: Recipe,
    instances: Sequence[int],
    seeds: Sequence[int],
    *,
    on: Tensor,
    on_labels: Tensor,
    objective: Objective = objectives.margin,
    ids: Tensor | None = None,
    masked: Masked | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
    engine: str = "process",
) -> LeaveOneOut:
    """Retrain without each of some instances, and compare with their scores.

    Args:
        scores: (targets, train), positive = helpful.
        build: makes the networks.
        inputs: float32 (train, ...).
        labels: int64 (train,).
        recipe: how they are trained.
        instances: which ones to leave out, one at a time, at least 3.
        seeds: of the trainings, with and without the instance.
        on: (targets, ...), the targets' inputs.
        on_labels: int64 (targets,).
        objective: cost of a prediction.
        ids: int64 (train,), what masks depend on.
        masked: train under turn-over masks.
        cache: folder that keeps finished trainings.
        progress: show a progress bar.
        engine: what trains the networks, as :func:`~turnover.evaluation.train` takes it.

    Raises:
        InputError: too few, repeated or unknown instances, or shapes that do not fit.
    """
    count, chosen = len(inputs), np.asarray(instances, dtype=np.int64)
    check_scores(scores, len(on), count)
    if len(chosen) < 3 or len(np.unique(chosen)) < len(chosen):
        raise InputError(f"instances must be at least 3, and distinct, got {chosen.tolist()}")
    if chosen.min() < 0 or chosen.max() >= count:
        raise InputError(f"instances must lie in [0, {count}), got {chosen.tolist()}")
    keep = np.ones((1 + len(chosen), count), dtype=np.bool_)
    keep[np.arange(1, len(keep)), chosen] = False
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
    outputs = minus_cost(logits, on_labels, objective)
    effects = (outputs[0] - outputs[1:]).transpose(1, 2, 0)  # (seeds, targets, instances)
    error = np.full(effects.shape[1:], np.nan, dtype=np.float32)
    if len(effects) > 1:
        error = effects.std(axis=0, ddof=1) / np.float32(np.sqrt(len(effects)))
    predicted = np.asarray(scores)[:, chosen].astype(np.float64)
    agreement = correlate(predicted, effects.astype(np.float64))
    return LeaveOneOut(effects.mean(axis=0), error, agreement)


def check_scores(scores: NDArray[np.floating], targets: int, train: int) -> None:
    """Refuse scores that are not (targets, train), or not finite."""
    if np.shape(scores) != (targets, train):
        raise InputError(f"scores must be ({targets}, {train}), got {np.shape(scores)}")
    if not np.isfinite(scores).all():
        where = np.argwhere(~np.isfinite(scores))[0].tolist()
        raise InputError(f"scores must be finite, and at {where} they are not")
