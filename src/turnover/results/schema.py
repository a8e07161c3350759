"""What a result's ``zarr.json`` says of its arrays, checked before any array is opened.

Shapes and chunks are claims of the file: zarr could need more memory for them than a machine has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import numpy as np

from turnover.errors import InputError
from turnover.io.parsing import convert
from turnover.results.arrays import CODECS, DTYPES, Variable
from turnover.results.manifest import ATTRIBUTE, manifest_of

DESCRIBED = ("method", "objective", "sites", "network", "considered")
"""Attributes that every result has."""
_MAX_CHUNK_BYTES = 2**30
_MAX_CHUNKS = 2**28
_MAX_LENGTH = 2**48
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_DIMS = {
    "dense": ("target", "train"),
    "top": ("target", "rank"),
    "aggregate": ("train",),
    "self": ("train",),
    "columns": ("train", "target"),
}
"""Dimensions of the scores, by kind."""
_INTEGERS = frozenset({"train", "train_id", "significant", "helped", "hurt"})


@dataclass(frozen=True)
class _Attributes:
    method: str
    objective: str
    network: str
    sites: list[str]
    considered: int
    freedom: float = math.nan


class _Consolidated(TypedDict):
    metadata: dict[str, Any]


@dataclass(frozen=True)
class _Group:
    attributes: _Attributes
    consolidated_metadata: _Consolidated


class _Chunks(TypedDict):
    chunk_shape: list[int]


class _Grid(TypedDict):
    name: Literal["regular"]
    configuration: _Chunks


@dataclass(frozen=True)
class _Array:
    data_type: str
    codecs: list[dict[str, Any]]
    shape: list[int]
    chunk_grid: _Grid
    dimension_names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        codecs = {str(codec.get("name")) for codec in self.codecs}
        if self.data_type not in DTYPES or not codecs <= CODECS:
            raise ValueError(f"it is {self.data_type}, in {', '.join(sorted(codecs))}")
        dims, chunks = self.dimension_names, self.chunk_grid["configuration"]["chunk_shape"]
        if not len(dims) == len(self.shape) == len(chunks):
            raise ValueError("its dimensions, shape and chunks differ in number")
        if len(set(dims)) < len(dims):
            raise ValueError("it has one dimension twice")
        if not all(
            least <= n <= _MAX_LENGTH for least, ns in ((0, self.shape), (1, chunks)) for n in ns
        ):
            raise ValueError(f"its shape {self.shape} or chunks {chunks} are no lengths")
        size = 1 if self.data_type == "string" else np.dtype(self.data_type).itemsize
        # A chunk may be longer than the array, and is as long once it is decoded.
        if math.prod(chunks) * size > _MAX_CHUNK_BYTES:
            raise ValueError(f"it has chunks of more than 1 GiB, {chunks} of {self.data_type}")
        counts = (-(-n // chunk) for n, chunk in zip(self.shape, chunks, strict=True))
        if math.prod(counts) > _MAX_CHUNKS:
            raise ValueError(f"it has more than {_MAX_CHUNKS} chunks")

    @property
    def variable(self) -> Variable:
        chunks = self.chunk_grid["configuration"]["chunk_shape"]
        return Variable(tuple(self.dimension_names), self.data_type, tuple(chunks))


def read_schema(
    root: Mapping[str, Any], url: str
) -> tuple[str, dict[str, Variable], dict[str, int]]:
    """Kind, variables and lengths of the dimensions of a finished result.

    Args:
        root: contents of its ``zarr.json``.
        url: of the result, for messages.

    Raises:
        InputError: arrays that no result has, chunks of more than 1 GiB, or a missing part.
    """
    where = f"{url} is not a turnover result: zarr.json"
    group = convert(root, _Group, where)
    variables: dict[str, Variable] = {}
    sizes: dict[str, int] = {}
    for name, metadata in group.consolidated_metadata["metadata"].items():
        if not _NAME.fullmatch(name):
            raise InputError(f"{where}: {name!r} is no name of an array")
        array = convert(metadata, _Array, f"{where}: {name}")
        variables[name] = array.variable
        for dim, length in zip(array.dimension_names, array.shape, strict=True):
            if sizes.setdefault(dim, length) != length:
                raise InputError(f"{where}: {name} has {length} in {dim}, others {sizes[dim]}")
    kind = convert(manifest_of(root).get("kind"), Literal[tuple(_DIMS)], where)
    for name, dims in _needed(kind, "freedom" in root["attributes"]).items():
        found = variables.get(name)
        if found is None or found.dims != dims or found.dtype == "string":
            raise InputError(f"{where}: {name} must have the dimensions {dims}")
        if np.dtype(found.dtype).kind != ("i" if name in _INTEGERS else "f"):
            raise InputError(f"{where}: {name} cannot be {found.dtype}")
    return kind, variables, sizes


def attributes_of(root: Mapping[str, Any]) -> dict[str, Any]:
    """A result's own attributes."""
    return {k: v for k, v in root["attributes"].items() if k not in {ATTRIBUTE, "coordinates"}}


def _needed(kind: str, freedom: bool) -> dict[str, tuple[str, ...]]:
    """Names and dimensions of the arrays that a result must have."""
    dims = _DIMS[kind]
    needed = {"score": dims} | ({"train_id": dims} if kind == "top" else {"train": ("train",)})
    if kind == "columns":
        of_target = dict.fromkeys(("smallest_q", "largest_z", "significant"), ("target",))
        return needed | {"q": dims} | of_target | dict.fromkeys(("helped", "hurt"), ("train",))
    # An aggregate has one noise floor; the others have one for each score of their first dimension.
    needed |= dict.fromkeys(("ghost_mean", "noise_floor"), () if kind == "aggregate" else dims[:1])
    return needed if freedom else needed | {"null": ("pool",)}
