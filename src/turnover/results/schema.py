"""Checks what a result's ``zarr.json`` says of its arrays before any array is opened.

Shapes and chunks are claims of the file: they could ask for more memory than a machine has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from turnover.errors import InputError
from turnover.io.parsing import convert, damage
from turnover.results.arrays import CODECS, DTYPES, Variable
from turnover.results.manifest import NAME, manifest_of

DESCRIBED: dict[str, Any] = {
    "method": str,
    "objective": str,
    "sites": list[str],
    "network": str,
    "considered": int,
}
"""Attributes that every result has, and their types."""
_MAX_CHUNK_BYTES = 2**30
_MAX_CHUNKS = 2**28
_MAX_LENGTH = 2**48
_DIMS = {
    "dense": ("target", "train"),
    "top": ("target", "rank"),
    "aggregate": ("train",),
    "self": ("train",),
    "columns": ("train", "target"),
}
"""Dimensions of the scores, by kind."""
_INTEGERS = frozenset({"train", "train_id", "significant", "helped", "hurt"})


def read_schema(
    root: Mapping[str, Any], url: str
) -> tuple[str, dict[str, Variable], dict[str, int]]:
    """Kind, variables and lengths of the dimensions of a finished result.

    Args:
        root: contents of its ``zarr.json``.
        url: of the result, for messages.
    """
    where = f"{url} is not a turnover result: zarr.json"
    variables: dict[str, Variable] = {}
    sizes: dict[str, int] = {}
    with damage(where, "delete it and estimate again"):
        kind, attributes = manifest_of(root)["kind"], root["attributes"]
        for name, metadata in root["consolidated_metadata"]["metadata"].items():
            variables[name], shape = _array(name, metadata, f"{where}: {name}")
            for dim, length in zip(variables[name].dims, shape, strict=True):
                if sizes.setdefault(dim, length) != length:
                    raise InputError(f"{where}: {name} has {length} in {dim}, others {sizes[dim]}")
        for name, dims in _needed(kind, freedom="freedom" in attributes).items():
            found = variables.get(name)
            if found is None or found.dims != dims or found.dtype == "string":
                raise InputError(f"{where}: {name} must have the dimensions {dims}")
            if np.dtype(found.dtype).kind != ("i" if name in _INTEGERS else "f"):
                raise InputError(f"{where}: {name} cannot be {found.dtype}")
        for name, of in (DESCRIBED | {"freedom": float}).items():
            if name != "freedom" or name in attributes:
                convert(attributes[name], of, f"{where}: {name}")
    return kind, variables, sizes


def _array(name: str, metadata: Mapping[str, Any], where: str) -> tuple[Variable, list[int]]:
    """Layout and shape of an array."""
    if not NAME.fullmatch(name):
        raise InputError(f"{where}: no name of an array")
    dtype, grid = metadata["data_type"], metadata["chunk_grid"]
    codecs = {codec["name"] for codec in metadata["codecs"]}
    if dtype not in DTYPES or not codecs <= CODECS:
        raise InputError(f"{where} is {dtype}, in {', '.join(sorted(map(str, codecs)))}")
    dims = convert(metadata.get("dimension_names", []), list[str], where)
    shape = convert(metadata["shape"], list[int], where)
    chunks = convert(grid["configuration"]["chunk_shape"], list[int], where)
    if grid["name"] != "regular" or not len(dims) == len(shape) == len(chunks):
        raise InputError(f"{where} has other chunks than results have")
    if len(set(dims)) < len(dims):
        raise InputError(f"{where} has one dimension twice")
    if (
        min(shape, default=0) < 0
        or min(chunks, default=1) < 1
        or max(shape + chunks, default=1) > _MAX_LENGTH
    ):
        raise InputError(f"{where}: shape {shape} or chunks {chunks} are out of range")
    size = 1 if dtype == "string" else np.dtype(dtype).itemsize
    # A chunk may be longer than the array, and is as long once it is decoded.
    if math.prod(chunks) * size > _MAX_CHUNK_BYTES:
        raise InputError(f"{where} has chunks of more than 1 GiB, {chunks} of {dtype}")
    if math.prod(-(-n // chunk) for n, chunk in zip(shape, chunks, strict=True)) > _MAX_CHUNKS:
        raise InputError(f"{where} has more than {_MAX_CHUNKS} chunks")
    return Variable(tuple(dims), dtype, tuple(chunks)), shape


def _needed(kind: str, *, freedom: bool) -> dict[str, tuple[str, ...]]:
    """Names and dimensions of the arrays that a result of a kind must have."""
    dims = _DIMS[kind]
    needed = {"score": dims} | ({"train_id": dims} if kind == "top" else {"train": ("train",)})
    if kind == "columns":
        needed |= {"q": dims, "smallest_q": ("target",), "largest_z": ("target",)}
        return needed | {"significant": ("target",), "helped": ("train",), "hurt": ("train",)}
    # An aggregate has one noise floor; the others have one for each score of their first dimension.
    floor = () if kind == "aggregate" else dims[:1]
    needed |= {"ghost_mean": floor, "noise_floor": floor}
    return needed if freedom else needed | {"null": ("pool",)}
