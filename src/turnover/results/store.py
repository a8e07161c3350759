"""Opens results on disk for writing: block by block, by several processes, or as a whole.

A result is a zarr group that xarray opens. Its ``zarr.json`` is written last: a result without it is not
finished, and ``progress/`` says what it was begun with and for which targets.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from turnover.errors import InputError
from turnover.results.arrays import Variable
from turnover.results.calibration import StudentNull
from turnover.results.location import ROOT, Location
from turnover.results.manifest import (
    STARTED,
    Coordinates,
    check_same,
    digest,
    make_manifest,
    manifest_of,
    read_sealed,
)
from turnover.results.result import Result, arrays_of, coordinates_of, dims_of
from turnover.results.schema import DESCRIBED
from turnover.results.writer import CELLS, COLUMNS, Writer


@contextmanager
def writing(
    url: str | Path,
    identity: Mapping[str, Any],
    variables: Mapping[str, Variable],
    sizes: Mapping[str, int],
    coordinates: Coordinates,
    kind: str,
) -> Iterator[Writer]:
    """Begin a result, or continue one that was cut off.

    Args:
        url: path or fsspec URL; missing folders are made.
        identity: JSON values that say what the numbers are of.
        variables: what will be written: ``ghost``, from which noise floor and null distribution are computed
            at the end, or ``ghost_mean``, ``noise_floor`` and ``null``.
        sizes: length of each dimension of the variables, except one that grows as rows are announced: the
            first of its variables. ``signature``: how many numbers identify what the objective computes on a
            target (:mod:`turnover.influence.signature`), if they are recorded.
        coordinates: name to (dimension, values): numbers or strings.
        kind: see :class:`turnover.results.reader.StoredResult`.
    """
    location = Location(url)
    arrays = {name: (dim, np.asarray(values)) for name, (dim, values) in coordinates.items()}
    manifest = make_manifest(identity, variables, sizes, arrays, kind)
    if stored := _finished(location, manifest):
        yield Writer(location, stored, arrays, complete=True)
        return
    with location.locked() as renew:
        stored = _finished(location, manifest)  # another process may have finished it since
        complete = stored is not None
        writer = Writer(location, stored or manifest, arrays, complete=complete, renew=renew)
        if not complete:
            writer.begin()
        yield writer


def _finished(location: Location, manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest of a finished result, after it was compared; ``None`` if there is no such result."""
    root = read_sealed(location, ROOT)
    if root is None:
        return None
    stored = manifest_of(root)
    check_same(location, stored, manifest)
    return stored


def joining(url: str | Path, manifest: Mapping[str, Any], announced: int) -> Writer:
    """A writer of regions of a result that another process has begun, holds locked, and will finish.

    Args:
        url: path or fsspec URL.
        manifest: :attr:`Writer.manifest` of the other process.
        announced: length of the growing dimension up to the end of the regions.
    """
    location = Location(url)

    def check() -> None:
        found = read_sealed(location, STARTED)
        if found is None or manifest_of(found) != manifest:
            raise InputError(
                f"{url} is not, seen from {socket.gethostname()}, the result that was begun: give a path "
                f"that all processes share, and leave it alone until they have ended"
            )

    return Writer(location, manifest, {}, complete=False, renew=check, announced=announced)


def stored_method(url: str | Path) -> str | None:
    """The estimator of a result that was begun or finished; ``None`` if there is none."""
    location = Location(url)
    document = read_sealed(location, ROOT) or read_sealed(location, STARTED)
    return None if document is None else str(manifest_of(document)["identity"]["method"])


def save(url: str | Path, result: Result) -> None:
    """Store a result that is in memory, in place of the one that is there.

    Locally the new one is written beside the old one, which stays until the new one is whole; elsewhere
    the old one is removed first.
    """
    location = Location(url)
    dims, values = dims_of(result), arrays_of(result)
    floor = dims[: result.floor.sd.ndim]
    values["ghost_mean"] = floor, np.asarray(result.floor.mean)
    values["noise_floor"] = floor, np.asarray(result.floor.sd)
    attributes: dict[str, Any] = {}
    if isinstance(result.null, StudentNull):
        attributes["freedom"] = result.null.freedom
    else:
        values["null"] = ("pool",), result.null.values
    kinds = {("train",): "self" if floor else "aggregate", ("target", "rank"): "top"}
    # Two results of one shape must differ in their root, by which a reader notices a replacement.
    identity = {name: getattr(result, name) for name in DESCRIBED}
    identity["values"] = {name: digest(array) for name, (_, array) in values.items()}
    sizes: dict[str, int] = {}
    variables = {}
    for name, (of, array) in values.items():
        sizes |= zip(of, array.shape, strict=True)
        variables[name] = Variable(of, array.dtype.name, _chunks(array.shape))
    coordinates = coordinates_of(result)
    manifest = make_manifest(identity, variables, sizes, coordinates, kinds.get(dims, "dense"))
    with location.locked() as renew:
        begun = read_sealed(location, ROOT) or read_sealed(location, STARTED)
        if begun is None and not location.is_vacant():
            raise InputError(f"{url} is not a turnover result; give another path")
        with location.replaced() as draft:
            writer = Writer(draft, manifest, coordinates, complete=False, renew=renew)
            writer.begin()
            for name, (_, array) in values.items():
                writer.write(name, (), array)
            writer.finish(**attributes)


def _chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) < 2:
        return tuple(COLUMNS for _ in shape)
    columns = max(1, min(shape[1], COLUMNS))
    return max(1, min(shape[0], CELLS // columns)), columns
