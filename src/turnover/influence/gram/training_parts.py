"""Gradients of the training set, some neighboring batches at a time, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.influence.gram.capture import Capture, Rows
from turnover.influence.gram.coordinates import Coordinates, Taken
from turnover.influence.gram.kernel import Block, Size, block_of, cross_of, fills, size_of
from turnover.influence.gram.masks import MaskCapture
from turnover.influence.gram.whitening import Whitening
from turnover.influence.halving import Halving

Given = tuple[Batch, Tensor]
"""A batch of training instances, and their positions, int64 (rows,)."""
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Part:
    """Gradients of neighboring training batches by every network, and the instances' positions.

    Attributes:
        positions: int64 (instances,).
        blocks: by network.
        rows: of the batches, likewise.
        sizes: of each batch, by network.
    """

    positions: Tensor
    blocks: list[Block]
    rows: list[list[Rows]]
    sizes: list[list[Size]]


class Expected:
    """Sizes of the gradients of batches before they are computed: as those of batches of the same shape."""

    def __init__(self) -> None:
        self._known: dict[object, tuple[int, int, list[Size]]] = {}
        self._last: object = None

    def learn(self, batch: Batch, sizes: list[Size]) -> None:
        """Note the sizes of a batch's gradients, by network."""
        self._last = _shape(batch)
        self._known[self._last] = _numbers(batch), len(batch), sizes

    def of(self, batch: Batch) -> list[Size]:
        """Sizes by network; of a shape that is new by the numbers in the inputs, as of the last batch."""
        known = self._known.get(_shape(batch))
        numbers, rows, sizes = known or self._known[self._last]
        more, less = (len(batch), rows) if known else (_numbers(batch), numbers)
        return [Size(s.gradients * len(batch) // rows, s.bytes * more // less) for s in sizes]


def are_full(sizes: Sequence[Sequence[Size]]) -> bool:
    """Whether batches of some sizes, by network, make a part."""
    return any(fills(one) for one in zip(*sizes, strict=True))


def _shape(batch: Batch) -> object:
    return tuple((name, value.shape[1:]) for name, value in batch.by_rows())


def _numbers(batch: Batch) -> int:
    return max(1, sum(value.numel() for _, value in batch.by_rows()))


class Gradients:
    """Gradients of training batches by all networks.

    Args:
        captures: of the networks.
        halving: bounds of their forwards.

    Attributes:
        captures: of the networks.
        halving: bounds of their forwards.
        whitenings: of their gradients; none: they stay as they are.
        expected: sizes of the gradients of batches.
    """

    def __init__(self, captures: Sequence[Capture | MaskCapture], halving: Halving) -> None:
        self.captures, self.halving = captures, halving
        self.whitenings: Sequence[Whitening] = ()
        self.expected = Expected()

    def of(
        self,
        given: Iterable[Given],
        moments: Sequence[Whitening] = (),
        done: Callable[[int], None] = lambda _: None,
    ) -> Iterator[Part]:
        """The gradients, as many batches at a time as make a block.

        Args:
            given: batches.
            moments: take in the moments of the gradients, by network.
            done: called with the number of further instances.
        """
        positions: list[Tensor] = []
        rows: list[list[Rows]] = [[] for _ in self.captures]
        sizes: list[list[Size]] = []
        for batch, places in given:
            batch = batch.own_memory()
            positions.append(places)
            sizes.append([])
            for number, (every, capture) in enumerate(zip(rows, self.captures, strict=True)):
                found = self.halving.by_rows(batch, partial(capture.rows, training=True))
                if moments:
                    moments[number].add(found)
                cheapest = [one.cheapest() for one in found]
                sizes[-1].append(size_of(cheapest))
                every += cheapest
            self.expected.learn(batch, sizes[-1])
            if are_full(sizes):
                yield Part(torch.cat(positions), self.blocks(rows), rows, sizes)
                positions, rows, sizes = [], [[] for _ in self.captures], []
            done(len(batch))
        if positions:
            yield Part(torch.cat(positions), self.blocks(rows), rows, sizes)

    def blocks(self, rows: Sequence[Sequence[Rows]]) -> list[Block]:
        """Rows of each network as a block, whitened."""
        blocks = [block_of(one) for one in rows]
        for i, whitening in enumerate(self.whitenings):
            blocks[i] = whitening.whitened(blocks[i])
        return blocks


class Work(Protocol[T_co]):
    """What is made of parts of the training set, by network."""

    def __call__(self, part: Part) -> Sequence[T_co]:
        """What is made of one."""

    def with_blocks(self, change: Callable[[Block], Block]) -> Self:
        """The same work, with the blocks that it needs in another place."""


@dataclass(frozen=True)
class TakeIn:
    """Makes what is kept of training instances."""

    coordinates: Sequence[Coordinates]

    def __call__(self, part: Part) -> list[Taken]:
        """See :class:`Work`."""
        return [
            one.take(block, *_beside(rows))
            for one, block, rows in zip(self.coordinates, part.blocks, part.rows, strict=True)
        ]

    def with_blocks(self, change: Callable[[Block], Block]) -> TakeIn:
        """See :class:`Work`."""
        return TakeIn([one.with_landmarks(change) for one in self.coordinates])


@dataclass(frozen=True)
class Multiply:
    """Makes inner products of targets with training instances: float32 (targets, gradients)."""

    targets: Sequence[Block]

    def __call__(self, part: Part) -> list[Tensor]:
        """See :class:`Work`."""
        pairs = zip(self.targets, part.blocks, strict=True)
        return [cross_of(one, [block], block.rows) for one, block in pairs]

    def with_blocks(self, change: Callable[[Block], Block]) -> Multiply:
        """See :class:`Work`."""
        return Multiply([change(one) for one in self.targets])


def _beside(rows: Sequence[Rows]) -> tuple[Tensor | None, Tensor | None]:
    """Weights and residuals of several batches."""
    weights = [one.weights for one in rows if one.weights is not None]
    residuals = [one.residuals for one in rows if one.residuals is not None]
    return (torch.cat(one) if one else None for one in (weights, residuals))  # type: ignore[return-value]
