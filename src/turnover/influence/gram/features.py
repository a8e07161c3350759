"""Vectors of all training instances, rounded to half precision: in memory, or in a temporary file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover.io.files import writing_temporary

_CHUNK = 2**26
"""Bytes of the float32 vectors of a chunk."""


@dataclass(frozen=True)
class Rounded:
    """Vectors in half precision.

    Attributes:
        values: float16 (some, directions, width).
        scales: their factors, float32 (some, directions).
    """

    values: Tensor
    scales: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> Rounded:
        """Round vectors, float32 (some, directions, width)."""
        scales = vectors.abs().amax(dim=2).clamp_min(torch.finfo(torch.float32).tiny)
        return cls((vectors / scales[:, :, None]).half(), scales)

    def whole(self) -> Tensor:
        """The vectors, float32."""
        return self.values.float() * self.scales[:, :, None]


class Features:
    """Vectors float32 (instances, directions, width), kept as float16 with a scale for each.

    They are read and not mapped, as pages of a mapped file count as this process's memory.

    Args:
        instances: number of them.
        directions: vectors of each.
        width: of a vector.
        memory: bytes up to which they stay in memory.
    """

    def __init__(self, instances: int, directions: int, width: int, memory: int) -> None:
        self._shape = directions, width
        self._scales = torch.zeros((instances, directions))
        self._bytes = 2 * directions * width
        self._file: IO[bytes] | None = None
        self._values = np.empty((0, directions, width), dtype=np.float16)
        if instances * self._bytes <= memory:
            self._values = np.zeros((instances, directions, width), dtype=np.float16)
        else:
            with writing_temporary() as place:
                self._file = tempfile.TemporaryFile(dir=place, prefix="turnover-gram-")  # noqa: SIM115
                self._file.truncate(instances * self._bytes)

    def __len__(self) -> int:
        return len(self._scales)

    def put_at(self, positions: Tensor, vectors: Rounded) -> None:
        """Keep vectors of instances at positions, int64 (some,) on the CPU."""
        self._scales[positions] = vectors.scales
        kept: NDArray[np.float16] = vectors.values.numpy()
        if self._file is None:
            self._values[positions.numpy()] = kept
        else:
            with writing_temporary():
                for start, stop in _runs(positions):
                    self._file.seek(int(positions[start]) * self._bytes)
                    self._file.write(kept[start:stop].tobytes())

    def put(self, start: int, rounded: NDArray[np.float16], scales: NDArray[np.float32]) -> None:
        """Keep vectors of neighboring instances as :meth:`rounded` gave them."""
        stop = start + len(rounded)
        self._scales[start:stop] = torch.from_numpy(scales)
        if self._file is None:
            self._values[start:stop] = rounded
        else:
            with writing_temporary():
                self._file.seek(start * self._bytes)
                self._file.write(rounded.tobytes())

    def rounded(self, start: int, stop: int) -> tuple[NDArray[np.float16], NDArray[np.float32]]:
        """Vectors float16 (stop - start, directions, width) of neighboring instances, and their scales."""
        if self._file is None:
            values = self._values[start:stop]
        else:
            self._file.seek(start * self._bytes)
            found = self._file.read((stop - start) * self._bytes)
            values = np.frombuffer(bytearray(found), np.float16).reshape(-1, *self._shape)
        return values, self._scales[start:stop].numpy()

    def read(self, start: int, stop: int) -> Tensor:
        """Vectors float32 (stop - start, directions, width) of neighboring instances."""
        values, scales = self.rounded(start, stop)
        return torch.from_numpy(values).float() * torch.from_numpy(scales)[:, :, None]

    def take(self, positions: Tensor) -> Tensor:
        """Vectors float32 (some, directions, width) of instances at increasing positions."""
        places = positions.cpu()
        if self._file is None:
            values = self._values[places.numpy()]
        else:
            found = bytearray()
            for start, stop in _runs(places):
                self._file.seek(int(places[start]) * self._bytes)
                found += self._file.read((stop - start) * self._bytes)
            values = np.frombuffer(found, np.float16).reshape(-1, *self._shape)
        return torch.from_numpy(values).float() * self._scales[places][:, :, None]

    def chunks(self) -> Iterator[slice]:
        """Slices of neighboring instances, for one pass."""
        step = chunk_of(*self._shape)
        for start in range(0, len(self), step):
            yield slice(start, min(start + step, len(self)))


def chunk_of(directions: int, width: int) -> int:
    """Instances whose vectors are read together."""
    return max(1, _CHUNK // (4 * directions * width))


def _runs(positions: Tensor) -> Iterator[tuple[int, int]]:
    """Starts and stops of runs of neighboring positions."""
    if not len(positions):
        return
    ends = ((positions[1:] - positions[:-1]) != 1).nonzero()[:, 0] + 1
    bounds = [0, *ends.tolist(), len(positions)]
    yield from pairwise(bounds)
