"""Blocks of rows, and the Gram matrix of their gradients, part by part of the network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turnover.influence.gram.capture import Rows
from turnover.influence.gram.factors import Factors, join

_ROWS = 1024
"""Rows of a block: enough for matrix products at full speed."""
_BYTES = 2**28
"""Bytes of a block; several are in memory at once."""


@dataclass(frozen=True)
class Piece:
    """Gradients of neighboring rows by one part of the network; ``start`` is the first row."""

    part: str
    start: int
    factors: Factors


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

    def add_gram(self, other: Block, out: Tensor) -> None:
        """Add the inner products with the gradients of another block to ``out`` (rows, other rows)."""
        for one in self.pieces:
            for two in other.pieces:
                if one.part == two.part:
                    rows = slice(one.start, one.start + len(one.factors))
                    columns = slice(two.start, two.start + len(two.factors))
                    one.factors.add_gram(two.factors, out[rows, columns])


def is_full(rows: Sequence[Rows]) -> bool:
    """Whether the rows of some batches are enough for a block."""
    size = sum(part.nbytes for one in rows for part in one.parts.values())
    return sum(one.gradients for one in rows) >= _ROWS or size >= _BYTES


def block_of(every: Sequence[Rows]) -> Block:
    """One block of the rows of several batches; neighboring pieces are joined."""
    runs: dict[str, list[tuple[int, list[Factors]]]] = {}
    row = 0
    for rows in every:
        for name, factors in rows.parts.items():
            parts = runs.setdefault(name, [])
            if parts and row == parts[-1][0] + sum(map(len, parts[-1][1])):
                parts[-1][1].append(factors)
            else:
                parts.append((row, [factors]))
        row += rows.gradients
    found = ((name, start, run) for name, parts in runs.items() for start, run in parts)
    return Block([Piece(name, start, join(run)) for name, start, run in found], row)


def gram_of(
    blocks: Sequence[Block], out: Tensor, done: Callable[[int], None] = lambda _: None
) -> None:
    """Fill ``out`` (rows, rows) with the inner products of all rows; each pair is computed once.

    Args:
        blocks: of the rows.
        out: is filled.
        done: called with the number of entries just filled.
    """
    row = 0
    for i in range(len(blocks)):
        one = blocks[i]
        column = 0
        for j in range(i + 1):
            other = one if j == i else blocks[j]
            tile = torch.zeros((one.rows, other.rows), device=one.device)
            one.add_gram(other, tile)
            out[row : row + one.rows, column : column + other.rows] = tile
            out[column : column + other.rows, row : row + one.rows] = tile.T
            column += other.rows
            done(one.rows * other.rows * (1 if j == i else 2))
        row += one.rows


def cross_of(block: Block, blocks: Sequence[Block], rows: int) -> Tensor:
    """Inner products of the rows of a block with all ``rows`` of some blocks: float32."""
    out = torch.zeros((block.rows, rows), device=block.device)
    start = 0
    for i in range(len(blocks)):  # one block from disk at a time
        other = blocks[i]
        block.add_gram(other, out[:, start : start + other.rows])
        start += other.rows
    return out
