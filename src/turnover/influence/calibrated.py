"""The noise floor of exact scores, from a few exact ghosts and the linear scores of all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


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
