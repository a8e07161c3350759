"""Arrays of a result as zarr stores them: in chunks that are whole or absent, each with a checksum."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.io.parsing import damage
from turnover.results.location import Location

Region = tuple[slice, ...]
Bounds = tuple[tuple[int, int], ...]
MISSING = int(np.iinfo(np.int64).min)
"""In place of an id or label that a target does not have."""
DTYPES = frozenset({"bool", "float16", "float32", "float64", "string"}) | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
CODECS = frozenset({"bytes", "vlen-utf8", "zstd", "crc32c"})
_LEVEL = 3
_DIMENSION_NAMES = {"ghost": "ghost_id"}
"""Dimensions renamed on disk: xarray takes a variable with the name of its dimension for a coordinate."""
_READ_ERRORS = (ValueError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class Variable:
    """Layout of an array.

    Attributes:
        dims: names of its dimensions.
        dtype: name of its numpy type, or ``"string"``.
        chunks: length of a chunk along each dimension: what is written and read at once.
    """

    dims: tuple[str, ...]
    dtype: str
    chunks: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.dims) != len(self.chunks) or any(length < 1 for length in self.chunks):
            raise ValueError(f"dimensions {self.dims} need a chunk length each, got {self.chunks}")
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.dtype} cannot be stored")


def metadata_files(
    variables: Mapping[str, Variable], sizes: Mapping[str, int], attributes: Mapping[str, Any]
) -> dict[str, bytes]:
    """The zarr.json files of a group of arrays, with consolidated metadata: key to contents."""
    import zarr
    from zarr.storage import MemoryStore

    held: dict[str, Any] = {}
    store = MemoryStore(held)
    group = zarr.create_group(store, zarr_format=3, attributes=dict(attributes))
    for name, variable in variables.items():
        group.create_array(
            name,
            shape=tuple(sizes[dim] for dim in variable.dims),
            chunks=variable.chunks,
            dtype=variable.dtype,
            fill_value=_fill_value(variable.dtype),
            compressors=[zarr.codecs.ZstdCodec(level=_LEVEL), zarr.codecs.Crc32cCodec()],
            dimension_names=tuple(_DIMENSION_NAMES.get(dim, dim) for dim in variable.dims),
        )
    with warnings.catch_warnings():
        # Readers that do not know consolidated metadata find the same in every array's own file.
        warnings.simplefilter("ignore", UserWarning)
        zarr.consolidate_metadata(store, zarr_format=3)
    return {key: value.to_bytes() for key, value in held.items()}


def _fill_value(dtype: str) -> Any:
    number = float("nan") if dtype.startswith("float") else 0
    return {"string": "", "int64": MISSING, "bool": False}.get(dtype, number)


@dataclass(frozen=True, eq=False)
class Arrays:
    """Reads and writes regions of the arrays of a result.

    Attributes:
        location: of the result.
        variables: layouts, by path; may be added to.
        sizes: length of each dimension; that of a growing one may be changed.
        finished: read only, and through consolidated metadata.
    """

    location: Location
    variables: dict[str, Variable]
    sizes: dict[str, int]
    finished: bool
    _opened: dict[str, Any] = field(default_factory=dict)

    def read(self, name: str, region: Region = ()) -> NDArray[Any]:
        """A region of an array, all of whose chunks must be present."""
        bounds = self.bounds(name, region)
        self.check_present(name, bounds)
        values = self.fetch(name, bounds)
        self.check_present(name, bounds)  # a chunk removed meanwhile was read as fill values
        return values

    def check_present(self, name: str, bounds: Bounds | None = None) -> None:
        """Fail if a chunk of a region, or of all, was not written."""
        absent = next(self.absent(name, bounds), None)
        if absent is not None:
            fix = self._fix if self.finished else "run again"
            raise InputError(f"{self.location.url}: {absent} is missing; {fix}")

    def fetch(self, name: str, bounds: Bounds) -> NDArray[Any]:
        """A region of an array, with fill values for chunks that were not written."""
        try:
            return np.asarray(self._array(name)[tuple(slice(*bound) for bound in bounds)])
        except _READ_ERRORS as error:
            raise self._damaged(name, bounds, error) from error

    def write(self, name: str, region: Region, values: NDArray[Any]) -> None:
        """Write a region of whole chunks (ragged at the end of a dimension)."""
        variable, bounds = self.variables[name], self.bounds(name, region)
        array = np.asarray(values)
        shape = tuple(stop - start for start, stop in bounds)
        same = variable.dtype == "string" or array.dtype.name == variable.dtype
        if array.shape != shape or not same:
            raise ValueError(
                f"{name}: region {shape} of {variable.dtype}, got {array.dtype} {array.shape}"
            )
        for dim, (start, stop), chunk in zip(variable.dims, bounds, variable.chunks, strict=True):
            if start % chunk or (stop % chunk and stop != self.sizes[dim]):
                raise ValueError(f"{name}: {dim} {start}:{stop} cuts a chunk of {chunk}")
        self.patch(name, bounds, array)

    def patch(self, name: str, bounds: Bounds, values: NDArray[Any]) -> None:
        """Write a region that may cut chunks, each of which is replaced as a whole."""
        if 0 in values.shape:
            return
        with self.location.writing():
            try:
                self._array(name)[tuple(slice(*bound) for bound in bounds)] = values
            except (ValueError, RuntimeError) as error:
                raise self._damaged(name, bounds, error) from error

    def absent(self, name: str, bounds: Bounds | None = None) -> Iterator[str]:
        """Keys of the chunks of a region, or of all, that were not written."""
        grid = self._grid(name, self.bounds(name, ()) if bounds is None else bounds)
        if not grid:
            if not self.location.exists(_chunk_key(name)):
                yield _chunk_key(name)
            return
        *outer, last = grid
        for index in product(*outer):
            folder = _chunk_key(name, *index)
            if len(last) > 1:  # list the folder once instead of asking for each chunk
                present = self.location.names(folder)
            else:
                present = {str(i) for i in last if self.location.exists(f"{folder}/{i}")}
            yield from (f"{folder}/{i}" for i in last if str(i) not in present)

    def bounds(self, name: str, region: Region) -> Bounds:
        """Start and stop along every dimension; dimensions that the region leaves out are whole."""
        dims = self.variables[name].dims
        if len(region) > len(dims):
            raise ValueError(f"{name} has dimensions {dims}, got a region of {len(region)}")
        bounds = []
        every = (*region, *[slice(None)] * (len(dims) - len(region)))
        for dim, part in zip(dims, every, strict=True):
            size = self.sizes[dim]
            start, stop = part.start or 0, size if part.stop is None else part.stop
            if not 0 <= start <= stop <= size:
                raise ValueError(f"{name}: {dim} {start}:{stop} is not within {size}")
            bounds.append((start, stop))
        return tuple(bounds)

    def _grid(self, name: str, bounds: Bounds) -> list[range]:
        pairs = zip(bounds, self.variables[name].chunks, strict=True)
        return [range(start // size, -(-stop // size)) for (start, stop), size in pairs]

    def _damaged(self, name: str, bounds: Bounds, error: Exception) -> InputError:
        """An error that names the first chunk of a region that cannot be read."""
        key = name
        for index in product(*self._grid(name, bounds)):
            try:
                self._array(name).blocks[index]
            except _READ_ERRORS:
                key = _chunk_key(name, *index)
                break
        return InputError(f"{self.location.url}: {key} is damaged ({error}); {self._fix}")

    def _array(self, name: str) -> Any:
        if name not in self._opened:
            with damage(f"{self.location.url}: the metadata of {name}", self._fix):
                self._opened[name] = self._open(name)
        return self._opened[name]

    def _open(self, name: str) -> Any:
        import zarr

        if self.finished and name in self._group:
            return self._group[name]
        mode = "r" if self.finished else "r+"
        # A chunk's existence says that it was written, whatever it holds.
        with zarr.config.set({"array.write_empty_chunks": True}):
            return zarr.open_array(self._store, path=name, mode=mode, zarr_format=3)

    @cached_property
    def _store(self) -> Any:
        return self.location.zarr_store(writable=not self.finished)

    @cached_property
    def _group(self) -> Any:
        import zarr

        return zarr.open_group(self._store, mode="r", zarr_format=3, use_consolidated=True)

    @property
    def _fix(self) -> str:
        if not self.finished:
            return "delete that file and run again to compute it anew"
        return "delete the store and estimate again"


def _chunk_key(name: str, *index: int) -> str:
    return "/".join((name, "c", *map(str, index)))
