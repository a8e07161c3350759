"""From ghost scores to z, p and q: how likely is a score under no influence at all?

Ghosts are ids that were never trained on, so their scores are pure noise. Their mean and standard
deviation per target standardise the scores; their pooled standardised values give the null
distribution, with a fitted tail where they run out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError

Floats = NDArray[np.float64]

_TAIL = 0.05
_PRIOR_SHAPE = 0.15
_PRIOR_WEIGHT = 30
MIN_GHOSTS = 10


@dataclass(frozen=True)
class NoiseFloor:
    """Ghost mean and standard deviation of every target: float64 (targets,).

    The deviation is exactly 0 where all ghosts score the same.
    """

    mean: Floats
    sd: Floats

    def standardise(self, scores: NDArray[np.floating]) -> Floats:
        """z-scores (targets, ids) of scores (targets, ids); 0 where the ghosts do not differ."""
        sd = np.where(self.sd > 0, self.sd, np.inf)
        return np.asarray((scores - self.mean[:, None]) / sd[:, None], dtype=np.float64)


def noise_floor(ghosts: NDArray[np.floating]) -> NoiseFloor:
    """Noise floor of ghost scores (targets, ghosts).

    Raises:
        InputError: fewer than 10 ghosts, from which no deviation can be told.
    """
    if ghosts.shape[1] < MIN_GHOSTS:
        raise InputError(f"at least {MIN_GHOSTS} ghosts are needed, got {ghosts.shape[1]}")
    values = ghosts.astype(np.float64)
    # The deviation of equal numbers is not always 0 in floating point.
    differ = np.ptp(values, axis=1) > 0
    return NoiseFloor(values.mean(axis=1), np.where(differ, values.std(axis=1, ddof=1), 0.0))


def standardise_left_out(ghosts: NDArray[np.floating]) -> Floats:
    """Each ghost standardised by the *other* ghosts of its target: (targets, ghosts).

    A ghost that helped to set its own scale would look smaller than a fresh one, and few ghosts would
    make every far score look significant.
    """
    values = ghosts.astype(np.float64)
    count = values.shape[1]
    mean = values.mean(axis=1, keepdims=True)
    deviation = values - mean
    squares = (deviation**2).sum(axis=1, keepdims=True)
    other_mean = mean - deviation / (count - 1)
    other_squares = np.maximum(squares - deviation**2 * count / (count - 1), 0)
    other_sd = np.sqrt(other_squares / (count - 2))
    # Where the others are all equal there is no scale without this ghost.
    sd = noise_floor(ghosts).sd[:, None]
    safe = np.where(sd > 0, np.where(other_sd > 1e-6 * sd, other_sd, sd), np.inf)
    return np.asarray((values - other_mean) / safe)


class NullDistribution:
    """Two-sided p-values of z-scores under the pooled ghosts.

    Each side is the empirical tail of the pooled ghosts up to its last 5%, and a generalised Pareto
    tail beyond, fitted by probability-weighted moments (Hosking and Wallis, Technometrics 1987). Few
    ghosts cannot tell the tail's shape, which is then drawn towards a heavy one. No p-value is
    smaller than a Gaussian's: a bounded fit may not claim certainty.

    Args:
        pooled: standardised ghost scores of all targets, any shape.
    """

    def __init__(self, pooled: NDArray[np.floating]) -> None:
        values = np.sort(pooled.astype(np.float64), axis=None)
        self._upper = _Tail(values)
        self._lower = _Tail(-values[::-1])

    def p_values(self, z: NDArray[np.floating]) -> Floats:
        """Two-sided p-values in (0, 1], of the shape of ``z``."""
        values = np.asarray(z, dtype=np.float64)
        one_sided = np.minimum(self._upper.survival(values), self._lower.survival(-values))
        return np.asarray(np.clip(2.0 * one_sided, np.finfo(np.float64).tiny, 1.0))


class _Tail:
    """P(Z >= z) for values sorted upwards."""

    def __init__(self, values: Floats) -> None:
        self._values = values
        count = max(int(len(values) * _TAIL), min(10, len(values) // 2), 1)
        self._threshold = float(values[-count])
        self._share = count / len(values)
        excess = values[-count:] - self._threshold
        first = float(excess.mean())
        weights = (count - np.arange(count) - 0.65) / count
        second = float((weights * excess).mean())
        if first <= 0 or first - 2 * second <= 0:
            self._shape, self._scale = 0.0, max(first, 1e-12)
            return
        fitted = float(np.clip(2 - first / (first - 2 * second), -0.5, 0.5))
        self._shape = (count * fitted + _PRIOR_WEIGHT * _PRIOR_SHAPE) / (count + _PRIOR_WEIGHT)
        self._scale = first * (1 - self._shape)  # keeps the mean excess at any clipped shape

    def survival(self, z: Floats) -> Floats:
        count = len(self._values)
        at_least = count - np.searchsorted(self._values, z, side="left")
        bulk = (at_least + 1) / (count + 1)
        excess = np.maximum(z - self._threshold, 0) / self._scale
        if abs(self._shape) < 1e-6:
            beyond = np.exp(-excess)
        else:
            beyond = np.maximum(1 + self._shape * excess, 0) ** (-1 / self._shape)
        tail = np.maximum(self._share * beyond, _gaussian_survival(z))
        return np.asarray(np.where(z > self._threshold, np.minimum(tail, self._share), bulk))


def _gaussian_survival(z: Floats) -> Floats:
    """Lower bound of the Gaussian's upper tail for z > 0 (Gordon 1941), tight beyond 2."""
    safe = np.maximum(z, 0.75)  # where the bound begins to fall
    density = np.exp(-0.5 * safe**2) / np.sqrt(2 * np.pi)
    return np.asarray(density * safe / (safe**2 + 1))


def q_values(p: NDArray[np.floating]) -> Floats:
    """Benjamini-Hochberg q-values along the last axis, of the shape of ``p`` (rows of ids).

    Source: Benjamini and Hochberg, J. R. Stat. Soc. B 57 (1995).
    """
    values = np.asarray(p, dtype=np.float64)
    count = values.shape[-1]
    order = np.argsort(values, axis=-1)
    ranked = np.take_along_axis(values, order, axis=-1) * count / np.arange(1, count + 1)
    smallest = np.minimum.accumulate(ranked[..., ::-1], axis=-1)[..., ::-1]
    result = np.empty_like(values)
    np.put_along_axis(result, order, np.minimum(smallest, 1.0), axis=-1)
    return result
