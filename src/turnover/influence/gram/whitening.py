"""Whitening: gradients in a metric in which all directions of a layer weigh about the same.

Inner products are dominated by the few directions that most inputs, and most errors, of a layer share. With
``a`` the inputs and ``b`` the gradients of the outputs of a layer's tokens, ``A = E[a a']`` over tokens and
``B = E[b b']``, summed over the tokens of a row, each gradient ``b a'`` becomes ``W_B' b a' W_A``, where
``W W' = (M + damping mean(eigenvalue) I)^-1``. This is the inverse of K-FAC's curvature (Martens and Grosse
2015) as a metric of the kernel, which keeps its factored form. The numbers of tables of words, and of layers
without two sides (norms), are divided by the root mean square of their own gradients over rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from turnover.errors import InputError
from turnover.influence.gram.capture import Rows
from turnover.influence.gram.disk import Blocks
from turnover.influence.gram.kernel import Block, Piece
from turnover.influence.gram.sides import Maps, Moments, Numbers


class Whitening:
    """Second moments of the training set by one network, and the maps that follow from them.

    Args:
        damping: in mean eigenvalues of the moments.
    """

    def __init__(self, damping: float) -> None:
        self._damping = damping
        self._moments: dict[str, Moments] = {}
        self._mixed: set[str] = set()
        self._maps: dict[str, Maps] = {}
        self._rows = 0

    def add(self, every: Iterable[Rows]) -> None:
        """Take in the moments of some rows, before their gradients take their cheapest form."""
        for rows in every:
            self._rows += rows.gradients
            for name, factors in rows.parts.items():
                found = factors.moments()
                known = self._moments.setdefault(name, found)
                if type(known) is not type(found):
                    self._mixed.add(name)
                elif known is not found:
                    known.add(found)

    def finish(self, blocks: Blocks) -> None:
        """Whiten the blocks of the training set."""
        for name in self._mixed:
            self._moments[name] = _numbers(blocks, name)
        while self._moments:  # a large model's are not held beside all maps
            name, moments = self._moments.popitem()
            try:
                self._maps[name] = moments.maps(self._damping, self._rows)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise InputError(
                    f"the second moments of {name or 'the model'!r} have no inverse at "
                    f"whiten={self._damping:g}: give a larger one, or scale the objective down if it is "
                    f"beyond 1e15"
                ) from error
        blocks.replace(self._whitened)

    def whitened(self, block: Block) -> Block:
        """A block in the metric."""
        return Block([self._whitened(piece) for piece in block.pieces], block.rows)

    def _whitened(self, piece: Piece) -> Piece:
        """A piece in the metric; of a part that no training instance reached as it is."""
        maps = self._maps.get(piece.part)
        return piece if maps is None else replace(piece, factors=piece.factors.whitened(maps))


def _numbers(blocks: Blocks, part: str) -> Numbers:
    """Of each number alone, for a part whose gradients have two sides in some batches only."""
    pieces = (piece for block in blocks for piece in block.of(part))
    squares = [piece.factors.explicit().square().sum(dim=0) for piece in pieces]
    return Numbers(torch.stack(squares).sum(dim=0))
