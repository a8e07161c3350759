"""Memorization: how much more often an instance is predicted right if it was trained on.

Feldman and Zhang 2020 (arXiv 2008.03703), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.evaluation.correlation import Correlation, check_finite, correlate
from turnover.evaluation.subsets import Subsets


@dataclass(frozen=True)
class Memorization:
    """Memorization of every training instance, and how scores agree with it.

    Attributes:
        values: float64 (train,), share of right predictions of the networks that were trained on the
            instance, less that of the others: -1 to 1.
        correlation: correlation of self-scores and values over the instances; its ceiling follows
            from the agreement of seeds on the same subsets.
    """

    values: NDArray[np.float64]
    correlation: Correlation


def memorization(
    subsets: Subsets,
    logits: NDArray[np.float32],
    labels: NDArray[np.integer],
    self_scores: NDArray[np.floating],
) -> Memorization:
    """Measure memorization by networks trained on subsets, and compare it with scores.

    Args:
        subsets: subsets of the training instances.
        logits: (subsets, seeds, train, classes), from
            :func:`~turnover.evaluation.retrain` with the training inputs as targets.
        labels: int (train,).
        self_scores: (train,), higher = more memorized, such as self-influence.

    Raises:
        InputError: shapes that do not fit, scores that are not finite, or an instance in all subsets
            or in none.
    """
    labels = np.asarray(labels)
    predicted: NDArray[np.float64] = np.asarray(self_scores, dtype=np.float64)
    count, train = subsets.keep.shape
    if logits.ndim != 4 or logits.shape[0] != count or logits.shape[2] != train:
        raise InputError(
            f"logits must be (subsets, seeds, train, classes) = ({count}, seeds, {train}, classes), "
            f"got {logits.shape}: retrain with targets= the training inputs"
        )
    for name, values in (("labels", labels), ("self_scores", predicted)):
        if values.shape != (train,):
            raise InputError(f"{name} must be ({train},), got {values.shape}")
    check_finite("self_scores", predicted)
    inside = subsets.keep.sum(axis=0)
    alike = (inside == 0) | (inside == count)
    if alike.any():
        raise InputError(
            f"instance {int(np.argmax(alike))} is in all {count} subsets or in none, so its effect "
            f"cannot be measured: draw more subsets"
        )
    right = (logits.argmax(axis=3) == labels).astype(np.float64)  # (subsets, seeds, train)
    keep = subsets.keep[:, None]
    with_it = (right * keep).sum(axis=0) / inside
    without = (right * ~keep).sum(axis=0) / (count - inside)
    runs = with_it - without  # (seeds, train)
    return Memorization(runs.mean(axis=0), correlate(predicted[None], runs[:, None]))
