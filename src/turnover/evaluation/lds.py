"""Linear datamodeling score: how well sums of scores rank the outputs of retrained networks.

Park et al. 2023 (arXiv 2303.14186), with two additions: the score with class counts removed, and the
score of a perfect predictor. The class counts of a subset alone explain much of an output, so that
"same class = 1" scores high; the score with class counts removed shows what scores explain beyond.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.evaluation.correlation import Correlation, Floats, check_finite, correlate
from turnover.evaluation.subsets import Subsets

_ROUNDING = 1e-6
"""Share of a residual that is rounding error, whose ranks could correlate with anything."""


@dataclass(frozen=True)
class Lds:
    """Linear datamodeling score.

    Attributes:
        raw: plain score.
        class_removed: score with the class counts of the subsets partialled out of prediction and truth.
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
        subsets: subsets of the training instances.
        outputs: (subsets, seeds, targets), minus the cost (see
            :func:`~turnover.evaluation.minus_cost`): higher = better.
        labels: int (train,), classes of the training instances.
        seed: seed of the bootstrap.

    Raises:
        InputError: shapes that do not fit, values that are not finite, or fewer than 3 subsets.
    """
    scores, outputs, labels = np.asarray(scores), np.asarray(outputs), np.asarray(labels)
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
    check_finite("scores", scores)
    check_finite("outputs", outputs)
    predicted = scores.astype(np.float64) @ subsets.keep.T.astype(np.float64)  # (targets, subsets)
    runs = outputs.astype(np.float64).transpose(1, 2, 0)  # (seeds, targets, subsets)
    counts = np.stack([subsets.keep[:, labels == c].sum(axis=1) for c in np.unique(labels)], axis=1)
    return Lds(
        correlate(predicted, runs, seed=seed),
        correlate(_without(predicted, counts), _without(runs, counts), seed=seed),
    )


def _without(values: Floats, counts: NDArray[np.integer]) -> Floats:
    """Return residuals (..., subsets) of least squares on counts (subsets, classes) and a constant."""
    design = np.column_stack([np.ones(len(counts)), counts - counts.mean(axis=0)])
    left, size, _ = np.linalg.svd(design, full_matrices=False)
    basis = left[:, size > size[0] * 1e-10]  # the counts of subsets of one size sum to a constant
    residuals = values - (values @ basis) @ basis.T
    spread = np.linalg.norm(values - values.mean(axis=-1, keepdims=True), axis=-1, keepdims=True)
    rest = np.linalg.norm(residuals, axis=-1, keepdims=True)
    return np.where(rest > _ROUNDING * spread, residuals, 0.0)
