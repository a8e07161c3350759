"""The manifest of a result: what must be the same for a later run to continue it."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.io.parsing import checksum, parse_json
from turnover.results.arrays import Variable
from turnover.results.location import PROGRESS, Location

Coordinates = Mapping[str, tuple[str, NDArray[Any]]]
STARTED = f"{PROGRESS}/zarr.json"
"""A group's metadata with the manifest, written before anything else."""
ATTRIBUTE = "turnover"
"""Attribute of a group that holds format, manifest and checksum."""
SIGNATURE = "signature"
"""Dimension of the numbers that identify what an objective computes; older results have none."""
NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_FORMAT = 1
_START_OVER = "delete it and estimate again"


def make_manifest(
    identity: Mapping[str, Any],
    variables: Mapping[str, Variable],
    sizes: Mapping[str, int],
    coordinates: Coordinates,
    kind: str,
) -> dict[str, Any]:
    """Describe a result before it is written, as JSON values; checks the coordinates."""
    lengths = {dim: len(values) for dim, values in coordinates.values()} | dict(sizes)
    for name, (dim, values) in coordinates.items():
        if not NAME.fullmatch(name) or name in variables:
            raise InputError(
                f"coordinate {name!r}: its name must consist of letters, digits and _, and differ from "
                f"every variable's"
            )
        if values.shape != (lengths[dim],):
            raise InputError(
                f"coordinate {name!r} must have a value for each of {lengths[dim]} in {dim}, got "
                f"{values.shape}"
            )
        dtype_of(values, name)
    return plain(
        {
            "kind": kind,
            "identity": identity,
            "variables": {name: asdict(variable) for name, variable in variables.items()},
            "sizes": lengths,
            "coordinates": {name: [dim, digest(v)] for name, (dim, v) in coordinates.items()},
        }
    )


def manifest_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest in a zarr.json."""
    return dict(document["attributes"][ATTRIBUTE]["manifest"])


def seal(document: dict[str, Any], manifest: Mapping[str, Any]) -> bytes:
    """A group's zarr.json with the manifest and a checksum over all of it."""
    mark = {"format": _FORMAT, "manifest": dict(manifest)}
    attributes = {**document.get("attributes", {}), ATTRIBUTE: mark}
    sealed = {**document, "attributes": attributes}
    mark["checksum"] = checksum(sealed)
    return json.dumps(sealed, indent=1).encode()


def read_sealed(location: Location, key: str) -> dict[str, Any] | None:
    """Read a zarr.json that :func:`seal` made, and check it; ``None`` if it is absent."""
    raw = location.get(key)
    if raw is None:
        return None
    try:
        document = parse_json(raw, f"{location.url}: {key}")
    except InputError as error:
        raise InputError(f"{error}; {_START_OVER}") from error
    try:
        mark = document["attributes"][ATTRIBUTE]
        version = mark["format"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{location.url} is not a turnover result; give another path") from error
    if version != _FORMAT:
        raise InputError(
            f"{location.url} has format {version!r}, this version reads {_FORMAT}; upgrade turnover, or "
            f"{_START_OVER}"
        )
    unsigned = {name: value for name, value in mark.items() if name != "checksum"}
    attributes = {**document["attributes"], ATTRIBUTE: unsigned}
    if mark.get("checksum") != checksum({**document, "attributes": attributes}):
        raise InputError(
            f"{location.url}: {key} is damaged, or was changed after it was written; {_START_OVER}"
        )
    if not isinstance(mark.get("manifest"), dict):
        raise InputError(f"{location.url}: {key} is damaged: no manifest; {_START_OVER}")
    return dict(document)


def digest(values: NDArray[Any]) -> str:
    """A hash of an array's type, shape and contents."""
    hashed = hashlib.blake2b(f"{values.dtype.str}{values.shape}".encode(), digest_size=16)
    hashed.update(np.ascontiguousarray(values).tobytes())
    return hashed.hexdigest()


def dtype_of(values: NDArray[Any], name: str = "") -> str:
    """The type a coordinate is stored as: a number or a string."""
    if values.dtype.kind == "U":
        return "string"
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise InputError(f"coordinate {name!r} is of type {values.dtype}; give numbers or strings")
    return values.dtype.name


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back."""
    return dict(json.loads(json.dumps(dict(values), allow_nan=False)))


def check_same(location: Location, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Compare the manifest of a stored result with that of the result to be written.

    Warns:
        UserWarning: the stored one is of an older version, which recorded less.
    """
    sizes = stored.get("sizes")
    older = SIGNATURE in given["sizes"] and isinstance(sizes, dict) and SIGNATURE not in sizes
    if older:
        for part, name in (("identity", "precision"), ("sizes", SIGNATURE)):
            given = {**given, part: {k: v for k, v in given[part].items() if k != name}}
    found = _difference(stored, given, ())
    if found:
        raise InputError(
            f"{location.url} holds another result: {found}; give another path, or delete it"
        )
    if older:
        warnings.warn(
            f"{location.url} was begun by an older version, which recorded only the objective's name "
            f"({given['identity']['objective']!r}) and no precision: that these are the same now as then "
            f"is not checked; give another path if they may not be",
            stacklevel=2,
        )


def _difference(stored: Any, given: Any, path: tuple[str, ...]) -> str | None:
    if isinstance(stored, dict) and isinstance(given, dict):
        keys = dict.fromkeys((*given, *stored))
        found = (_difference(stored.get(key), given.get(key), (*path, str(key))) for key in keys)
        return next(filter(None, found), None)
    if stored == given:
        return None
    name = ".".join(path[1:]) if path[0] == "identity" else " ".join(path)
    return f"{name} is {_short(stored)} there, {_short(given)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
