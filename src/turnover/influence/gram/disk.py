"""Gradients and Gram matrices that do not fit in memory, in a temporary folder.

Files are plain ``.npy`` arrays, and are deleted with the object that wrote them.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnover.influence.gram.kernel import Block, Piece
from turnover.io.files import mapped, write_array, write_header, writing_temporary


@dataclass(frozen=True)
class Limits:
    """When to use the disk.

    Attributes:
        memory: bytes of the gradients of the training set, over all networks.
        rows: of the Gram matrix, one for each direction of each training instance, up to which it is
            in memory and factored; a larger one is on disk and solved with by conjugate gradients.
        landmarks: rows of the Gram matrix that their preconditioner is made of.
    """

    memory: int = 2**28
    rows: int = 20_000
    landmarks: int = 1000


class Scratch:
    """A temporary folder, created on first use."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._files = 0

    def matrix(self, rows: int) -> Tensor:
        """A float32 matrix (rows, rows) on disk."""
        path, shape = self._path(), (rows, rows)
        with writing_temporary(self._folder), path.open("w+b") as file:
            write_header(file, shape, np.float32)
            values = mapped(file, shape, np.float32)
        return torch.from_numpy(values)

    def save(self, values: Tensor) -> Path:
        """Write a tensor."""
        path, array = self._path(), values.cpu().numpy()
        with writing_temporary(self._folder):
            write_array(path, array.shape, array.dtype, [array])
        return path

    def _path(self) -> Path:
        if self._folder is None:
            with writing_temporary() as parent:
                self._folder = Path(tempfile.mkdtemp(prefix="turnover-gram-", dir=parent))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._files += 1
        return self._folder / f"{self._files}.npy"


class Elsewhere(Block):
    """A block whose tensors are not in this process's memory, and are fetched part by part."""

    def __init__(self, block: Block) -> None:
        pieces, places = [], []
        for part in block.sizes:
            for piece in block.of(part):
                tensors = piece.factors.tensors()
                places.append({field: self._put(values) for field, values in tensors.items()})
                empty = {field: values.new_empty(0) for field, values in tensors.items()}
                pieces.append(replace(piece, factors=replace(piece.factors, **empty)))
        super().__init__(pieces, block.rows)
        self._sizes = block.sizes
        self._places = places

    def _put(self, values: Tensor) -> Any:
        """Put a tensor there; returns its place."""
        raise NotImplementedError

    def _fetch(self, place: Any) -> Tensor:
        """Fetch it, on the CPU."""
        raise NotImplementedError

    @property
    def sizes(self) -> dict[str, int]:
        """See :class:`Block`."""
        return self._sizes

    def of(self, part: str) -> list[Piece]:
        """See :class:`Block`."""
        found = []
        for piece, places in zip(self.pieces, self._places, strict=True):
            if piece.part == part:
                tensors = {
                    field: self._fetch(place).to(self.device) for field, place in places.items()
                }
                found.append(replace(piece, factors=replace(piece.factors, **tensors)))
        return found


class _Stored(Elsewhere):
    """On disk."""

    def __init__(self, block: Block, scratch: Scratch) -> None:
        self._scratch = scratch
        super().__init__(block)

    def _put(self, values: Tensor) -> Path:
        return self._scratch.save(values)

    def _fetch(self, place: Path) -> Tensor:
        return torch.from_numpy(np.load(place, allow_pickle=False))

    def delete(self) -> None:
        """Delete the files."""
        for places in self._places:
            for path in places.values():
                path.unlink()


class Blocks(Sequence[Block]):
    """Blocks of gradients: the first in memory, the others on disk.

    Args:
        memory: bytes of those in memory.
        scratch: where the others go.
    """

    def __init__(self, memory: int, scratch: Scratch) -> None:
        self._left = memory
        self._scratch = scratch
        self._blocks: list[Block] = []

    def append(self, block: Block) -> None:
        """Add a block."""
        self._left -= block.nbytes
        stays = self._left >= 0
        self._blocks.append(block.own_memory() if stays else _Stored(block, self._scratch))

    def replace(self, change: Callable[[Piece], Piece]) -> None:
        """Replace all pieces by what is made of them; those on disk stay there."""
        for i, block in enumerate(self._blocks):
            pieces = [change(piece) for part in block.sizes for piece in block.of(part)]
            made = Block(pieces, block.rows)
            if isinstance(block, _Stored):
                self._blocks[i] = _Stored(made, self._scratch)
                block.delete()
            else:
                self._blocks[i] = made.own_memory()

    @property
    def sizes(self) -> list[int]:
        """Rows of every block."""
        return [block.rows for block in self._blocks]

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: Any) -> Any:
        return self._blocks[index]
