"""Blocks of rows, and the Gram matrix of their gradients, part by part of the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from turnover.batches import own_memory
from turnover.errors import InputError
from turnover.influence.gram.capture import Rows
from turnover.influence.gram.factors import Factors, join

_ROWS = 1024
"""Rows of a block: enough for matrix products at full speed."""
_BYTES = 2**28
"""Bytes of a block; several are in memory at once."""
_PANEL = 4096
"""Rows whose inner products are summed over all parts before they are written."""
_GROUP = 2**27
"""Bytes of the gradients by one part that are in memory at once, twice."""
_ENOUGH = 256
"""Rows of gradients that are multiplied as they are, without a copy of them beside others."""


@dataclass(frozen=True)
class Piece:
    """Gradients of neighboring rows by one part of the network; ``start`` is the first row."""

    part: str
    start: int
    factors: Factors

    @property
    def rows(self) -> slice:
        """All of its rows."""
        return slice(self.start, self.start + len(self.factors))


@dataclass(frozen=True)
class Block:
    """Gradients of ``rows`` rows, in pieces grouped by part: not every part runs for all rows."""

    pieces: list[Piece]
    rows: int

    @property
    def device(self) -> torch.device:
        """Device of the gradients."""
        found = (next(iter(piece.factors.tensors().values())).device for piece in self.pieces)
        return next(found, torch.device("cpu"))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(piece.factors.nbytes for piece in self.pieces)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by part."""
        found: dict[str, int] = {}
        for piece in self.pieces:
            found[piece.part] = found.get(piece.part, 0) + piece.factors.nbytes
        return found

    def of(self, part: str) -> list[Piece]:
        """The pieces of one part."""
        return [piece for piece in self.pieces if piece.part == part]

    def own_memory(self) -> Block:
        """The same, laid out as a copy elsewhere would be: else products may have other bits."""
        return Block([_own_memory(piece) for piece in self.pieces], self.rows)

    def add_gram(self, other: Block, out: Tensor) -> None:
        """Add the inner products with the gradients of another block to ``out`` (rows, other rows)."""
        for one in self.pieces:
            for two in other.of(one.part):
                one.factors.add_gram(two.factors, out[one.rows, two.rows])


def _own_memory(piece: Piece) -> Piece:
    tensors = {name: own_memory(values) for name, values in piece.factors.tensors().items()}
    return replace(piece, factors=replace(piece.factors, **tensors))


def check_finite(products: Tensor) -> None:
    """Refuse inner products that are beyond float32."""
    if not bool(torch.isfinite(products).all()):
        raise InputError(
            "the inner products of the training instances' gradients are beyond float32: scale the "
            "objective down"
        )


class Size(NamedTuple):
    """Number of gradients, and their bytes."""

    gradients: int
    bytes: int


def size_of(rows: Sequence[Rows]) -> Size:
    """Size of the rows of some batches."""
    size = sum(part.nbytes for one in rows for part in one.parts.values())
    return Size(sum(one.gradients for one in rows), size)


def fills(sizes: Iterable[Size]) -> bool:
    """Whether gradients of some sizes together are enough for a block."""
    gradients, total = (sum(one) for one in zip(*sizes, strict=True))
    return bool(gradients >= _ROWS or total >= _BYTES)


def is_full(rows: Sequence[Rows]) -> bool:
    """Whether the rows of some batches are enough for a block."""
    return fills([size_of(rows)])


def block_of(every: Sequence[Rows]) -> Block:
    """One block of the rows of several batches; neighboring pieces are joined where they can be."""
    pieces: dict[str, list[Piece]] = {}
    row = 0
    for rows in every:
        for name, factors in rows.parts.items():
            pieces.setdefault(name, []).append(Piece(name, row, factors))
        row += rows.gradients
    return Block([one for parts in pieces.values() for one in _joined(parts)], row)


def _joined(pieces: Sequence[Piece], *, enough: float = math.inf) -> list[Piece]:
    """The pieces of one part, with neighbors as one, but for those that are ready and have enough rows."""
    runs: list[list[Piece]] = []
    for piece in pieces:
        last = runs[-1][-1] if runs else None
        if (
            last is not None
            and piece.start == last.start + len(last.factors)
            and not (last.factors.ready and len(last.factors) >= enough)
            and last.factors.joins(piece.factors)
        ):
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return [replace(run[0], factors=join([one.factors for one in run])) for run in runs]


def gram_of(
    blocks: Sequence[Block], out: Tensor, done: Callable[[int], None] = lambda _: None
) -> None:
    """Fill ``out`` (rows, rows) with the inner products of all rows; each pair is computed once.

    Args:
        blocks: of the rows.
        out: is filled.
        done: called with the number of entries just filled.
    """
    panels = _panels(blocks)
    for i, (rows, one) in enumerate(panels):
        for columns, other in panels[: i + 1]:
            tile = _products(one, other, done)
            out[rows, columns] = tile
            out[columns, rows] = tile.T


def cross_of(block: Block, blocks: Sequence[Block], rows: int) -> Tensor:
    """Inner products of the rows of a block with all ``rows`` of some blocks: float32."""
    out = torch.zeros((block.rows, rows), device=block.device)
    for columns, other in _panels(blocks):
        out[:, columns] = _products([block], other)
    return out


def _panels(blocks: Sequence[Block]) -> list[tuple[slice, list[Block]]]:
    """Neighboring blocks with all of their rows."""
    found: list[tuple[slice, list[Block]]] = []
    row = 0
    for block in blocks:
        last, many = found[-1] if found else (slice(0, 0), [])
        stop = row + block.rows
        if found and stop - last.start <= _PANEL:
            found[-1] = slice(last.start, stop), [*many, block]
        else:
            found.append((slice(row, stop), [block]))
        row = stop
    return found


def _products(
    one: Sequence[Block], other: Sequence[Block], done: Callable[[int], None] = lambda _: None
) -> Tensor:
    """Inner products of the rows of some blocks with those of others, one part after the other.

    Of a part many more rows fit into memory than of all of them, and the explicit gradients that products
    are made of are made once for all of these rows. Of rows with one another, each pair is computed once.
    """
    same = one is other
    shape = sum(block.rows for block in one), sum(block.rows for block in other)
    tile = torch.zeros(shape, device=one[0].device)
    parts = dict.fromkeys(part for block in one for part in block.sizes)
    entries = shape[0] * shape[1] * (1 if same else 2)
    for number, part in enumerate(parts):
        groups = _groups(other, part)
        for index, group in enumerate(groups if same else _groups(one, part)):
            ours = _loaded(group, part)
            for count, across in enumerate(groups[: index + 1] if same else groups):
                theirs = ours if same and count == index else _loaded(across, part)
                for left, right in product(ours, theirs):
                    if theirs is not ours or left.start > right.start:
                        left.factors.add_gram(right.factors, tile[left.rows, right.rows])
                    elif left is right:
                        left.factors.add_own_gram(tile[left.rows, left.rows])
        done(entries * (number + 1) // len(parts) - entries * number // len(parts))
    if same:
        below = tile.tril(-1)
        tile.tril_().add_(below.T)
    return tile


_Placed = tuple[int, Block]
"""A block and its first row."""


def _groups(blocks: Sequence[Block], part: str) -> list[list[_Placed]]:
    """Blocks whose gradients by one part are in memory together."""
    found: list[list[_Placed]] = []
    row, size = 0, _GROUP
    for block in blocks:
        if part in block.sizes:
            size += block.sizes[part]
            if size > _GROUP:
                found.append([])
                size = block.sizes[part]
            found[-1].append((row, block))
        row += block.rows
    return found


def _loaded(group: Sequence[_Placed], part: str) -> list[Piece]:
    pieces = [replace(one, start=row + one.start) for row, block in group for one in block.of(part)]
    return _joined(pieces, enough=_ENOUGH)
