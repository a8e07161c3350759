"""Retraining without one instance: the definition of influence.

On networks that are not convex, training noise mostly hides the effect of one instance: look at the
ceiling first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.evaluation.correlation import Correlation, correlate
from turnover.evaluation.retraining import Retraining, check_scores, outputs_without


@dataclass(frozen=True)
class LeaveOneOut:
    """Effects of single instances, and how scores agree with them.

    Attributes:
        effects: float32 (targets, instances), rise of a target's cost without the instance, mean over
            seeds: positive = the instance helped.
        standard_error: float32 (targets, instances), standard error of that mean; nan with one seed.
        correlation: correlation of scores and effects over the instances.
    """

    effects: NDArray[np.float32]
    standard_error: NDArray[np.float32]
    correlation: Correlation


def leave_one_out(
    scores: NDArray[np.floating],
    retraining: Retraining,
    instances: Sequence[int],
    seeds: Sequence[int],
) -> LeaveOneOut:
    """Retrain without each of some instances, and compare with their scores.

    Args:
        scores: (targets, train), positive = helpful.
        retraining: the training, and the targets with their labels.
        instances: at least 3 instances to leave out, one at a time.
        seeds: seeds of the trainings with and without the instance.

    Raises:
        InputError: too few, repeated or unknown instances, or shapes that do not fit.
    """
    count, chosen = len(retraining.inputs), np.asarray(instances, dtype=np.int64)
    check_scores(scores, retraining)
    if len(chosen) < 3 or len(np.unique(chosen)) < len(chosen):
        raise InputError(f"instances must be at least 3, and distinct, got {chosen.tolist()}")
    if chosen.min() < 0 or chosen.max() >= count:
        raise InputError(f"instances must be in [0, {count}), got {chosen.tolist()}")
    outputs = outputs_without(retraining, list(chosen[:, None]), seeds)
    effects = (outputs[0] - outputs[1:]).transpose(1, 2, 0)  # (seeds, targets, instances)
    error = np.full(effects.shape[1:], np.nan, dtype=np.float32)
    if len(effects) > 1:
        error = effects.std(axis=0, ddof=1) / np.float32(np.sqrt(len(effects)))
    predicted = np.asarray(scores)[:, chosen].astype(np.float64)
    agreement = correlate(predicted, effects.astype(np.float64))
    return LeaveOneOut(effects.mean(axis=0), error, agreement)
