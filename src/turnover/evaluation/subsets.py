"""Random subsets of the training instances, and a manifest of them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.io.files import replacing
from turnover.io.parsing import convert, damage, read_object

_FORMAT = "turnover subsets, version 1"
_MOST = 2**33


@dataclass(frozen=True)
class Subsets:
    """Subsets of the training instances.

    Attributes:
        keep: bool (subsets, train), True = the instance is in the subset.
        fraction: share of the instances in each; ``None`` if they were not drawn.
        seed: seed of the draw; ``None`` if they were not drawn.

    Raises:
        InputError: ``keep`` is not a bool matrix, or a subset is empty.
    """

    keep: NDArray[np.bool_]
    fraction: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.keep.ndim != 2 or self.keep.dtype != np.bool_:
            raise InputError(
                f"subsets: keep must be bool (subsets, train), got {self.keep.dtype} {self.keep.shape}"
            )
        if not self.keep.any(axis=1).all():
            empty = int(np.argmin(self.keep.any(axis=1)))
            raise InputError(f"subset {empty} is empty: nothing can be trained on it")

    def __len__(self) -> int:
        return len(self.keep)

    @property
    def sha256(self) -> str:
        """Hash of the membership: 64 hexadecimal digits."""
        digest = hashlib.sha256(f"{_FORMAT}\0{self.keep.shape}\0".encode())
        digest.update(np.packbits(self.keep).tobytes())
        return digest.hexdigest()

    def manifest(self) -> dict[str, Any]:
        """Return the subsets as JSON values, with the hash that :meth:`read` checks."""
        return {
            "format": _FORMAT,
            "train": self.keep.shape[1],
            "fraction": self.fraction,
            "seed": self.seed,
            "indices": [np.flatnonzero(row).tolist() for row in self.keep],
            "sha256": self.sha256,
        }

    def write(self, path: str | Path) -> None:
        """Write the manifest as JSON, atomically."""
        with replacing(Path(path)) as draft:
            draft.write_text(json.dumps(self.manifest()) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: str | Path) -> Subsets:
        """Read a manifest.

        Raises:
            InputError: no such file, another format, or indices that do not match their hash.
        """
        values = read_object(Path(path))
        if values.get("format") != _FORMAT:
            raise InputError(f"{path}: format {values.get('format')!r} is not {_FORMAT!r}")
        train = convert(values.get("train"), int, f"{path}: train")
        indices = convert(values.get("indices"), list[list[int]], f"{path}: indices")
        # Bounds the memory that a corrupt number of instances would take.
        if not 0 < train <= _MOST or len(indices) * train > _MOST:
            raise InputError(f"{path}: damaged, {len(indices)} subsets of {train} instances")
        with damage(path):
            keep = np.zeros((len(indices), train), dtype=np.bool_)
            for row, members in zip(keep, indices, strict=True):
                row[np.asarray(members, dtype=np.int64)] = True
            fraction, seed, stored = (values[name] for name in ("fraction", "seed", "sha256"))
        try:
            subsets = cls(keep, fraction, seed)
        except InputError as error:
            raise InputError(f"{path}: damaged: {error}") from error
        if subsets.sha256 != stored:
            raise InputError(
                f"{path}: its indices have the hash {subsets.sha256}, not {stored}: the manifest was "
                f"changed after it was written, or is damaged"
            )
        return subsets


def draw_subsets(train: int, count: int, *, fraction: float = 0.5, seed: int = 0) -> Subsets:
    """Draw independent subsets of one size, each without replacement.

    Args:
        train: number of training instances.
        count: number of subsets, >= 1.
        fraction: share of the instances in each; ``round(fraction * train)`` of them.
        seed: seed of the draw.

    Raises:
        InputError: no subsets, or a fraction that leaves none or all of the instances.
    """
    size = round(fraction * train)
    if count < 1 or not 0 < size < train:
        raise InputError(
            f"{count} subsets of {size} of {train} instances cannot be drawn: count must be >= 1, and "
            f"fraction {fraction} must leave some instances, and not all"
        )
    generator = np.random.default_rng(seed)
    keep = np.zeros((count, train), dtype=np.bool_)
    for row in keep:
        row[generator.choice(train, size, replace=False)] = True
    return Subsets(keep, fraction, seed)
