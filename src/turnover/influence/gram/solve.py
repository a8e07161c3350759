"""Solves with ``K + lambda I`` through a Cholesky factor."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

_CONDITION = 1e5
"""Condition number up to which float32 is accurate to some 1e-5 of the largest score."""


class Cholesky:
    """``(K + lambda I)^-1``, by its Cholesky factor, in float64 where float32 is too inaccurate.

    Args:
        k: float32 (rows, rows).
        ridge: lambda.
        block: rows of each instance.
    """

    def __init__(self, k: Tensor, ridge: float, *, block: int) -> None:
        condition = float(k.diagonal().sum()) / ridge  # at most, as no eigenvalue exceeds the trace
        exact = is_exact(condition) and k.device.type != "mps"
        system = k.double() if exact else k.clone()
        system.diagonal().add_(ridge)
        self._ridge = ridge
        self._block = block
        self._factor: Tensor = torch.linalg.cholesky(system)

    @property
    def nbytes(self) -> int:
        """Bytes of the factor."""
        return self._factor.numel() * self._factor.element_size()

    def rows(self, cross: Tensor) -> Tensor:
        """``cross (K + lambda I)^-1``: float32, of the shape (targets, rows) of ``cross``."""
        return torch.cholesky_solve(cross.T.to(self._factor.dtype), self._factor).T.float()

    @cached_property
    def leverage(self) -> Tensor:
        """Blocks on the diagonal of ``K (K + lambda I)^-1``: float32 (instances, block, block)."""
        inverse = torch.cholesky_inverse(self._factor)
        count = len(inverse) // self._block
        blocks = inverse.view(count, self._block, count, self._block).diagonal(dim1=0, dim2=2)
        identity = torch.eye(self._block, dtype=inverse.dtype, device=inverse.device)
        return (identity - self._ridge * blocks.permute(2, 0, 1)).float()


def is_exact(condition: float) -> bool:
    """Whether a system of a condition number is factored in float64."""
    return condition > _CONDITION
