"""Results on disk: written block by block, on any file system, and gone on with after a cut.

A result is a zarr group that xarray opens. Its ``zarr.json`` is written last: a store that has none is
not finished, and ``progress/`` says what it was begun with and for which targets.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.results.arrays import Variable
from turnover.results.calibration import NullDistribution, StudentNull
from turnover.results.location import Place
from turnover.results.manifest import (
    BEGUN,
    ROOT,
    Coordinates,
    describe,
    digest,
    finished,
    manifest,
    marked,
)
from turnover.results.reader import StoredResult
from turnover.results.reader import open_result as read
from turnover.results.result import Result
from turnover.results.schema import DESCRIBED
from turnover.results.writer import Writer

__all__ = [
    "StoredResult",
    "Variable",
    "Writer",
    "begun_method",
    "joining",
    "read",
    "save",
    "writing",
]

_CELLS = 2**20
"""Values in a chunk of a saved result."""
_COLUMNS = 2**16


@contextmanager
def writing(
    url: str | Path,
    identity: Mapping[str, Any],
    variables: Mapping[str, Variable],
    sizes: Mapping[str, int],
    coordinates: Coordinates,
    kind: str,
) -> Iterator[Writer]:
    """Begin a result, or go on with one that was cut off.

    Args:
        url: path or fsspec URL; missing folders are made.
        identity: JSON values that say what the numbers are of.
        variables: what will be written. With ``ghost`` among them, noise floor and null distribution
            are made of it at the end; without, ``ghost_mean``, ``noise_floor`` and ``null`` must be.
        sizes: length of each dimension. At most one that the variables have may be left out: it grows
            as rows come (:meth:`Writer.targets`), and must be the first of its variables. A dimension
            that only coordinates have need not be given. ``signature``: numbers that say what the
            objective computes on a target (:mod:`turnover.influence.signature`), where they are kept.
        coordinates: name to (dimension, values): numbers or strings.
        kind: see :class:`turnover.results.reader.StoredResult`.

    Raises:
        InputError: the place holds something else, or the result of other values; another process
            writes there; a damaged store; zarr is not installed (``pip install turnover[results]``).
    """
    place = Place(url)
    held = {name: (dim, np.asarray(values)) for name, (dim, values) in coordinates.items()}
    begun_with = describe(identity, variables, sizes, held, kind)
    stored = finished(place, begun_with)
    if stored is not None:
        yield Writer(place, stored, held, complete=True)
        return
    with place.locked() as renew:
        # Another process may have finished it since.
        stored = finished(place, begun_with)
        complete = stored is not None
        writer = Writer(place, stored or begun_with, held, complete=complete, renew=renew)
        if not complete:
            writer.begin()
        yield writer


def joining(url: str | Path, begun_with: Mapping[str, Any], announced: int) -> Writer:
    """A writer of regions of a result that another process has begun, will finish, and is the one for.

    Args:
        url: path or fsspec URL.
        begun_with: the other :attr:`Writer.manifest`.
        announced: length of the growing dimension up to the end of the regions.

    Raises:
        InputError: zarr is not installed; on writing, that the result is not there or no longer that one.
    """
    place = Place(url)

    def check() -> None:
        found = marked(place, BEGUN)
        if found is None or manifest(found) != begun_with:
            raise InputError(
                f"{url} is not, seen from here ({socket.gethostname()}), the result that was begun: give a "
                f"place that all processes share, and leave it alone until they have ended"
            )

    return Writer(place, begun_with, {}, complete=False, renew=check, announced=announced)


def begun_method(url: str | Path) -> str | None:
    """The estimator of a result that was begun or finished there; ``None`` where there is none.

    Raises:
        InputError: the place holds something else, or a damaged store.
    """
    place = Place(url)
    document = marked(place, ROOT) or marked(place, BEGUN)
    return None if document is None else str(manifest(document)["identity"]["method"])


def save(url: str | Path, result: Result) -> None:
    """Store a result that is in memory, in place of one that is there.

    Locally the new one is written beside the old one, which stays until the new one is whole; elsewhere
    the old one is removed first.

    Args:
        url: path or fsspec URL.
        result: of any shape.

    Raises:
        InputError: the place holds something else, another process writes there, or
            zarr is not installed (``pip install turnover[results]``).
    """
    place = Place(url)
    kind, values, coordinates = _laid_out(result)
    # Two results of one shape must not have one root: a reader tells by it that one was replaced.
    of = {name: digest(array) for name, (_, array) in values.items()}
    identity = {name: getattr(result, name) for name in DESCRIBED} | {"values": of}
    sizes = {
        dim: length
        for dims, array in values.values()
        for dim, length in zip(dims, array.shape, strict=True)
    }
    variables = {
        name: Variable(dims, array.dtype.name, _chunks(array.shape))
        for name, (dims, array) in values.items()
    }
    begun_with = describe(identity, variables, sizes, coordinates, kind)
    with place.locked() as renew:
        if marked(place, ROOT) is None and marked(place, BEGUN) is None and not place.vacant():
            raise InputError(f"{url} is not a turnover result; give another place")
        draft = place.neighbour("draft") if place.local else place
        draft.clear()
        writer = Writer(draft, begun_with, coordinates, complete=False, renew=renew)
        writer.begin()
        for name, (_, array) in values.items():
            writer.write(name, (), array)
        null = result.null
        if isinstance(null, StudentNull):
            writer.finish(freedom=null.freedom)
        else:
            writer.finish()
        draft.become(place)


def _laid_out(
    result: Result,
) -> tuple[str, dict[str, tuple[tuple[str, ...], NDArray[Any]]], dict[str, Any]]:
    """Kind, variables and coordinates of a result in memory."""
    top = result.train_ids.ndim > 1
    dims = ("target", "rank" if top else "train")[-result.scores.ndim :]
    floor = dims[: result.floor.sd.ndim]
    kind = "top" if top else "dense"
    if result.scores.ndim == 1:
        kind = "self" if floor else "aggregate"
    values = {
        "score": (dims, result.scores),
        "train_id": (dims, result.train_ids if top else None),
        "standard_error": (dims, result.standard_error),
        "exact": (dims, result.exact),
        "recall": (floor, result.recall),
        "ghost_mean": (floor, np.asarray(result.floor.mean)),
        "noise_floor": (floor, np.asarray(result.floor.sd)),
        "null": (
            ("pool",),
            result.null.values if isinstance(result.null, NullDistribution) else None,
        ),
    }
    coordinates: dict[str, Any] = {} if top else {"train": ("train", result.train_ids)}
    if result.target_ids is not None:
        coordinates["target"] = ("target", result.target_ids)
    held = {name: (of, array) for name, (of, array) in values.items() if array is not None}
    return kind, held, coordinates


def _chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) < 2:
        return tuple(_COLUMNS for _ in shape)
    columns = max(1, min(shape[1], _COLUMNS))
    return max(1, min(shape[0], _CELLS // columns)), columns
