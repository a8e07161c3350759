"""What a result's ``zarr.json`` says of its arrays, checked before any of them is opened.

Shapes and chunks are the file's word: what zarr would do with them may be more than a machine has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from turnover.errors import InputError
from turnover.io.parsing import field, strings
from turnover.results.arrays import CODECS, DTYPES, Variable
from turnover.results.manifest import MARK, manifest

DESCRIBED = ("method", "objective", "sites", "network", "considered")
_LARGEST_CHUNK = 2**30
_MOST_CHUNKS = 2**28
_LONGEST = 2**48
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


def layout(root: Mapping[str, Any], url: str) -> tuple[str, dict[str, Variable], dict[str, int]]:
    """Kind, variables and lengths of the dimensions of a finished result.

    Args:
        root: what is in its ``zarr.json``.
        url: where, for messages.

    Raises:
        InputError: other arrays than results have, chunks of more than 1 GiB, or what a result needs is
            missing.
    """
    where = f"{url} is not a turnover result: zarr.json"
    consolidated = field(root, "consolidated_metadata", dict, where)
    variables: dict[str, Variable] = {}
    sizes: dict[str, int] = {}
    for name, metadata in field(consolidated, "metadata", dict, where).items():
        if not _NAME.fullmatch(name) or not isinstance(metadata, dict):
            raise InputError(f"{where}: {name!r} is no array")
        variable, shape = _variable(metadata, f"{where}: {name}")
        variables[name] = variable
        for dim, length in zip(variable.dims, shape, strict=True):
            if sizes.setdefault(dim, length) != length:
                raise InputError(f"{where}: {name} has {length} in {dim}, others {sizes[dim]}")
    begun_with = manifest(root)
    kind = field(begun_with, "kind", str, where)
    _check_needed(kind, variables, field(root, "attributes", dict, where), where)
    return kind, variables, sizes


def attributes_of(root: Mapping[str, Any]) -> dict[str, Any]:
    """What was noted of a result."""
    return {k: v for k, v in root["attributes"].items() if k not in {MARK, "coordinates"}}


def _variable(metadata: Mapping[str, Any], where: str) -> tuple[Variable, list[int]]:
    dtype = field(metadata, "data_type", str, where)
    codecs = {
        field(codec, "name", str, where) if isinstance(codec, dict) else None
        for codec in field(metadata, "codecs", list, where)
    }
    if dtype not in DTYPES or not codecs <= CODECS:
        raise InputError(f"{where} is {dtype}, in {', '.join(sorted(map(str, codecs)))}")
    dims = strings({"dimension_names": [], **metadata}, "dimension_names", where)
    shape = _lengths(metadata, "shape", 0, where)
    grid = field(metadata, "chunk_grid", dict, where)
    chunks = _lengths(field(grid, "configuration", dict, where), "chunk_shape", 1, where)
    if grid.get("name") != "regular" or not len(dims) == len(shape) == len(chunks):
        raise InputError(f"{where} has other chunks than results have")
    if len(set(dims)) < len(dims):
        raise InputError(f"{where} has one dimension twice")
    size = 1 if dtype == "string" else np.dtype(dtype).itemsize
    # A chunk may be longer than the array, and is as long once it is decoded.
    if math.prod(chunks) * size > _LARGEST_CHUNK:
        raise InputError(f"{where} has chunks of more than 1 GiB, {chunks} of {dtype}")
    if math.prod(-(-n // chunk) for n, chunk in zip(shape, chunks, strict=True)) > _MOST_CHUNKS:
        raise InputError(f"{where} has more than {_MOST_CHUNKS} chunks")
    return Variable(tuple(dims), dtype, tuple(chunks)), shape


def _lengths(values: Mapping[str, Any], name: str, least: int, where: str) -> list[int]:
    found = field(values, name, list, where)
    if not all(type(one) is int and least <= one <= _LONGEST for one in found):
        raise InputError(f"{where}: {name!r} must hold lengths, got {found}")
    return list(found)


def _check_needed(
    kind: str, variables: Mapping[str, Variable], attributes: Mapping[str, Any], where: str
) -> None:
    dims = _DIMS.get(kind)
    if dims is None:
        raise InputError(f"{where}: unknown kind {kind!r}; there are {', '.join(_DIMS)}")
    needed = {"score": dims}
    needed |= {"train_id": dims} if kind == "top" else {"train": ("train",)}
    if kind == "columns":
        needed |= {"q": dims, "smallest_q": ("target",), "largest_z": ("target",)}
        needed |= {"significant": ("target",), "helped": ("train",), "hurt": ("train",)}
    else:
        # Aggregate has one noise floor; the others one for each score of their first dimension.
        floor = () if kind == "aggregate" else dims[:1]
        needed |= {"ghost_mean": floor, "noise_floor": floor}
        needed |= {} if "freedom" in attributes else {"null": ("pool",)}
    for name, its in needed.items():
        found = variables.get(name)
        numbers = "i" if name in _INTEGERS else "f"
        if found is None or found.dims != its or found.dtype == "string":
            raise InputError(f"{where}: {name} must have the dimensions {its}")
        if np.dtype(found.dtype).kind != numbers:
            raise InputError(f"{where}: {name} cannot be {found.dtype}")
    for name in ("method", "objective", "network"):
        field(attributes, name, str, where)
    strings(attributes, "sites", where)
    field(attributes, "considered", int, where)
    if "freedom" in attributes:
        field(attributes, "freedom", float, where)
