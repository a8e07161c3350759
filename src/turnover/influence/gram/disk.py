"""What does not fit in memory: blocks of gradients and Gram matrices in a temporary folder.

Files are plain ``.npy`` arrays, and are removed with the object that made them.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from turnover.influence.gram.factors import Factors
from turnover.influence.gram.kernel import Block
from turnover.io.files import mapped, write_array, write_header, writing_temporary


@dataclass(frozen=True)
class Limits:
    """When to leave memory.

    Attributes:
        memory: bytes of the gradients of the training set, over all networks.
        rows: of the Gram matrix, one for each direction of each training instance, up to which it is
            in memory and factored; beyond, it is on disk and solved with by conjugate gradients.
        landmarks: rows that the preconditioner of these is made of.
    """

    memory: int = 2**31
    rows: int = 20_000
    landmarks: int = 1000


class Scratch:
    """A temporary folder, made when it is first needed."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._files = 0

    def matrix(self, rows: int) -> Tensor:
        """A float32 matrix (rows, rows) on disk.

        Raises:
            WriteError: there is no room for it.
        """
        path, shape = self._path(), (rows, rows)
        with writing_temporary(self._folder), path.open("w+b") as file:
            write_header(file, shape, np.float32)
            values = mapped(file, shape, np.float32)
        return torch.from_numpy(values)

    def save(self, values: Tensor) -> Path:
        """Write a tensor.

        Raises:
            WriteError: there is no room for it.
        """
        path, array = self._path(), values.cpu().numpy()
        with writing_temporary(self._folder):
            write_array(path, array.shape, array.dtype, [array])
        return path

    def _path(self) -> Path:
        if self._folder is None:
            with writing_temporary() as place:
                self._folder = Path(tempfile.mkdtemp(prefix="turnover-gram-", dir=place))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._files += 1
        return self._folder / f"{self._files}.npy"


@dataclass(frozen=True)
class _Stored:
    """A block without its tensors, and where these are."""

    skeleton: Block
    paths: dict[str, list[dict[str, Path]]]
    device: torch.device

    def load(self) -> Block:
        parts = {
            name: [
                (start, replace(piece, **{field: self._read(p) for field, p in paths.items()}))
                for (start, piece), paths in zip(pieces, self.paths[name], strict=True)
            ]
            for name, pieces in self.skeleton.parts.items()
        }
        return Block(parts, self.skeleton.rows)

    def _read(self, path: Path) -> Tensor:
        return torch.from_numpy(np.load(path, allow_pickle=False)).to(self.device)


class Blocks(Sequence[Block]):
    """Blocks, of which those beyond a number of bytes are on disk.

    Args:
        memory: the bytes.
        scratch: where the others go.
    """

    def __init__(self, memory: int, scratch: Scratch) -> None:
        self._left = memory
        self._scratch = scratch
        self._blocks: list[Block | _Stored] = []

    def append(self, block: Block) -> None:
        """One block more."""
        self._left -= block.nbytes
        self._blocks.append(block if self._left >= 0 else self._stored(block))

    @property
    def sizes(self) -> list[int]:
        """Rows of every block."""
        return [b.rows if isinstance(b, Block) else b.skeleton.rows for b in self._blocks]

    def __len__(self) -> int:
        return len(self._blocks)

    @overload
    def __getitem__(self, index: int) -> Block: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Block]: ...

    def __getitem__(self, index: int | slice) -> Block | Sequence[Block]:
        if isinstance(index, slice):
            raise TypeError("blocks are read one at a time")
        block = self._blocks[index]
        return block if isinstance(block, Block) else block.load()

    def _stored(self, block: Block) -> _Stored:
        paths: dict[str, list[dict[str, Path]]] = {}
        parts: dict[str, list[tuple[int, Factors]]] = {}
        device = torch.device("cpu")
        for name, pieces in block.parts.items():
            for start, piece in pieces:
                found = piece.tensors()
                device = next(iter(found.values())).device
                saved = {field: self._scratch.save(values) for field, values in found.items()}
                paths.setdefault(name, []).append(saved)
                empty = {field: values.new_empty(0) for field, values in found.items()}
                parts.setdefault(name, []).append((start, replace(piece, **empty)))
        return _Stored(Block(parts, block.rows), paths, device)
