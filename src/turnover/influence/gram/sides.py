"""The two sides of a layer's gradients: second moments of each, and linear maps that whiten them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_WIDEST = 4096
"""Numbers of a side up to which its moments are those of all pairs, and not of each number alone."""


class Moments(ABC):
    """Sums of second moments over some rows."""

    @abstractmethod
    def add(self, other: Self) -> None:
        """Add those of other rows, of the same kind."""

    @abstractmethod
    def maps(self, damping: float, rows: int) -> Maps:
        """Maps after which the moments of both sides are the identity, but for damping.

        Args:
            damping: in mean eigenvalues.
            rows: of the training set, those that the layer did not run for among them.
        """


@dataclass
class Numbers(Moments):
    """Of gradients without sides: of each number alone.

    Attributes:
        squares: float32 (numbers,).
    """

    squares: Tensor

    def add(self, other: Self) -> None:
        """See :class:`Moments`."""
        self.squares += other.squares

    def maps(self, damping: float, rows: int) -> Maps:
        """See :class:`Moments`."""
        return Maps(None, whitening(self.squares[None] / rows, damping))


@dataclass
class Sides(Moments):
    """Of the inputs and of the gradients of the outputs.

    Attributes:
        inputs: of the inputs, over tokens: float32 (groups, width, width), or of each number alone
            (groups, width).
        back: of the gradients of the outputs, over rows, in the same way.
        tokens: count of those of ``inputs``.
        bias: whether the last input is that of a bias, 1.
    """

    inputs: Tensor
    back: Tensor
    tokens: int
    bias: bool = False

    def add(self, other: Self) -> None:
        """See :class:`Moments`."""
        self.inputs += other.inputs
        self.back += other.back
        self.tokens += other.tokens

    def maps(self, damping: float, rows: int) -> Maps:
        """See :class:`Moments`."""
        inputs = whitening(self.inputs / max(self.tokens, 1), damping)
        back = whitening(self.back / rows, damping)
        return Maps(inputs, back, bias=self.bias)


@dataclass(frozen=True)
class Maps:
    """Linear maps of both sides: each (groups, width, width), or factors (groups, width).

    Attributes:
        inputs: of the inputs; ``None``: there are no sides.
        back: of the gradients of the outputs, or of all numbers.
        bias: whether the last input is that of a bias.
    """

    inputs: Tensor | None
    back: Tensor
    bias: bool = False


def second_moment(values: Tensor) -> Tensor:
    """Sums over tokens: float32 (groups, width, width) or (groups, width) of (groups, tokens, width)."""
    if values.shape[2] > _WIDEST:
        return values.square().sum(dim=1)
    return values.mT @ values


def mapped(values: Tensor, by: Tensor) -> Tensor:
    """Tokens (rows, groups, tokens, width) after a map."""
    return values @ by if by.dim() == 3 else values * by[:, None]


def whitening(moments: Tensor, damping: float) -> Tensor:
    """A map ``W`` with ``W W' = (M + damping mean(eigenvalue) I)^-1``: float32."""
    if moments.dim() == 2:
        return (moments + damping * _positive(moments.mean(dim=1, keepdim=True))).rsqrt()
    # MPS knows no float64.
    wide = moments if moments.device.type == "mps" else moments.double()
    diagonal = wide.diagonal(dim1=1, dim2=2)
    diagonal.add_(damping * _positive(diagonal.mean(dim=1)[:, None]))
    identity = torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
    factor = torch.linalg.cholesky(wide)
    solved: Tensor = torch.linalg.solve_triangular(factor, identity.expand_as(wide), upper=False)
    return solved.mT.float()


def _positive(mean: Tensor) -> Tensor:
    """1 where no training instance has a gradient."""
    return torch.where(mean > 0, mean, 1.0)
