"""From scores to z, p and q: how likely is a score if there is no influence at all?

Ghosts are ids that were never trained on, so their scores are pure noise. Their mean and standard
deviation per target standardize the scores; their pooled standardized values give the null
distribution, with a fitted tail beyond the last of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError

Floats = NDArray[np.float64]

_TAIL = 0.05
_PRIOR_SHAPE = 0.15
_PRIOR_WEIGHT = 30
_POOLED = 2**20
"""Standardized ghosts kept for a null distribution: 8 MB, and a tail of 50,000."""
MIN_GHOSTS = 10


@dataclass(frozen=True)
class NoiseFloor:
    """Mean and standard deviation of the ghosts of every target, exactly 0 if all ghosts score the same.

    float64 (targets,); () of an aggregate, (train,) of self-influence; or one for each score.
    """

    mean: NDArray[np.floating]
    sd: NDArray[np.floating]

    def standardize(self, scores: NDArray[np.floating]) -> Floats:
        """z-scores of scores (targets, ids) or (ids,); 0 where the ghosts do not differ."""
        mean, sd = self.of(scores)
        return np.asarray((scores - mean) / np.where(sd > 0, sd, np.inf), dtype=np.float64)

    def of(self, scores: NDArray[np.floating]) -> tuple[NDArray[np.floating], ...]:
        """Mean and deviation in a shape that broadcasts with the scores."""
        if self.sd.ndim == 1 < scores.ndim:
            return self.mean[:, None], self.sd[:, None]
        return self.mean, self.sd


def noise_floor(ghosts: NDArray[np.floating]) -> NoiseFloor:
    """Noise floor of ghost scores (targets, ghosts)."""
    if ghosts.shape[1] < MIN_GHOSTS:
        raise InputError(f"at least {MIN_GHOSTS} ghosts are needed, got {ghosts.shape[1]}")
    values = ghosts.astype(np.float64)
    # The deviation of equal numbers is not always 0 in floating point.
    differ = np.ptp(values, axis=1) > 0
    return NoiseFloor(values.mean(axis=1), np.where(differ, values.std(axis=1, ddof=1), 0.0))


def standardize_left_out(ghosts: NDArray[np.floating]) -> Floats:
    """Standardize each ghost by the *other* ghosts of its target: (targets, ghosts).

    A ghost that helps to set its own scale looks smaller than a fresh one; with few ghosts, every far
    score would look significant.
    """
    values = ghosts.astype(np.float64)
    count = values.shape[1]
    mean = values.mean(axis=1, keepdims=True)
    deviation = values - mean
    squares = (deviation**2).sum(axis=1, keepdims=True)
    other_mean = mean - deviation / (count - 1)
    other_squares = np.maximum(squares - deviation**2 * count / (count - 1), 0)
    other_sd = np.sqrt(other_squares / (count - 2))
    # Where the others are all equal, only this ghost gives a scale.
    sd = noise_floor(ghosts).sd[:, None]
    safe = np.where(sd > 0, np.where(other_sd > 1e-6 * sd, other_sd, sd), np.inf)
    return np.asarray((values - other_mean) / safe)


class GhostPool:
    """Standardized ghosts of many targets, thinned evenly if they would fill the memory."""

    def __init__(self) -> None:
        self._rows: list[Floats] = []
        self._stride = 1
        self._seen = 0
        self._kept = 0

    def add(self, ghosts: NDArray[np.floating]) -> NoiseFloor:
        """Add ghost scores (targets, ghosts), at least 10 ghosts; returns their noise floor."""
        floor = noise_floor(ghosts)
        rows = np.flatnonzero(floor.sd > 0)
        # Every stride-th target that has noise at all, counted over all calls.
        chosen = rows[(self._seen + np.arange(len(rows))) % self._stride == 0]
        self._seen += len(rows)
        self._rows += [row.copy() for row in standardize_left_out(ghosts[chosen])]
        self._kept += len(chosen) * ghosts.shape[1]
        while self._kept > _POOLED and len(self._rows) > 1:
            self._rows = self._rows[::2]
            self._stride *= 2
            self._kept = sum(len(row) for row in self._rows)
        return floor

    def null(self) -> NullDistribution:
        """The null distribution of the ghosts."""
        return NullDistribution(np.concatenate(self._rows) if self._rows else np.zeros(MIN_GHOSTS))


class NullDistribution:
    """Two-sided p-values of z-scores under the pooled ghosts.

    Each side is the empirical tail of the pooled ghosts up to its last 5%, and a generalized Pareto
    tail beyond, fitted by probability-weighted moments (Hosking and Wallis, Technometrics 1987). Few
    ghosts do not determine the tail's shape, which is then drawn towards a heavy one. No p-value is
    smaller than a Gaussian's: a bounded fit may not claim certainty.

    Args:
        pooled: standardized ghost scores of all targets, any shape.
    """

    def __init__(self, pooled: NDArray[np.floating]) -> None:
        self.values: Floats = np.sort(pooled.astype(np.float64), axis=None)
        """The pooled values in ascending order, which determine the distribution."""
        self._upper = _Tail(self.values)
        self._lower = _Tail(-self.values[::-1])

    def p_values(self, z: NDArray[np.floating]) -> Floats:
        """Two-sided p-values in (0, 1], of the shape of ``z``."""
        values = np.asarray(z, dtype=np.float64)
        one_sided = np.minimum(self._upper.survival(values), self._lower.survival(-values))
        return np.asarray(np.clip(2.0 * one_sided, np.finfo(np.float64).tiny, 1.0))


@dataclass(frozen=True)
class StudentNull:
    """Two-sided p-values of scores over their own standard errors: Student's t.

    Attributes:
        freedom: degrees of freedom of the standard errors.
    """

    freedom: float

    def p_values(self, z: NDArray[np.floating]) -> Floats:
        """Two-sided p-values in (0, 1], of the shape of ``z``."""
        squares = np.square(np.asarray(z, dtype=np.float64))
        total, half = self.freedom + squares, self.freedom / 2
        share = squares / total
        inside = share < 1.5 / (half + 2.5)  # where the continued fraction converges fast
        near = 1 - _incomplete_beta(0.5, half, np.where(inside, share, 0.0))
        far = _incomplete_beta(half, 0.5, np.where(inside, 0.0, self.freedom / total))
        return np.asarray(np.clip(np.where(inside, near, far), np.finfo(np.float64).tiny, 1.0))


def _incomplete_beta(a: float, b: float, x: Floats) -> Floats:
    """Regularized incomplete beta function for x below (a + 1) / (a + b + 2), by continued fraction.

    Source: NIST Digital Library of Mathematical Functions, 8.17.22, evaluated from the far end.
    """
    fraction = np.ones_like(x)
    for step in range(80, 0, -1):
        half = step // 2
        if step % 2:
            term = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            term = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        fraction = 1 + term / fraction
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) - math.log(a)
    with np.errstate(divide="ignore"):
        front = np.exp(scale + a * np.log(x) + b * np.log1p(-x))
    return np.asarray(front / fraction)


class _Tail:
    """P(Z >= z) for values in ascending order."""

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


def q_values(p: NDArray[np.floating], considered: int | None = None) -> Floats:
    """Benjamini-Hochberg q-values along the last axis, of the shape of ``p`` (rows of ids).

    Args:
        p: p-values.
        considered: hypotheses of each row, if ``p`` holds only some of them. The others can only lower
            a rank, so the q-values are then upper bounds.

    Source: Benjamini and Hochberg, J. R. Stat. Soc. B 57 (1995).
    """
    values = np.asarray(p, dtype=np.float64)
    count = values.shape[-1]
    order = np.argsort(values, axis=-1)
    hypotheses = count if considered is None else considered
    ranked = np.take_along_axis(values, order, axis=-1) * hypotheses / np.arange(1, count + 1)
    smallest = np.minimum.accumulate(ranked[..., ::-1], axis=-1)[..., ::-1]
    result = np.empty_like(values)
    np.put_along_axis(result, order, np.minimum(smallest, 1.0), axis=-1)
    return result
