"""Blocks of rows, and the Gram matrix of their gradients, part by part of the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turnover.influence.gram.capture import Rows
from turnover.influence.gram.factors import Factors, join

BLOCK = 1024
"""Rows of a block: enough for matrix products to run at full speed."""


@dataclass(frozen=True)
class Block:
    """Gradients of rows by part of the network, in pieces, since not all rows come by all parts.

    Attributes:
        parts: for each part, the first row of each piece and the piece.
        rows: number of rows.
    """

    parts: dict[str, list[tuple[int, Factors]]]
    rows: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(piece.nbytes for pieces in self.parts.values() for _, piece in pieces)


def block_of(every: Sequence[Rows]) -> Block:
    """One block of the rows of several batches."""
    parts: dict[str, list[tuple[int, Factors]]] = {}
    start = 0
    for rows in every:
        for name, factors in rows.parts.items():
            parts.setdefault(name, []).append((start, factors))
        start += len(rows)
    joined = {name: _joined(pieces) for name, pieces in parts.items()}
    return Block(joined, start)


def _joined(pieces: list[tuple[int, Factors]]) -> list[tuple[int, Factors]]:
    """Neighbouring pieces as one."""
    runs: list[list[tuple[int, Factors]]] = []
    for start, piece in pieces:
        if runs and start == runs[-1][-1][0] + len(runs[-1][-1][1]):
            runs[-1].append((start, piece))
        else:
            runs.append([(start, piece)])
    return [(run[0][0], join([piece for _, piece in run])) for run in runs]


def add_gram(one: Block, other: Block, out: Tensor) -> None:
    """Add the inner products of the gradients of two blocks to ``out`` (rows, other rows)."""
    for name, pieces in one.parts.items():
        for start, piece in pieces:
            for other_start, other_piece in other.parts.get(name, ()):
                stop, other_stop = start + len(piece), other_start + len(other_piece)
                piece.add_gram(other_piece, out[start:stop, other_start:other_stop])


def gram_of(blocks: Sequence[Block], out: Tensor) -> None:
    """Fill ``out`` (rows, rows) with the inner products of all rows; each pair is worked out once."""
    starts = offsets(blocks)
    for i, (row, one) in enumerate(zip(starts, blocks, strict=True)):
        for column, other in zip(starts[: i + 1], blocks, strict=False):
            tile = out.new_zeros((one.rows, other.rows))
            add_gram(one, other, tile)
            out[row : row + one.rows, column : column + other.rows] = tile
            out[column : column + other.rows, row : row + one.rows] = tile.T


def cross_of(block: Block, blocks: Sequence[Block], like: Tensor) -> Tensor:
    """Inner products of the rows of a block with those of all blocks: float32 (rows, all rows)."""
    starts = offsets(blocks)
    total = sum(other.rows for other in blocks)
    out = like.new_zeros((block.rows, total), dtype=torch.float32)
    for start, other in zip(starts, blocks, strict=True):
        add_gram(block, other, out[:, start : start + other.rows])
    return out


def offsets(blocks: Sequence[Block]) -> list[int]:
    """First row of every block."""
    starts, start = [], 0
    for block in blocks:
        starts.append(start)
        start += block.rows
    return starts


def blocks_of(every: Iterator[Rows]) -> Iterator[Block]:
    """Blocks of some :data:`BLOCK` rows of the rows of small batches."""
    pending: list[Rows] = []
    count = 0
    for rows in every:
        pending.append(rows)
        count += len(rows)
        if count >= BLOCK:
            yield block_of(pending)
            pending, count = [], 0
    if pending:
        yield block_of(pending)
