"""Gradients and Gram matrices that do not fit in memory, in a temporary folder.

Files are plain ``.npy`` arrays, and are deleted with the object that wrote them.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnover.influence.gram.kernel import Block
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

    memory: int = 2**31
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


class _Stored:
    """A block whose tensors are on disk."""

    def __init__(self, block: Block, scratch: Scratch) -> None:
        self.rows = block.rows
        self._device = block.device
        self._pieces = []
        for piece in block.pieces:
            tensors = piece.factors.tensors()
            paths = {field: scratch.save(values) for field, values in tensors.items()}
            empty = {field: values.new_empty(0) for field, values in tensors.items()}
            self._pieces.append((replace(piece, factors=replace(piece.factors, **empty)), paths))

    def load(self) -> Block:
        pieces = []
        for piece, paths in self._pieces:
            tensors = {
                field: torch.from_numpy(np.load(path, allow_pickle=False)).to(self._device)
                for field, path in paths.items()
            }
            pieces.append(replace(piece, factors=replace(piece.factors, **tensors)))
        return Block(pieces, self.rows)


class Blocks(Sequence[Block]):
    """Blocks of gradients: the first in memory, the others on disk.

    Args:
        memory: bytes of those in memory.
        scratch: where the others go.
    """

    def __init__(self, memory: int, scratch: Scratch) -> None:
        self._left = memory
        self._scratch = scratch
        self._blocks: list[Block | _Stored] = []

    def append(self, block: Block) -> None:
        """Add a block."""
        self._left -= block.nbytes
        self._blocks.append(block if self._left >= 0 else _Stored(block, self._scratch))

    @property
    def sizes(self) -> list[int]:
        """Rows of every block."""
        return [block.rows for block in self._blocks]

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: Any) -> Any:
        block = self._blocks[index]
        return block.load() if isinstance(block, _Stored) else block
