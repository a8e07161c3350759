"""What groups do to a number of every block: regression on the groups that the blocks learned."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from turnover.errors import needing

_VARIANCES = np.concatenate([[0.0], np.logspace(-3, 4, 141)])
"""Candidates for the variance of the groups' effects, relative to that of the noise."""


class Effects(NamedTuple):
    """Effects of columns, float64 (columns,) each.

    Attributes:
        effect: what a block's number is higher by for having learned the group.
        se: its standard error.
        t: their ratio.
        p: two-sided, by Student's distribution.
    """

    effect: NDArray[np.float64]
    se: NDArray[np.float64]
    t: NDArray[np.float64]
    p: NDArray[np.float64]


def regress(
    numbers: NDArray[np.float64], learned: NDArray[np.bool_], ghosts: NDArray[np.bool_]
) -> tuple[Effects, Effects]:
    """Regress a number of every block on the groups that it learned, and each ghost beside them.

    With at least twice as many blocks as groups: ordinary least squares. With fewer, the other groups
    are random effects, whose variance is that of the highest likelihood (restricted), and each group in
    turn a fixed one (generalized least squares), so that no effect is shrunk; the standard errors then
    treat that variance as known.

    Args:
        numbers: of the blocks, such as their returns: (blocks,).
        learned: which groups each block learned: (blocks, groups).
        ghosts: which ghosts each block would have learned: (blocks, ghosts).

    Returns:
        Effects of the groups and of the ghosts; NaN for a group that all blocks learned, or none, and with
        few groups for one whose blocks the others' add up to. With too few blocks for any error, errors
        and p-values are NaN. If the blocks' numbers are equal, effects and errors are zero, and their
        ratios NaN.

    Source: for the mixed model, Kang et al. 2010 (EMMAX), equations 1 to 3.
    """
    blocks, groups = learned.shape
    if not np.ptp(numbers):
        return _nothing(groups), _nothing(ghosts.shape[1])
    if blocks >= 2 * groups:
        return _least_squares(numbers, learned), _each_beside(numbers, learned, ghosts)
    inverse, share = _mixed(numbers, learned.astype(float))
    own = _generalized(numbers, learned.astype(float), inverse, share)
    return own, _generalized(numbers, ghosts.astype(float), inverse, 0.0)


def _least_squares(numbers: NDArray[np.float64], learned: NDArray[np.bool_]) -> Effects:
    blocks = len(numbers)
    design = np.column_stack([np.ones(blocks), learned])
    inverse = np.linalg.pinv(design.T @ design)
    rank = int(np.linalg.matrix_rank(design))
    found = inverse @ design.T @ numbers
    left = numbers - design @ found
    degrees = blocks - rank
    # Below one for a column that others add up to, such as two groups of the same blocks.
    known = np.einsum("ij,ji->i", inverse, design.T @ design)[1:] > 1 - 1e-9
    se = np.sqrt(_over(left @ left, degrees) * np.diag(inverse)[1:])
    return _effects(np.where(known, found[1:], np.nan), se, degrees)


def _each_beside(
    numbers: NDArray[np.float64], learned: NDArray[np.bool_], ghosts: NDArray[np.bool_]
) -> Effects:
    """Each ghost's effect in a regression on it and all groups, by the projection off the groups."""
    blocks = len(numbers)
    design = np.column_stack([np.ones(blocks), learned])
    basis, values, _ = np.linalg.svd(design, full_matrices=False)
    basis = basis[:, values > values[0] * 1e-10]
    left = numbers - basis @ (basis.T @ numbers)
    columns = ghosts - basis @ (basis.T @ ghosts)
    norms = np.square(columns).sum(axis=0)
    norms[norms < 1e-9] = np.nan
    effect = columns.T @ left / norms
    degrees = blocks - basis.shape[1] - 1
    variance = _over(left @ left - np.square(effect) * norms, degrees)
    return _effects(effect, np.sqrt(variance / norms), degrees)


def _mixed(
    numbers: NDArray[np.float64], learned: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """The inverse covariance of numbers, up to a factor, and the effects' variance relative to noise."""
    blocks = len(numbers)
    columns = learned - learned.mean(axis=0)
    # The constant is an eigenvector of zero, as others may be: an eigenvalue of its own sets it apart.
    values, vectors = np.linalg.eigh(columns @ columns.T - 1 / blocks)
    values, vectors = values[1:].clip(min=0), vectors[:, 1:]
    turned = np.square(vectors.T @ numbers)
    totals = 1 + _VARIANCES[:, None] * values
    scales = (turned / totals).mean(axis=1)
    likelihood = -0.5 * (len(turned) * np.log(scales) + np.log(totals).sum(axis=1))
    best = int(np.argmax(likelihood))
    share = float(_VARIANCES[best])
    return (vectors / (1 + share * values)) @ vectors.T, share


def _generalized(
    numbers: NDArray[np.float64],
    columns: NDArray[np.float64],
    inverse: NDArray[np.float64],
    share: float,
) -> Effects:
    """Each column's effect alone, beside a constant and the random effects."""
    weighted = inverse @ columns
    norms = (columns * weighted).sum(axis=0)
    norms[norms < 1e-9] = np.nan
    effect = weighted.T @ numbers / norms
    degrees = len(numbers) - 2
    scale = _over(numbers @ inverse @ numbers - np.square(effect) * norms, degrees)
    # A group's own random effect is no part of its fixed one's error.
    return _effects(effect, np.sqrt(scale * (1 / norms - share).clip(min=0)), degrees)


def _over(squares: Any, degrees: int) -> Any:
    """A variance; unknown without degrees of freedom, and without rounding errors below zero."""
    return np.maximum(squares, 0.0) / (degrees if degrees > 0 else np.nan)


def _nothing(columns: int) -> Effects:
    unknown = np.full(columns, np.nan)
    return Effects(np.zeros(columns), np.zeros(columns), unknown, unknown.copy())


def _effects(effect: NDArray[np.float64], se: NDArray[np.float64], degrees: int) -> Effects:
    with needing("a p-value", "turnover[rl]"):
        from scipy.stats import t as student

    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = effect / se
    return Effects(
        effect,
        np.where(np.isnan(effect), np.nan, se),
        ratio,
        2 * student.sf(np.abs(ratio), degrees),
    )
