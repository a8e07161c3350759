"""What the ``zarr.json`` of a finished result says of its arrays, taken for no more than what we write."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from turnover.influence.blocks import CODECS, DTYPES, Variable

MOST_BYTES = 2**30
"""Of a chunk, packed or unpacked."""
_DIMS = {
    "dense": ("target", "train"),
    "top": ("target", "rank"),
    "aggregate": ("train",),
    "self": ("train",),
}
_LONGEST = 2**48
_FLOATS = frozenset({"float32", "float64"})


def arrays(document: Mapping[str, Any]) -> tuple[dict[str, Variable], dict[str, int]]:
    """The arrays of a finished result, and the length of each dimension.

    Raises:
        ValueError: something that we do not write; also ``KeyError``, ``TypeError`` and ``AttributeError``.
    """
    variables: dict[str, Variable] = {}
    sizes: dict[str, int] = {}
    for name, one in document["consolidated_metadata"]["metadata"].items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise ValueError(f"array {name!r}")
        dtype, codecs = one["data_type"], [codec["name"] for codec in one["codecs"]]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"{name} is {dtype!r}")
        if not set(codecs) <= CODECS or "zstd" not in codecs:
            raise ValueError(f"{name} is coded by {codecs}")
        grid = one["chunk_grid"]
        if grid["name"] != "regular" or one["chunk_key_encoding"]["name"] != "default":
            raise ValueError(f"chunks of {name}")
        dims, shape = tuple(one.get("dimension_names", ())), one["shape"]
        variable = Variable(dims, dtype, tuple(grid["configuration"]["chunk_shape"]))
        for dim, length, chunk in zip(dims, shape, variable.chunks, strict=True):
            if not isinstance(dim, str) or not _is_length(length, 0) or not _is_length(chunk, 1):
                raise ValueError(f"shape {shape} of {name}")
            if sizes.setdefault(dim, length) != length:
                raise ValueError(f"{dim} has lengths {sizes[dim]} and {length}")
        bytes_each = 8 if dtype == "string" else np.dtype(dtype).itemsize
        held = [
            min(chunk, max(1, sizes[d])) for d, chunk in zip(dims, variable.chunks, strict=True)
        ]
        if bytes_each * math.prod(held) > MOST_BYTES:
            raise ValueError(f"chunks {variable.chunks} of {name} are above {MOST_BYTES} bytes")
        variables[name] = variable
    return variables, sizes


def check_result(
    kind: str, variables: Mapping[str, Variable], attributes: Mapping[str, Any]
) -> None:
    """Whether arrays and attributes are those of a result.

    Raises:
        ValueError: one is missing, or another; also ``KeyError`` and ``TypeError``.
    """
    if kind not in _DIMS:
        raise ValueError(f"kind {kind!r}")
    whole: tuple[str, ...] = _DIMS[kind]
    per_target = () if kind == "aggregate" else whole[:1]
    of = {"score": whole, "standard_error": whole, "exact": whole}
    of |= dict.fromkeys(("ghost_mean", "noise_floor", "recall"), per_target)
    of |= {"train_id": whole, "null": ("pool",), "target": ("target",), "train": ("train",)}
    needed = {"score", "ghost_mean", "noise_floor", "train_id" if kind == "top" else "train"}
    needed |= set() if "freedom" in attributes else {"null"}
    types = dict.fromkeys(("train_id", "target", "train"), frozenset({"int64"}))
    types["exact"] = frozenset({"bool"})
    if missing := needed - variables.keys():
        raise ValueError(f"{sorted(missing)} are missing")
    for name, dims in of.items():
        one = variables.get(name)
        if one is not None and (one.dims != dims or one.dtype not in types.get(name, _FLOATS)):
            raise ValueError(f"{name} is {one.dtype} over {one.dims}")
    for name, types_of in (
        ("method", str),
        ("objective", (str, type(None))),
        ("sites", list),
        ("network", (str, type(None))),
        ("considered", (int, type(None))),
    ):
        if not isinstance(attributes[name], types_of) or isinstance(attributes[name], bool):
            raise ValueError(f"{name} is {attributes[name]!r}")
    if not all(isinstance(site, str) for site in attributes["sites"]):
        raise ValueError(f"sites are {attributes['sites']!r}")
    freedom = attributes.get("freedom", 1.0)
    if isinstance(freedom, bool) or not isinstance(freedom, int | float) or not freedom > 0:
        raise ValueError(f"freedom is {freedom!r}")


def _is_length(value: Any, least: int) -> bool:
    return type(value) is int and least <= value <= _LONGEST
