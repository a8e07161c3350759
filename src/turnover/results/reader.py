"""Results on disk: opened, checked, read in part or as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError, needing
from turnover.results.arrays import Arrays
from turnover.results.calibration import NoiseFloor, NullDistribution, StudentNull
from turnover.results.location import ROOT, Location
from turnover.results.manifest import STARTED, read_sealed
from turnover.results.result import Result
from turnover.results.schema import attributes_of, read_schema

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True)
class StoredResult:
    """A finished result on disk, of which nothing but ids and attributes is in memory.

    Attributes:
        url: where.
        kind: ``"dense"`` (targets x train), ``"top"`` (the extremes of each target), ``"aggregate"``
            or ``"self"`` (one score for each training id).
        attributes: method, objective, sites, network, considered, and what else was noted.
    """

    url: str
    kind: str
    attributes: Mapping[str, Any]
    _arrays: Arrays
    _version: str

    def __len__(self) -> int:
        """Targets; training ids where there is one score for each."""
        return self._arrays.sizes[self._arrays.variables["score"].dims[0]]

    @cached_property
    def dataset(self) -> xarray.Dataset:
        """All of it, lazy, with ids and labels as coordinates.

        xarray itself finds damaged chunks, but takes a missing one for NaN; :meth:`load` finds both.

        Raises:
            InputError: xarray is not installed (``pip install turnover[results]``).
        """
        with needing("a labelled dataset", "turnover[results]"):
            import xarray

        for name in self._arrays.sizes.keys() & self._arrays.variables.keys():
            self.part(name)  # made indexes of at once; a damaged one would not be named
        store = self._arrays.location.zarr_store(writable=False)
        dataset = xarray.open_zarr(store, consolidated=True, zarr_format=3)
        dataset.attrs = dict(self.attributes)
        return dataset

    @cached_property
    def target_ids(self) -> NDArray[np.int64] | None:
        """int64 (targets,), where the targets had ids."""
        return self.part("target") if "target" in self._arrays.variables else None

    @cached_property
    def train_ids(self) -> NDArray[np.int64]:
        """int64 (train,); (targets, ranks) where only the extremes are held."""
        return self.part("train_id" if self.kind == "top" else "train")

    @cached_property
    def null(self) -> NullDistribution | StudentNull:
        """The distribution that turns z into p."""
        if "freedom" in self.attributes:
            return StudentNull(self.attributes["freedom"])
        return NullDistribution(self.part("null"))

    def load(self, targets: slice | Sequence[int] | None = None) -> Result:
        """Rows of the result, in memory; the cost is that of the rows alone.

        Args:
            targets: their positions (not ids), from the end where negative; ``None``: all.

        Raises:
            InputError: a position that does not exist, a choice of targets where the result has none,
                a chunk that is missing or damaged, or a result that was replaced since it was opened.
        """
        if targets is not None and self.kind not in {"dense", "top"}:
            raise InputError(f"{self.url} has no targets to choose from; load() takes all of it")
        rows = None if targets is None else self._positions(targets)
        with self._unreplaced():
            return self._load(rows)

    def _load(self, rows: NDArray[np.int64] | None) -> Result:
        scores = self._rows("score", rows)
        mean, sd = self._rows("ghost_mean", rows), self._rows("noise_floor", rows)
        train_ids = self._rows("train_id", rows) if self.kind == "top" else self.train_ids
        ids = self.target_ids
        optional = {
            name: self._rows(name, rows) if name in self._arrays.variables else None
            for name in ("standard_error", "exact", "recall")
        }
        return Result(
            scores=scores,
            floor=NoiseFloor(mean, sd),
            null=self.null,
            train_ids=train_ids,
            target_ids=ids if ids is None or rows is None else ids[rows],
            method=self.attributes["method"],
            objective=self.attributes["objective"],
            sites=tuple(self.attributes["sites"]),
            network=self.attributes["network"],
            considered=self.attributes["considered"],
            **optional,
        )

    def part(self, name: str, *region: slice) -> NDArray[Any]:
        """A region of a variable, in memory; the cost is that of the chunks it touches.

        Args:
            name: of a variable that was written, such as ``"score"``.
            region: a slice along each dimension, from the first; those left out are whole.

        Raises:
            InputError: no such variable, a chunk that is missing or damaged, or a result that was replaced
                since it was opened.
        """
        if name not in self._arrays.variables:
            raise InputError(
                f"{self.url} has no {name}; it has {', '.join(self._arrays.variables)}"
            )
        with self._unreplaced():
            return self._arrays.read(name, region)

    @contextmanager
    def _unreplaced(self) -> Iterator[None]:
        """What the body reads is of the result that was opened, and not in part of one put in its place.

        Raises:
            InputError: it is not.
        """
        broken = None
        try:
            yield
        except InputError as error:
            broken = error
        if self._arrays.location.version(ROOT) != self._version:
            raise InputError(
                f"{self.url} was replaced or removed after it was opened; open it again"
            ) from broken
        if broken is not None:
            raise broken

    def _positions(self, targets: slice | Sequence[int]) -> NDArray[np.int64]:
        if isinstance(targets, slice):
            return np.arange(len(self))[targets]
        given = np.asarray(targets)
        if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
            raise InputError("targets must be a slice or a list of positions")
        rows = given.astype(np.int64)
        wrong = rows[(rows < -len(self)) | (rows >= len(self))]
        if len(wrong):
            raise InputError(f"{self.url} has {len(self)} targets, none at {wrong[0]}")
        return np.where(rows < 0, rows + len(self), rows)

    def _rows(self, name: str, rows: NDArray[np.int64] | None) -> NDArray[Any]:
        """A variable, or some of its rows: what they need of each chunk is read once."""
        if rows is None:
            return self._arrays.read(name)
        variable = self._arrays.variables[name]
        rest = [self._arrays.sizes[dim] for dim in variable.dims[1:]]
        values: NDArray[Any] = np.empty((len(rows), *rest), dtype=variable.dtype)
        chunks = rows // variable.chunks[0]
        for chunk in np.unique(chunks):
            chosen = np.flatnonzero(chunks == chunk)
            first, last = int(rows[chosen].min()), int(rows[chosen].max())
            part = self._arrays.read(name, (slice(first, last + 1),))
            values[chosen] = part[rows[chosen] - first]
        return values


def open_result(url: str | Path) -> StoredResult:
    """Open a result that was estimated with ``out=``, or saved.

    Args:
        url: path or fsspec URL.

    Raises:
        InputError: no result there, not a result, one that is not finished, damaged, or of a later
            version; or zarr is not installed (``pip install turnover[results]``).
    """
    location = Location(url)
    version = location.version(ROOT)
    root = read_sealed(location, ROOT)
    if root is None:
        if read_sealed(location, STARTED) is not None:
            raise InputError(
                f"{url} is not finished: repeat the call that began it, and it goes on where it was cut off"
            )
        if location.is_vacant():
            raise InputError(f"{url}: there is no result; check the path, or estimate with out=")
        raise InputError(f"{url} is not a turnover result: it has no {ROOT}")
    kind, variables, sizes = read_schema(root, str(url))
    arrays = Arrays(location, variables, sizes, finished=True)
    return StoredResult(str(url), kind, attributes_of(root), arrays, version)
