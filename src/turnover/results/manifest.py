"""What a store was begun with, and whether it is what is given now."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.io.parsing import checksum, parse_json
from turnover.results.arrays import Variable
from turnover.results.location import Place

Coordinates = Mapping[str, tuple[str, NDArray[Any]]]
FORMAT = 1
ROOT = "zarr.json"
BEGUN = "progress/zarr.json"
MARK = "turnover"
SIGNATURE = "signature"
"""Dimension of the numbers that say what an objective computes; older results have none."""
_AGAIN = "delete it and estimate again"


def manifest(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a store was begun with."""
    return dict(document["attributes"][MARK]["manifest"])


def seal(document: dict[str, Any], begun_with: Mapping[str, Any]) -> bytes:
    """A group's zarr.json, marked as ours and with a checksum over all of it."""
    mark = {"format": FORMAT, "manifest": dict(begun_with)}
    attributes = {**document.get("attributes", {}), MARK: mark}
    sealed = {**document, "attributes": attributes}
    mark["checksum"] = _checksum(sealed)
    return json.dumps(sealed, indent=1).encode()


def marked(place: Place, key: str) -> dict[str, Any] | None:
    """A group's zarr.json that :func:`seal` made, ``None`` where there is none.

    Raises:
        InputError: it is not ours, damaged, or of a later version.
    """
    raw = place.get(key)
    if raw is None:
        return None
    foreign = f"{place.url} is not a turnover result; give another place"
    try:
        document = parse_json(raw, f"{place.url}: {key}")
    except InputError as error:
        raise InputError(f"{error}; {_AGAIN}") from error
    attributes = document.get("attributes") if isinstance(document, dict) else None
    mark = attributes.get(MARK) if isinstance(attributes, dict) else None
    if not isinstance(mark, dict):
        raise InputError(foreign)
    if mark.get("format") != FORMAT:
        raise InputError(
            f"{place.url} has format {mark.get('format')!r}, this version reads {FORMAT}; upgrade "
            f"turnover, or {_AGAIN}"
        )
    if mark.get("checksum") != _checksum(document):
        raise InputError(
            f"{place.url}: {key} is damaged, or was changed after it was written; {_AGAIN}"
        )
    if not isinstance(mark.get("manifest"), dict):
        raise InputError(f"{place.url}: {key} is damaged, it has no manifest; {_AGAIN}")
    return dict(document)


def digest(values: NDArray[Any]) -> str:
    """A hash of an array: type, shape and contents."""
    hashed = hashlib.blake2b(f"{values.dtype.str}{values.shape}".encode(), digest_size=16)
    hashed.update(np.ascontiguousarray(values).tobytes())
    return hashed.hexdigest()


def _checksum(document: Mapping[str, Any]) -> str:
    attributes = dict(document["attributes"])
    attributes[MARK] = {k: v for k, v in attributes[MARK].items() if k != "checksum"}
    return checksum({**document, "attributes": attributes})


def describe(
    identity: Mapping[str, Any],
    variables: Mapping[str, Variable],
    sizes: Mapping[str, int],
    coordinates: Coordinates,
    kind: str,
) -> dict[str, Any]:
    """All that must be the same for a result to be gone on with, as JSON values.

    Raises:
        InputError: a coordinate's name, length or type.
    """
    known = {dim: len(values) for dim, values in coordinates.values()} | dict(sizes)
    for name, (dim, values) in coordinates.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name in variables:
            raise InputError(
                f"coordinate {name!r}: its name must be one of letters, digits and _, and no variable's"
            )
        if values.shape != (known[dim],):
            raise InputError(
                f"coordinate {name!r} must have a value for each of {known[dim]} in {dim}, got {values.shape}"
            )
        dtype_of(values, name)
    return {
        "kind": kind,
        "identity": plain(identity),
        "variables": {name: variable.to_dict() for name, variable in variables.items()},
        "sizes": known,
        "coordinates": {name: [dim, digest(values)] for name, (dim, values) in coordinates.items()},
    }


def dtype_of(values: NDArray[Any], name: str = "") -> str:
    """The type a coordinate is stored as.

    Raises:
        InputError: neither numbers nor strings.
    """
    if values.dtype.kind == "U":
        return "string"
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise InputError(f"coordinate {name!r} is of type {values.dtype}; give numbers or strings")
    return values.dtype.name


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back."""
    return dict(json.loads(json.dumps(dict(values), allow_nan=False)))


def growing(variables: Mapping[str, Variable], sizes: Mapping[str, int]) -> str | None:
    """The dimension whose length is not known."""
    unknown = {dim for variable in variables.values() for dim in variable.dims if dim not in sizes}
    if len(unknown) > 1:
        raise ValueError(f"sizes of {sorted(unknown)} are missing")
    return next(iter(unknown), None)


def finished(place: Place, begun_with: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a finished store was begun with; ``None`` where there is none.

    Raises:
        InputError: it was begun with something else, or is no result of ours, or damaged.
    """
    root = marked(place, ROOT)
    if root is None:
        return None
    stored = manifest(root)
    compare(place, stored, begun_with)
    return stored


def compare(place: Place, stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Check two manifests.

    Warns:
        UserWarning: the stored one is of an older version, which noted less.

    Raises:
        InputError: they differ; the first difference is named.
    """
    sizes = stored.get("sizes")
    older = SIGNATURE in given["sizes"] and isinstance(sizes, dict) and SIGNATURE not in sizes
    if older:
        given = _as_before(given)
    found = _difference(stored, given, ())
    if found:
        raise InputError(
            f"{place.url} holds another result: {found}; give another place, or delete it"
        )
    if older:
        warnings.warn(
            f"{place.url} was begun by an older version, which noted the objective's name alone "
            f"({given['identity']['objective']!r}) and no precision: that these are the same now as then "
            f"is not checked; give another place where they may not be",
            stacklevel=2,
        )


def _as_before(given: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest without what older versions did not note."""
    identity = {key: value for key, value in given["identity"].items() if key != "precision"}
    sizes = {key: value for key, value in given["sizes"].items() if key != SIGNATURE}
    return {**given, "identity": identity, "sizes": sizes}


def _difference(stored: Any, given: Any, path: tuple[str, ...]) -> str | None:
    """The first thing that differs between two JSON values, in words."""
    if isinstance(stored, dict) and isinstance(given, dict):
        for key in dict.fromkeys((*given, *stored)):
            inner = (*path, str(key))
            found = _difference(stored.get(key), given.get(key), inner)
            if found:
                return found
        return None
    if stored == given:
        return None
    what = ".".join(path[1:]) if path[0] == "identity" else " ".join(path)
    return f"{what} is {_short(stored)} there, {_short(given)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
