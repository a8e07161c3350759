"""Writes a result to disk, block by block."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.io.parsing import convert, parse_json
from turnover.results.arrays import MISSING, Arrays, Region, Variable, metadata_files
from turnover.results.calibration import GhostPool
from turnover.results.location import PROGRESS, ROOT, Location
from turnover.results.manifest import (
    SIGNATURE,
    STARTED,
    Coordinates,
    check_same,
    dtype_of,
    manifest_of,
    plain,
    read_sealed,
    seal,
)
from turnover.results.schema import DESCRIBED

if TYPE_CHECKING:
    from turnover.influence.signature import Signed

_DIGEST = f"{PROGRESS}/digest"
_SIGNATURE = f"{PROGRESS}/signature"
_ROWS = 2**14
"""Targets in a chunk of what holds one value for each, which is rewritten as targets come."""
CELLS = 2**20
"""Values in a chunk of a saved result, and ghost scores in memory at once."""
COLUMNS = 2**16
"""Longest chunk along the second dimension of a saved result, and of coordinates."""
_CAPACITY = 2**40
"""Length of the growing dimension until it is known."""
_HALVED = f"{PROGRESS}/halved"
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


class Writer:
    """Writes one result.

    Attributes:
        complete: the result is finished: there is nothing to write. Targets are still compared.
        location: of the result.
        manifest: that it was begun with.
        renew: keeps the right to write; call it now and then while other processes write.
    """

    def __init__(
        self,
        location: Location,
        manifest: Mapping[str, Any],
        coordinates: Coordinates,
        *,
        complete: bool,
        renew: Callable[[], None] = lambda: None,
        announced: int = 0,
    ) -> None:
        self.complete = complete
        self.location, self.renew = location, renew
        self.manifest = manifest
        self._coordinates = coordinates
        self._variables = {
            name: Variable(tuple(v["dims"]), v["dtype"], tuple(v["chunks"]))
            for name, v in manifest["variables"].items()
        }
        self._sizes: dict[str, int] = dict(manifest["sizes"])
        unknown = {dim for v in self._variables.values() for dim in v.dims} - self._sizes.keys()
        if len(unknown) > 1:
            raise ValueError(f"sizes of {sorted(unknown)} are missing")
        self._grows = next(iter(unknown), None)
        self._journal: dict[str, Variable] = {}
        if self._grows:
            rows = {v.chunks[0] for v in self._variables.values() if v.dims[:1] == (self._grows,)}
            if len(rows) > 1:
                raise ValueError(f"chunks of {self._grows} differ: {sorted(rows)}")
            self._step = rows.pop()
            self._journal = _journal(self._grows, self._sizes.get(SIGNATURE))
            self._sizes[self._grows] = announced
        self._written = self._variables | {
            name: Variable((dim,), dtype_of(values), (COLUMNS,))
            for name, (dim, values) in coordinates.items()
        }
        everything = self._written | self._journal
        self._arrays = Arrays(location, everything, self._sizes, finished=complete)

    def begin(self) -> None:
        """Begin the result, or continue one of the same manifest, which is written first."""
        found = read_sealed(self.location, STARTED)
        if found is None:
            if not self.location.is_vacant():
                raise InputError(f"{self.location.url} is not a turnover result; give another path")
            group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
            self.location.put(STARTED, seal(group, self.manifest))
        else:
            stored = manifest_of(found)
            check_same(self.location, stored, self.manifest)
            self.manifest = stored
            if SIGNATURE not in stored["sizes"]:  # an older version began it: it stays without
                self._sizes.pop(SIGNATURE, None)
                self._journal.pop(_SIGNATURE, None)
        self.location.remove_partial()
        sizes = self._sizes | ({self._grows: _CAPACITY} if self._grows else {})
        self._put_metadata(self._written | self._journal, sizes)
        for name, (_, values) in self._coordinates.items():
            self._arrays.write(name, (), values)

    @property
    def has_signature(self) -> bool:
        """Whether the result records what the objective computes on its targets."""
        return SIGNATURE in self._sizes

    @property
    def halved(self) -> dict[str, int]:
        """Bounds of forwards that did not fit a device's memory, as last noted; none at first."""
        raw = self.location.get(_HALVED)
        if raw is None:
            return {}
        where = f"{self.location.url}: {_HALVED}"
        most = convert(parse_json(raw, where), dict[str, int], where)
        if min(most.values(), default=1) < 1:
            raise InputError(f"{where}: damaged, bounds are at least 1; delete it")
        return most

    def note_halved(self, most: Mapping[str, int]) -> None:
        """Note bounds of forwards, for whoever continues the result."""
        self.renew()
        self.location.put(_HALVED, json.dumps(dict(most)).encode())

    def announce(
        self,
        start: int,
        digests: NDArray[np.uint64],
        ids: NDArray[np.int64] | None = None,
        labels: NDArray[np.int64] | None = None,
        signed: Signed | None = None,
    ) -> None:
        """Record targets before their rows are written, or compare them with those recorded earlier.

        Args:
            start: first row: a multiple of the chunk length, and at most the number of rows announced.
            digests: uint64 (rows,): hashes of the targets' contents.
            ids: int64 (rows,), ``None`` if they have none; kept if all targets have ids.
            labels: int64 (rows,), likewise.
            signed: what the objective computes on them, if :attr:`has_signature`.
        """
        assert self._grows is not None
        announced = self._sizes[self._grows]
        if start % self._step or start > announced:
            raise ValueError(f"rows from {start}, in chunks of {self._step}, after {announced}")
        stop = start + len(digests)
        self._sizes[self._grows] = max(announced, stop)
        given = np.asarray(digests, dtype=np.uint64)
        if ids is not None:
            given = given ^ (np.asarray(ids, dtype=np.int64).view(np.uint64) * _SPREAD)
        given = np.where(given == 0, np.uint64(1), given)  # 0: not announced yet
        # The rest of the last chunk, too: it may have been written with more rows than now.
        whole = -(-stop // self._step) * self._step
        stored = self._arrays.fetch(_DIGEST, ((start, whole),))
        if not stored.any() and not self.complete:
            self._record((start, stop), (ids, labels, given), signed)
            return
        differ = np.flatnonzero(stored != np.pad(given, (0, whole - stop)))
        if len(differ):
            raise InputError(
                f"{self.location.url} was begun with other targets: {self._grows} {start + differ[0]} "
                f"differs; give the same targets in the same order, or another path"
            )
        if signed is not None:
            self._check_signature(start, stop, signed)

    def _check_signature(self, start: int, stop: int, signed: Signed) -> None:
        columns = self._sizes[SIGNATURE]
        stored = self._arrays.fetch(_SIGNATURE, ((start, stop), (0, columns)))
        if np.isnan(stored[~np.isnan(signed.values)]).any():
            raise InputError(
                f"{self.location.url}: {_SIGNATURE} is missing or damaged, so another objective would go "
                f"unnoticed; give another path, or delete it"
            )
        if (found := signed.difference(stored)) is None:
            return
        then, now = stored[found], signed.values[found]
        raise InputError(
            f"{self.location.url} holds scores by another objective, which has the name "
            f"{self.manifest['identity']['objective']!r} as well, or by another network of the same "
            f"weights: for {self._grows} {start + found[0]} it computed {then:.6g}, now it computes "
            f"{now:.6g}; give another path, or delete it"
        )

    def read(self, name: str, region: Region = ()) -> NDArray[Any] | None:
        """A region that was written before, ``None`` if any of its chunks was not."""
        if next(self._arrays.absent(name, self._arrays.bounds(name, region)), None) is not None:
            return None
        return self._arrays.read(name, region)

    def write(self, name: str, region: Region, values: NDArray[Any]) -> None:
        """Write a region of whole chunks (ragged at the end of a dimension)."""
        if self.complete:
            raise ValueError(f"{self.location.url} is complete")
        self.renew()
        self._arrays.write(name, region, values)

    def finish(self, targets: int | None = None, **attributes: Any) -> None:
        """Check that everything was written, add the noise floor, and mark the result complete.

        Args:
            targets: their number, if it was not known before.
            attributes: JSON values to store beside the identity. Together they must hold method,
                objective, sites, network and considered.
        """
        if self._grows:
            self._check_count(self._grows, targets)
        if self.complete:
            return
        described = {**self.manifest["identity"], **plain(attributes)}
        known = {key: described[key] for key in (*DESCRIBED, *attributes)}
        for name in self._written:
            self._arrays.check_present(name)
        variables = self._written | self._kept() | self._calibrate()
        names = (name for name in (*self._coordinates, *self._journal) if name in variables)
        # How xarray recognizes coordinates that are not dimensions.
        if labels := " ".join(name for name in names if name not in self._sizes):
            known["coordinates"] = labels
        self.renew()
        root = self._put_metadata(variables, self._sizes, known)
        self.location.put(ROOT, seal(json.loads(root), self.manifest))
        self.complete = True

    def _check_count(self, grows: str, targets: int | None) -> None:
        announced = self._sizes[grows]
        count = announced if targets is None else targets
        if count != announced and (announced or not self.complete):
            raise ValueError(f"{count} targets, {announced} were announced")
        if not count and not self.complete:
            raise InputError("no targets given")
        if count and self._arrays.fetch(_DIGEST, ((count, count + 1),)).any():
            raise InputError(
                f"{self.location.url} was begun with more than {count} targets; give the same targets, or "
                f"another path"
            )

    def _put_metadata(
        self, variables: Mapping[str, Variable], sizes: Mapping[str, int], attributes: Any = None
    ) -> bytes:
        """Write every array's metadata; returns the group's."""
        files = metadata_files(variables, sizes, attributes or {})
        for name in variables:
            self.location.put(f"{name}/zarr.json", files[f"{name}/zarr.json"])
        return files[ROOT]

    def _record(
        self, rows: tuple[int, int], known: Sequence[NDArray[Any] | None], signed: Signed | None
    ) -> None:
        """Write ids, labels and digests of targets; the digests last, which say that all is there."""
        self.renew()
        count = rows[1] - rows[0]
        if self.has_signature:
            columns = self._sizes[SIGNATURE]
            values = np.full((count, columns), np.nan) if signed is None else signed.values
            self._arrays.patch(_SIGNATURE, (rows, (0, columns)), values)
        for name, given in zip(self._journal, known, strict=False):
            values = np.full(count, MISSING) if given is None else np.asarray(given)
            self._arrays.patch(name, (rows,), values)

    def _kept(self) -> dict[str, Variable]:
        """Ids and labels of the targets, each if all targets have one; else they are removed."""
        kept = {name: v for name, v in self._journal.items() if not name.startswith(PROGRESS)}
        for name in [name for name in kept if (self._arrays.read(name) == MISSING).any()]:
            self.location.remove(name)
            del kept[name]
        return kept

    def _calibrate(self) -> dict[str, Variable]:
        """Write noise floor and null distribution of the ghosts, read a block of targets at a time."""
        ghost = self._variables.get("ghost")
        if ghost is None:
            return {}
        dims, pool = ghost.dims[:-1], GhostPool()
        regions: list[Region] = [()]
        if dims:
            rows, width = (self._sizes[dim] for dim in ghost.dims)
            step = max(1, CELLS // (width * ghost.chunks[0])) * ghost.chunks[0]
            regions = [(slice(i, min(i + step, rows)),) for i in range(0, rows, step)]
        floors = [pool.add(np.atleast_2d(self._arrays.read("ghost", one))) for one in regions]
        shape = tuple(self._sizes[dim] for dim in dims)
        values = {
            "ghost_mean": np.concatenate([floor.mean for floor in floors]).reshape(shape),
            "noise_floor": np.concatenate([floor.sd for floor in floors]).reshape(shape),
            "null": pool.null().values,
        }
        self._sizes["pool"] = len(values["null"])
        floor = Variable(dims, "float64", tuple(_ROWS for _ in dims))
        null = Variable(("pool",), "float64", (COLUMNS,))
        made = {"ghost_mean": floor, "noise_floor": floor, "null": null}
        self._put_metadata(made, self._sizes)
        self._arrays.variables.update(made)
        for name, value in values.items():
            self._arrays.write(name, (), value)
        return made


def _journal(grows: str, columns: int | None) -> dict[str, Variable]:
    """What is recorded of the rows of a growing dimension."""
    integers = Variable((grows,), "int64", (_ROWS,))
    digests = Variable((grows,), "uint64", (_ROWS,))
    found = {grows: integers, f"{grows}_label": integers, _DIGEST: digests}
    if columns is not None:
        found[_SIGNATURE] = Variable((grows, SIGNATURE), "float64", (_ROWS, columns))
    return found
