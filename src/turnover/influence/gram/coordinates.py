"""Coordinates of gradients, by their inner products with those of landmarks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turnover.errors import InputError
from turnover.influence.gram.features import Rounded
from turnover.influence.gram.kernel import Block, check_finite, cross_of, gram_of
from turnover.influence.gram.ridge import choose

_SMALLEST = 1e-6
"""Smallest eigenvalue, in the largest, of the landmarks' inner products: below is rounding error."""
EVERY = slice(None)
"""All gradients of an instance."""
_STRIP = 32
"""Instances whose inner products with one another are computed at once."""


@dataclass(frozen=True)
class Basis:
    """What coordinates are, and the ridge in them.

    Attributes:
        map: from inner products with the landmarks' gradients to coordinates, float32 (gradients, width).
        ridge: lambda.
    """

    map: Tensor
    ridge: float


def basis_of(
    landmarks: list[Block], ridge: float | str, costs: Tensor, holding: slice = EVERY
) -> Basis:
    """Coordinates in which the landmarks' own inner products are the identity.

    Args:
        landmarks: blocks of their gradients.
        ridge: see :func:`turnover.influence.gram.ridge.choose`.
        costs: objective of the landmarks, float32 (landmarks,).
        holding: the gradients of an instance that hold the network, by which the ridge is scaled.

    Raises:
        InputError: all gradients are 0, or their products are beyond float32.
    """
    size = sum(block.rows for block in landmarks)
    products = torch.zeros((size, size), device=landmarks[0].device)
    gram_of(landmarks, products)
    diagonal = products.diagonal()
    check_finite(diagonal)
    if not float(diagonal.max()) > 0:
        raise InputError(
            "the objective of no landmark depends on any trained parameter: all gradients are 0; check "
            "the model, or give more landmarks"
        )
    values, vectors = torch.linalg.eigh(products.double())
    large = values > _SMALLEST * values[-1]
    # In the order in which a store gives it back: by columns, products may have other bits.
    mapped = (vectors[:, large] / values[large].sqrt()).float().contiguous()
    if holding == EVERY or isinstance(ridge, str):
        return Basis(mapped, choose(ridge, products, costs))
    held = diagonal.view(len(costs), -1)[:, holding]
    return Basis(mapped, ridge * float(held.double().mean()))


@dataclass(frozen=True)
class Taken:
    """What is kept of some training instances, on the CPU.

    Attributes:
        vectors: coordinates of their gradients (instances, directions, width).
        own: inner products of the gradients of each, float32 (instances, directions, directions).
        inverse: of what the vectors miss of them, plus the ridge, likewise.
        weights: of the directions, float32 (instances, directions); ``None``: 1.
        residuals: 1 minus the probability of the label, float32 (instances,); ``None``: not wanted.
    """

    vectors: Rounded
    own: Tensor
    inverse: Tensor
    weights: Tensor | None
    residuals: Tensor | None


class Coordinates:
    """Makes coordinates of gradients by one network.

    Args:
        landmarks: blocks of the landmarks' gradients.
        basis: what coordinates are.
        directions: gradients of a training instance.

    Attributes:
        basis: what coordinates are.
        directions: gradients of a training instance.
        holding: those of them that hold the network.
    """

    holding = EVERY

    def __init__(self, landmarks: Sequence[Block], basis: Basis, directions: int) -> None:
        self.basis = Basis(basis.map.to(landmarks[0].device), basis.ridge)
        self.directions = directions
        self._landmarks, self._size = landmarks, sum(block.rows for block in landmarks)

    @property
    def device(self) -> torch.device:
        """Of the gradients."""
        return self.basis.map.device

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self.basis.map.shape[1]

    @property
    def ridge(self) -> float:
        """Lambda."""
        return self.basis.ridge

    def of(self, block: Block) -> Tensor:
        """Coordinates of the gradients of a block: float32 (rows, width)."""
        found: Tensor = cross_of(block, self._landmarks, self._size) @ self.basis.map
        return found

    def of_landmarks(self) -> Tensor:
        """Coordinates of the landmarks: float32 (gradients, width)."""
        return torch.cat([self.of(block) for block in self._landmarks])

    def with_landmarks(self, change: Callable[[Block], Block]) -> Coordinates:
        """The same, with the blocks of the landmarks in another place."""
        return type(self)([change(one) for one in self._landmarks], self.basis, self.directions)

    def take(self, block: Block, weights: Tensor | None, residuals: Tensor | None) -> Taken:
        """What is kept of training instances.

        Args:
            block: their gradients, those of each next to one another.
            weights: see :class:`Taken`.
            residuals: likewise.

        Raises:
            InputError: inner products are beyond float32.
        """
        own = _own_products(block, self.directions)
        check_finite(own)
        kept = Rounded.of(self.of(block).view(len(own), self.directions, -1).cpu())
        vectors = kept.whole().to(self.device)
        rest = own - vectors @ vectors.mT
        inverse = self._inverse((rest + rest.mT).double() / 2)
        beside = (None if one is None else one.cpu() for one in (weights, residuals))
        return Taken(kept, own.cpu(), inverse.float().cpu(), *beside)

    def _inverse(self, rest: Tensor) -> Tensor:
        """What is kept as ``V`` of remainders ``R``: float64 (some, directions, directions)."""
        return inverted(rest, self.ridge)


def inverted(values: Tensor, ridge: float) -> Tensor:
    """``(values + ridge)^-1`` of symmetric matrices, whose negative eigenvalues are rounding errors."""
    sizes, turn = torch.linalg.eigh(values)
    found: Tensor = (turn / (sizes.clamp_min(0) + ridge)[..., None, :]) @ turn.mT
    return found


def _own_products(block: Block, directions: int) -> Tensor:
    """Inner products of the gradients of each instance: float32 (instances, directions, directions)."""
    found = torch.zeros((block.rows, directions), device=block.device)
    step = _STRIP * directions
    for piece in block.pieces:
        for start in range(0, len(piece.factors), step):
            part = piece.factors.rows(start, min(start + step, len(piece.factors)))
            square = torch.zeros((len(part), len(part)), device=block.device)
            part.add_gram(part, square)
            count = len(part) // directions
            pairs = square.view(count, directions, count, directions).diagonal(dim1=0, dim2=2)
            first = piece.start + start
            found[first : first + len(part)] += pairs.permute(2, 0, 1).flatten(0, 1)
    return found.view(-1, directions, directions)
