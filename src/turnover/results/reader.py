"""Opens results on disk, checks them, and reads them in part or as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError, needing
from turnover.results.arrays import Arrays
from turnover.results.calibration import NoiseFloor, NullDistribution, StudentNull
from turnover.results.location import ROOT, Location
from turnover.results.manifest import ATTRIBUTE, STARTED, read_sealed
from turnover.results.result import Result
from turnover.results.schema import DESCRIBED, read_schema
from turnover.results.strongest import check_rows

if TYPE_CHECKING:
    import pandas
    import xarray


@dataclass(frozen=True, repr=False)
class StoredResult:
    """A finished result on disk; only ids and attributes are in memory.

    Attributes:
        url: path or URL.
        kind: ``"dense"`` (targets x train), ``"top"`` (the extremes of each target), ``"aggregate"`` or
            ``"self"`` (one score for each training id).
        attributes: method, objective, sites, network, considered, and others that were stored.
    """

    url: str
    kind: str
    attributes: Mapping[str, Any]
    _arrays: Arrays
    _version: str

    def __len__(self) -> int:
        """Number of targets; of training ids if each has one score."""
        return self._arrays.sizes[self._arrays.variables["score"].dims[0]]

    def __repr__(self) -> str:
        """Location, shape and method in one line."""
        sizes, dims = self._arrays.sizes, self._arrays.variables["score"].dims
        shape = " x ".join(f"{sizes[dim]:,} {dim}" for dim in dims)
        of = f"{self.attributes['method']}, objective {self.attributes['objective']}"
        return f"<turnover.StoredResult {self.url}: {self.kind}, {shape}, {of}>"

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>"

    def to_dataframe(self) -> pandas.DataFrame:
        """As :meth:`turnover.Result.to_dataframe`; a result too large for it is refused before it is read."""
        variable = self._arrays.variables["score"]
        rows = math.prod(self._arrays.sizes[dim] for dim in variable.dims)
        check_rows(rows, f"the scores of {self.url}", "take some targets, .load(targets)")
        return self.load().to_dataframe()

    @cached_property
    def dataset(self) -> xarray.Dataset:
        """The whole result as a lazy dataset, with ids and labels as coordinates.

        xarray reports damaged chunks, but reads a missing chunk as NaN; :meth:`load` reports both.

        Raises:
            InputError: xarray is not installed (``pip install turnover[results]``).
        """
        with needing("a labelled dataset", "turnover[results]"):
            import xarray

        for name in self._arrays.sizes.keys() & self._arrays.variables.keys():
            self.part(name)  # xarray makes indexes of these now, and would not name a damaged one
        store = self._arrays.location.zarr_store(writable=False)
        dataset = xarray.open_zarr(store, consolidated=True, zarr_format=3)
        dataset.attrs = dict(self.attributes)
        return dataset

    @cached_property
    def target_ids(self) -> NDArray[np.int64] | None:
        """int64 (targets,), if the targets had ids."""
        return self.part("target") if "target" in self._arrays.variables else None

    @cached_property
    def train_ids(self) -> NDArray[np.int64]:
        """int64 (train,); (targets, ranks) if only the extremes are held."""
        return self.part("train_id" if self.kind == "top" else "train")

    @cached_property
    def null(self) -> NullDistribution | StudentNull:
        """The distribution that turns z into p."""
        if "freedom" in self.attributes:
            return StudentNull(self.attributes["freedom"])
        return NullDistribution(self.part("null"))

    def load(self, targets: slice | Sequence[int] | None = None) -> Result:
        """Read the result, or some of its targets, into memory.

        Args:
            targets: their positions (not ids), counted from the end if negative; ``None``: all.

        Raises:
            InputError: a position does not exist, the result has no targets to choose from, a chunk is
                missing or damaged, or the result was replaced after it was opened.
        """
        if targets is not None and self.kind not in {"dense", "top"}:
            raise InputError(f"{self.url} has no targets to choose from; load() reads all of it")
        rows = None if targets is None else self._positions(targets)
        with self._unreplaced():
            return self._load(rows)

    def _load(self, rows: NDArray[np.int64] | None) -> Result:
        ids = self.target_ids
        described: dict[str, Any] = {name: self.attributes[name] for name in DESCRIBED}
        described["sites"] = tuple(described["sites"])
        for name in sorted({"standard_error", "exact", "recall"} & self._arrays.variables.keys()):
            described[name] = self._rows(name, rows)
        return Result(
            scores=self._rows("score", rows),
            floor=NoiseFloor(self._rows("ghost_mean", rows), self._rows("noise_floor", rows)),
            null=self.null,
            train_ids=self._rows("train_id", rows) if self.kind == "top" else self.train_ids,
            target_ids=ids if ids is None or rows is None else ids[rows],
            **described,
        )

    def part(self, name: str, *region: slice) -> NDArray[Any]:
        """Read a region of a variable; only the chunks that it touches are read.

        Args:
            name: a stored variable, such as ``"score"``.
            region: a slice along each dimension, from the first; those left out are whole.

        Raises:
            InputError: no such variable, a chunk is missing or damaged, or the result was replaced after it
                was opened.
        """
        if name not in self._arrays.variables:
            raise InputError(
                f"{self.url} has no {name}; it has {', '.join(self._arrays.variables)}"
            )
        with self._unreplaced():
            return self._arrays.read(name, region)

    @contextmanager
    def _unreplaced(self) -> Iterator[None]:
        """Fail if the result was replaced while the body read it."""
        try:
            yield
        finally:
            if self._arrays.location.version(ROOT) != self._version:
                raise InputError(
                    f"{self.url} was replaced or removed after it was opened; open it again"
                )

    def _positions(self, targets: slice | Sequence[int]) -> NDArray[np.int64]:
        if isinstance(targets, slice):
            return np.arange(len(self))[targets]
        given = np.asarray(targets)
        if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
            raise InputError("targets must be a slice or a list of positions")
        try:
            return np.arange(len(self))[given.astype(np.int64)]
        except IndexError as error:
            raise InputError(f"{self.url} has {len(self)} targets: {error}") from error

    def _rows(self, name: str, rows: NDArray[np.int64] | None) -> NDArray[Any]:
        """A variable, or some of its rows; each of their chunks is read once."""
        if rows is None:
            return self._arrays.read(name)
        variable = self._arrays.variables[name]
        rest = [self._arrays.sizes[dim] for dim in variable.dims[1:]]
        values: NDArray[Any] = np.empty((len(rows), *rest), dtype=variable.dtype)
        chunks = rows // variable.chunks[0]
        for chunk in np.unique(chunks):
            chosen = chunks == chunk
            first = int(rows[chosen].min())
            part = self._arrays.read(name, (slice(first, int(rows[chosen].max()) + 1),))
            values[chosen] = part[rows[chosen] - first]
        return values


def open_result(url: str | Path) -> StoredResult:
    """Open a result that was estimated with ``out=``, or saved.

    Args:
        url: path or fsspec URL.

    Raises:
        InputError: no result, one that is not finished, damaged, or of a later version; or zarr is not
            installed (``pip install turnover[results]``).
    """
    location = Location(url)
    version = location.version(ROOT)
    root = read_sealed(location, ROOT)
    if root is None:
        if read_sealed(location, STARTED) is not None:
            raise InputError(
                f"{url} is not finished: repeat the call that began it, which continues where it was cut off"
            )
        if location.is_vacant():
            raise InputError(f"{url}: there is no result; check the path, or estimate with out=")
        raise InputError(f"{url} is not a turnover result: it has no {ROOT}")
    kind, variables, sizes = read_schema(root, str(url))
    own = {k: v for k, v in root["attributes"].items() if k not in {ATTRIBUTE, "coordinates"}}
    arrays = Arrays(location, variables, sizes, finished=True)
    return StoredResult(str(url), kind, own, arrays, version)
