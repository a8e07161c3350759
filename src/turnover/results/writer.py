"""The writer of a result on disk, block by block."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.results.arrays import MISSING, Blocks, Region, Variable, documents
from turnover.results.calibration import GhostPool
from turnover.results.location import Place
from turnover.results.manifest import (
    BEGUN,
    ROOT,
    SIGNATURE,
    Coordinates,
    compare,
    dtype_of,
    growing,
    manifest,
    marked,
    plain,
    seal,
)
from turnover.results.schema import DESCRIBED

if TYPE_CHECKING:
    from turnover.influence.signature import Signed

_DIGEST = "progress/digest"
_SIGNATURE = "progress/signature"
_ROWS = 2**14
"""Targets in a chunk of what holds one value for each, which is rewritten as targets come."""
_CELLS = 2**20
"""Values in a chunk of a saved result, and ghost scores in memory at once."""
_COLUMNS = 2**16
_CAPACITY = 2**40
"""Length of the growing dimension until it is known."""
_SPREAD = np.uint64(0x9E3779B97F4A7C15)


class Writer:
    """Writes one result, from :func:`writing`.

    Attributes:
        complete: the result is finished: there is nothing to write. Targets are still compared.
        place: where it is.
        manifest: what it was begun with.
        renew: keeps the right to write; must be called now and then where others do the writing.
    """

    def __init__(
        self,
        place: Place,
        begun_with: Mapping[str, Any],
        coordinates: Coordinates,
        *,
        complete: bool,
        renew: Callable[[], None] = lambda: None,
        announced: int = 0,
    ) -> None:
        self.complete = complete
        self.place, self.renew = place, renew
        self.manifest: Mapping[str, Any] = begun_with
        self._coordinates = coordinates
        self._variables = {
            name: Variable(tuple(v["dims"]), v["dtype"], tuple(v["chunks"]))
            for name, v in begun_with["variables"].items()
        }
        self._sizes: dict[str, int] = dict(begun_with["sizes"])
        self._grows = growing(self._variables, self._sizes)
        self._journal: dict[str, Variable] = {}
        if self._grows:
            rows = {v.chunks[0] for v in self._variables.values() if v.dims[:1] == (self._grows,)}
            if len(rows) > 1:
                raise ValueError(f"chunks of {self._grows} differ: {sorted(rows)}")
            self._step = rows.pop()
            self._journal = _journal(self._grows, self._sizes.get(SIGNATURE))
            self._sizes[self._grows] = announced
        known = {
            name: Variable((dim,), dtype_of(values), (_COLUMNS,))
            for name, (dim, values) in coordinates.items()
        }
        self._written = {**self._variables, **known}
        everything = self._written | self._journal
        self._blocks = Blocks(place, everything, self._sizes, finished=complete)

    def begin(self) -> None:
        """Take the place: what it was begun with is noted first.

        Raises:
            InputError: it was begun with something else, or holds something else.
        """
        found = marked(self.place, BEGUN)
        if found is None:
            if not self.place.vacant():
                raise InputError(f"{self.place.url} is not a turnover result; give another place")
            group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
            self.place.put(BEGUN, seal(group, self.manifest))
        else:
            compare(self.place, manifest(found), self.manifest)
            self._go_on(manifest(found))
        self.place.sweep()
        self._describe(self._written | self._journal, _CAPACITY)
        for name, (_, values) in self._coordinates.items():
            self._blocks.write(name, (), values)

    @property
    def signed(self) -> bool:
        """Whether the store keeps what the objective computes on its targets."""
        return SIGNATURE in self._sizes

    def _go_on(self, begun_with: Mapping[str, Any]) -> None:
        """Keep what an older version began as that: what it did not note stays unknown."""
        self.manifest = begun_with
        if SIGNATURE not in begun_with["sizes"]:
            self._sizes.pop(SIGNATURE, None)
            self._journal.pop(_SIGNATURE, None)

    def targets(
        self,
        start: int,
        digests: NDArray[np.uint64],
        ids: NDArray[np.int64] | None = None,
        labels: NDArray[np.int64] | None = None,
        signed: Signed | None = None,
    ) -> None:
        """Announce rows ``start`` to ``start + len(digests)`` of the growing dimension, before they come.

        Args:
            start: a whole number of chunks, and not beyond the rows that were announced.
            digests: uint64 (rows,): hashes of the targets' contents.
            ids: int64 (rows,), or ``None`` where they have none; they are kept if all have some.
            labels: int64 (rows,), likewise.
            signed: what the objective computes on them, of a store that is :attr:`signed`.

        Raises:
            InputError: the store was begun with other targets, or another objective.
        """
        assert self._grows is not None
        count, announced = len(digests), self._sizes[self._grows]
        if start % self._step or start > announced:
            raise ValueError(f"rows from {start}, in chunks of {self._step}, after {announced}")
        stop = start + count
        self._sizes[self._grows] = max(announced, stop)
        given = np.asarray(digests, dtype=np.uint64)
        if ids is not None:
            given = given ^ (np.asarray(ids, dtype=np.int64).view(np.uint64) * _SPREAD)
        given = np.where(given == 0, np.uint64(1), given)  # 0: not announced yet
        # The rest of the last chunk, too: it may have been written with more rows than now.
        whole = -(-stop // self._step) * self._step
        stored = self._noted(start, whole)
        if not stored.any() and not self.complete:
            self._note(start, stop, given, ids, labels, signed)
            return
        differ = np.flatnonzero(stored != np.pad(given, (0, whole - stop)))
        if len(differ):
            raise InputError(
                f"{self.place.url} was begun with other targets: {self._grows} {start + differ[0]} differs; "
                f"give the same ones in the same order, or another place"
            )
        if signed is not None:
            self._check_signature(start, stop, signed)

    def _check_signature(self, start: int, stop: int, signed: Signed) -> None:
        columns = self._sizes[SIGNATURE]
        stored = self._blocks.fetch(_SIGNATURE, ((start, stop), (0, columns)))
        if np.isnan(stored[~np.isnan(signed.values)]).any():
            raise InputError(
                f"{self.place.url}: {_SIGNATURE} is missing or damaged, by which another objective would be "
                f"noticed; give another place, or delete it"
            )
        found = signed.difference(stored)
        if found is None:
            return
        then, now = stored[found], signed.values[found]
        raise InputError(
            f"{self.place.url} holds scores by another objective, which has the name "
            f"{self.manifest['identity']['objective']!r} as well, or by another network of the same "
            f"weights: for {self._grows} {start + found[0]} it computed {then:.6g}, now it computes "
            f"{now:.6g}; give another place, or delete it"
        )

    def read(self, name: str, region: Region = ()) -> NDArray[Any] | None:
        """A region that was written before, ``None`` where any chunk of it was not.

        Raises:
            InputError: a chunk is damaged.
        """
        if next(self._blocks.absent(name, self._blocks.bounds(name, region)), None) is not None:
            return None
        return self._blocks.read(name, region)

    def write(self, name: str, region: Region, values: NDArray[Any]) -> None:
        """Write a region of whole chunks, the ragged last ones included.

        Raises:
            InputError: another process has taken over a remote store.
        """
        if self.complete:
            raise ValueError(f"{self.place.url} is complete")
        self.renew()
        self._blocks.write(name, region, values)

    def finish(self, targets: int | None = None, **attributes: Any) -> None:
        """Check that all is there, add the noise floor, and mark the store complete.

        Args:
            targets: how many there are, where that was not known before.
            attributes: JSON values to store beside the identity. Together they must hold method,
                objective, sites, network and considered.

        Raises:
            InputError: the store was begun with more targets, a block was not written, or is damaged.
        """
        if self._grows:
            announced = self._sizes[self._grows]
            count = announced if targets is None else targets
            if count != announced and (announced or not self.complete):
                raise ValueError(f"{count} targets, {announced} were announced")
            if not count and not self.complete:
                raise InputError("no targets given")
            if count and self._noted(count, count + 1).any():
                raise InputError(
                    f"{self.place.url} was begun with more than {count} targets; give the same ones, or "
                    f"another place"
                )
        if self.complete:
            return
        described = {**self.manifest["identity"], **plain(attributes)}
        missing = [name for name in DESCRIBED if name not in described]
        if missing:
            raise ValueError(f"no {', '.join(missing)} given")
        for name in self._written:
            absent = next(self._blocks.absent(name), None)
            if absent is not None:
                raise InputError(f"{self.place.url}: {absent} is missing; run again")
        variables = self._written | self._kept() | self._summarise()
        names = [name for name in (*self._coordinates, *self._journal) if name in variables]
        known = {key: described[key] for key in (*DESCRIBED, *attributes)}
        # How xarray tells coordinates that are not dimensions.
        if labels := " ".join(name for name in names if name not in self._sizes):
            known["coordinates"] = labels
        self.renew()
        root = self._describe(variables, None, known)
        self.place.put(ROOT, seal(json.loads(root), self.manifest))
        self.complete = True

    def _describe(
        self, variables: Mapping[str, Variable], grown: int | None, attributes: Any = None
    ) -> bytes:
        """Write every array's metadata; returns the group's."""
        sizes = {**self._sizes}
        if self._grows and grown is not None:
            sizes[self._grows] = grown
        written = documents(variables, sizes, attributes or {})
        for name in variables:
            self.place.put(f"{name}/zarr.json", written[f"{name}/zarr.json"])
        return written[ROOT]

    def _noted(self, start: int, stop: int) -> NDArray[np.uint64]:
        """Digests of rows that were announced in this run or one before, 0 where they were not."""
        return self._blocks.fetch(_DIGEST, ((start, stop),))

    def _note(
        self,
        start: int,
        stop: int,
        digests: NDArray[np.uint64],
        ids: NDArray[np.int64] | None,
        labels: NDArray[np.int64] | None,
        signed: Signed | None,
    ) -> None:
        self.renew()
        nothing = np.full(stop - start, MISSING, dtype=np.int64)
        rows, columns = (start, stop), self._sizes.get(SIGNATURE)
        if columns is not None:
            unknown = np.full((stop - start, columns), np.nan)
            values = unknown if signed is None else signed.values
            self._blocks.patch(_SIGNATURE, (rows, (0, columns)), values)
        names = (name for name in self._journal if name != _SIGNATURE)
        noted = zip(names, (ids, labels, digests), strict=True)
        for name, known in noted:  # the digests last: they say that the others are there
            value = nothing if known is None else np.asarray(known)
            self._blocks.patch(name, (rows,), value)

    def _kept(self) -> dict[str, Variable]:
        """Ids and labels of the rows, where all of them have some; the others are removed."""
        kept = {}
        for name, variable in self._journal.items():
            if name in (_DIGEST, _SIGNATURE):
                continue
            if (self._blocks.read(name) != MISSING).all():
                kept[name] = variable
            else:
                self.place.remove(name)
        return kept

    def _summarise(self) -> dict[str, Variable]:
        """Write noise floor and null distribution of the ghosts, a block of targets at a time."""
        if "ghost" not in self._variables:
            return {}
        ghost = self._variables["ghost"]
        dims = ghost.dims[:-1]
        pool = GhostPool()
        if dims:
            rows, width = self._sizes[dims[0]], self._sizes[ghost.dims[1]]
            step = max(1, _CELLS // (width * ghost.chunks[0])) * ghost.chunks[0]
            floors = [
                pool.add(self._blocks.read("ghost", (slice(i, min(i + step, rows)),)))
                for i in range(0, rows, step)
            ]
            mean = np.concatenate([floor.mean for floor in floors])
            sd = np.concatenate([floor.sd for floor in floors])
        else:
            floor = pool.add(self._blocks.read("ghost")[None])
            mean, sd = floor.mean[0], floor.sd[0]
        values = {"ghost_mean": mean, "noise_floor": sd, "null": pool.null().values}
        self._sizes["pool"] = len(values["null"])
        floor_of = Variable(dims, "float64", tuple(_ROWS for _ in dims))
        made = {
            "ghost_mean": floor_of,
            "noise_floor": floor_of,
            "null": Variable(("pool",), "float64", (_COLUMNS,)),
        }
        self._describe(made, None)
        added = Blocks(self.place, made, self._sizes, finished=False)
        for name, value in values.items():
            added.write(name, (), value)
        return made


def _journal(grows: str, columns: int | None) -> dict[str, Variable]:
    """What is noted of the rows of a growing dimension."""
    of_rows = Variable((grows,), "int64", (_ROWS,))
    found = {grows: of_rows, f"{grows}_label": of_rows}
    found[_DIGEST] = Variable((grows,), "uint64", (_ROWS,))
    if columns is not None:
        found[_SIGNATURE] = Variable((grows, SIGNATURE), "float64", (_ROWS, columns))
    return found
