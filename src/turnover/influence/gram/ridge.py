"""How strongly to regularize: rules for lambda that need no retrained networks. Pure functions.

``K`` is the Gram matrix of gradients, float (rows, rows); ``y`` the objective of the rows, float (rows,),
which kernel ridge regression on ``K`` should predict. Lambda is added to the diagonal of ``K``.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real

import torch
from torch import Tensor

from turnover.errors import InputError

DEFAULT: float | str = 1.0
"""Multiple of the mean diagonal; scores agree best with retraining between 0.3 and 1."""

RULES = ("gcv", "evidence")
_GRID = 61
_LOWEST, _HIGHEST = 1e-4, 1e2  # in mean diagonals
_ROWS = 3000
_SAMPLE = 2000


def check(ridge: float | str) -> None:
    """Check that a ridge is the name of a rule or a positive number."""
    if isinstance(ridge, str):
        if ridge not in RULES:
            raise InputError(
                f"unknown ridge {ridge!r}: give {', '.join(map(repr, RULES))} or a positive multiple "
                f"of the mean diagonal"
            )
    elif isinstance(ridge, bool) or not (isinstance(ridge, Real) and 0 < ridge < float("inf")):
        raise InputError(f"ridge must be a positive multiple of the mean diagonal, got {ridge!r}")


def scaled(k: Tensor, multiple: float) -> float:
    """A multiple of the mean diagonal."""
    return multiple * float(k.diagonal().double().mean())


def gcv(k: Tensor, y: Tensor) -> float:
    """The lambda of least generalized cross-validation error (Golub et al., Technometrics 21, 1979)."""
    values, projected = _spectrum(k, y)

    def error(ridge: float) -> float:
        left = ridge / (values + ridge)
        return float((left * projected).square().mean() / left.mean().square())

    return _least(error, k)


def evidence(k: Tensor, y: Tensor) -> float:
    """The lambda of the highest marginal likelihood.

    ``y`` is Gaussian with covariance ``s (K + lambda I)``, at the best scale s for each lambda.
    """
    values, projected = _spectrum(k, y)

    def cost(ridge: float) -> float:
        spread = values + ridge
        fit = (projected.square() / spread).mean()
        return float(len(values) * fit.log() + spread.log().sum())

    return _least(cost, k)


def choose(ridge: float | str, k: Tensor, y: Tensor) -> float:
    """Lambda by a rule, or a multiple of the mean over instances of the sum of their diagonal.

    A rule judges a large ``K`` by 2,000 random rows.
    """
    if not float(k.diagonal().max()) > 0:
        raise InputError(
            "the objective of no training instance depends on any trained parameter: all gradients "
            "are 0"
        )
    if not isinstance(ridge, str):
        return scaled(k, ridge * len(k) / len(y))
    if len(k) > _ROWS:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(len(k), generator=generator)[:_SAMPLE].sort().values.to(k.device)
        k, y = k[rows][:, rows], y[rows]
    return gcv(k, y) if ridge == "gcv" else evidence(k, y)


def judged(rows: int) -> int:
    """Rows of ``K`` that a rule judges."""
    return _SAMPLE if rows > _ROWS else rows


def _spectrum(k: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(k.double())
    return values.clamp_min(0), vectors.T @ y.to(k.device).double()


def _least(cost: Callable[[float], float], k: Tensor) -> float:
    unit = scaled(k, 1.0)
    grid = torch.logspace(0, 1, _GRID, base=_HIGHEST / _LOWEST, dtype=torch.float64)
    return min((float(one) * _LOWEST * unit for one in grid), key=cost)
