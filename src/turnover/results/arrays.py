"""Arrays of a result as zarr keeps them: in chunks that are whole or absent, with a checksum each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.io.files import writing_to
from turnover.io.parsing import damage
from turnover.results.location import Place

Region = tuple[slice, ...]
Bounds = tuple[tuple[int, int], ...]
MISSING = int(np.iinfo(np.int64).min)
"""Stands for an id or label that a target does not have."""
DTYPES = frozenset({"bool", "float16", "float32", "float64", "string"}) | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
CODECS = frozenset({"bytes", "vlen-utf8", "zstd", "crc32c"})
_LEVEL = 3
_NAMED = {"ghost": "ghost_id"}
"""Dimensions on disk: xarray would take a variable named as its dimension for a coordinate."""


@dataclass(frozen=True)
class Variable:
    """Shape of an array in a store.

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

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


def documents(
    variables: Mapping[str, Variable], sizes: Mapping[str, int], attributes: Mapping[str, Any]
) -> dict[str, bytes]:
    """The zarr.json files of a group with consolidated metadata: key to contents.

    Args:
        variables: arrays of the group.
        sizes: length of each of their dimensions.
        attributes: of the group, JSON values.
    """
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
            fill_value=_fill(variable.dtype),
            compressors=[zarr.codecs.ZstdCodec(level=_LEVEL), zarr.codecs.Crc32cCodec()],
            dimension_names=tuple(_NAMED.get(dim, dim) for dim in variable.dims),
        )
    with warnings.catch_warnings():
        # Readers that do not know consolidated metadata find the same in every array's own file.
        warnings.simplefilter("ignore", UserWarning)
        zarr.consolidate_metadata(store, zarr_format=3)
    return {key: value.to_bytes() for key, value in held.items()}


def _fill(dtype: str) -> Any:
    if dtype == "string":
        return ""
    if dtype.startswith("float"):
        return float("nan")
    return {"int64": MISSING, "bool": False}.get(dtype, 0)


class Blocks:
    """Reads and writes regions of the arrays of a store.

    Args:
        place: where.
        variables: the arrays, by path.
        sizes: length of each dimension; one that grows may be changed.
        finished: the store is complete: read only, and through its consolidated metadata.
    """

    def __init__(
        self,
        place: Place,
        variables: Mapping[str, Variable],
        sizes: dict[str, int],
        *,
        finished: bool,
    ) -> None:
        self.place = place
        self.variables = variables
        self.sizes = sizes
        self._finished = finished
        self._store = place.zarr(writable=not finished)
        self._arrays: dict[str, Any] = {}

    def read(self, name: str, region: Region = ()) -> NDArray[Any]:
        """A region of an array.

        Raises:
            InputError: a chunk is missing or damaged.
        """
        bounds = self.bounds(name, region)
        self._all_there(name, bounds)
        values = self.fetch(name, bounds)
        self._all_there(name, bounds)  # one that went in the meantime was read as fill values
        return values

    def _all_there(self, name: str, bounds: Bounds) -> None:
        absent = next(self.absent(name, bounds), None)
        if absent is not None:
            raise InputError(f"{self.place.url}: {absent} is missing; {self._mend()}")

    def fetch(self, name: str, bounds: Bounds) -> NDArray[Any]:
        """A region of an array, with fill values where a chunk was not written.

        Raises:
            InputError: a chunk is damaged.
        """
        try:
            return self._read(name, bounds)
        except (ValueError, RuntimeError, MemoryError) as error:
            raise self._broken(name, bounds, error) from error

    def write(self, name: str, region: Region, values: NDArray[Any]) -> None:
        """Write a region of whole chunks (ragged at the end of a dimension).

        Raises:
            ValueError: the region cuts a chunk, or values of another shape or type.
        """
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
        """Write a region that may cut chunks, each of which is replaced as a whole.

        Raises:
            InputError: a chunk that is cut is damaged.
            WriteError: a local disk is full, or nothing can be written there.
        """
        if 0 in values.shape:
            return
        # A remote store says itself what is wrong with it.
        with nullcontext() if self.place.local is None else writing_to(self.place.url):
            try:
                self._array(name)[tuple(slice(*bound) for bound in bounds)] = values
            except (ValueError, RuntimeError) as error:
                raise self._broken(name, bounds, error) from error

    def absent(self, name: str, bounds: Bounds | None = None) -> Iterator[str]:
        """Keys of the chunks of a region, or of all, that were not written."""
        bounds = self.bounds(name, ()) if bounds is None else bounds
        grid = self._grid(name, bounds)
        if not grid:
            if not self.place.exists(f"{name}/c"):
                yield f"{name}/c"
            return
        # One listing of each folder of chunks, not a question for each chunk.
        last = grid[-1]
        for outer in product(*grid[:-1]):
            folder = "/".join((name, "c", *map(str, outer)))
            if len(last) == 1:
                if not self.place.exists(f"{folder}/{last[0]}"):
                    yield f"{folder}/{last[0]}"
                continue
            found = self.place.names(folder) if last else set()
            yield from (f"{folder}/{index}" for index in last if str(index) not in found)

    def bounds(self, name: str, region: Region) -> Bounds:
        """Start and stop along every dimension; those that the region leaves out are whole."""
        dims = self.variables[name].dims
        if len(region) > len(dims):
            raise ValueError(f"{name} has dimensions {dims}, got a region of {len(region)}")
        whole = (*region, *[slice(None)] * (len(dims) - len(region)))
        bounds = []
        for dim, part in zip(dims, whole, strict=True):
            start = 0 if part.start is None else part.start
            stop = self.sizes[dim] if part.stop is None else part.stop
            if not 0 <= start <= stop <= self.sizes[dim]:
                raise ValueError(f"{name}: {dim} {start}:{stop} is not within {self.sizes[dim]}")
            bounds.append((start, stop))
        return tuple(bounds)

    def _grid(self, name: str, bounds: Bounds) -> list[range]:
        chunks = self.variables[name].chunks
        pairs = zip(bounds, chunks, strict=True)
        return [range(start // size, -(-stop // size)) for (start, stop), size in pairs]

    def _broken(self, name: str, bounds: Bounds, error: Exception) -> InputError:
        key = self._damaged(name, bounds)
        return InputError(f"{self.place.url}: {key} is damaged ({error}); {self._mend()}")

    def _damaged(self, name: str, bounds: Bounds) -> str:
        """Key of the first chunk of a region that cannot be read."""
        chunks = self.variables[name].chunks
        for index in product(*self._grid(name, bounds)):
            pairs = zip(index, bounds, chunks, strict=True)
            part = tuple((max(i * n, lo), min((i + 1) * n, hi)) for i, (lo, hi), n in pairs)
            try:
                self._read(name, part)
            except (ValueError, RuntimeError, MemoryError):
                return "/".join((name, "c", *map(str, index)))
        return name

    def _read(self, name: str, bounds: Bounds) -> NDArray[Any]:
        return np.asarray(self._array(name)[tuple(slice(*bound) for bound in bounds)])

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            with damage(f"{self.place.url}: the description of {name}", self._mend()):
                self._arrays[name] = self._open(name)
        return self._arrays[name]

    def _open(self, name: str) -> Any:
        import zarr

        if self._finished and name in self._group:
            return self._group[name]
        mode = "r" if self._finished else "r+"
        # A chunk's existence says that it was written, whatever it holds.
        with zarr.config.set({"array.write_empty_chunks": True}):
            return zarr.open_array(self._store, path=name, mode=mode, zarr_format=3)

    @cached_property
    def _group(self) -> Any:
        import zarr

        return zarr.open_group(self._store, mode="r", zarr_format=3, use_consolidated=True)

    def _mend(self) -> str:
        if not self._finished:
            return "delete that file and run again to compute it anew"
        return "delete the store and estimate again"
