"""A fit by landmarks on disk or in a store: written as it is computed, and continued after an interruption.

It is a zarr group. ``progress/zarr.json`` says what was begun, ``progress/rows`` how many instances are
whole; the group's own ``zarr.json`` is written when all of them are. Later instances may follow, and have the
same landmarks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from turnover.errors import InputError
from turnover.influence.gram.coordinates import Basis
from turnover.influence.gram.landmarks import Landmarked
from turnover.influence.gram.passes import Passes
from turnover.io.parsing import convert, damage, parse_json

if TYPE_CHECKING:
    from turnover.results.arrays import Variable

_ROWS = "progress/rows"
_CHUNK = 2**24
"""Bytes of vectors in a chunk."""
_CAPACITY = 2**40
"""Length of the arrays until it is known."""
_SAME = 1e-2
"""Largest relative distance of the landmarks' vectors from those that were stored."""
_START_OVER = "give another path, or delete it"
_BESIDE = {
    "own": ("train", "direction", "other"),
    "inverse": ("train", "direction", "other"),
    "weights": ("train", "direction"),
    "residuals": ("train",),
}
"""Dimensions of what is kept of instances besides their vectors (:class:`.landmarks.Instances`)."""


class Unstored:
    """Stores nothing.

    Attributes:
        first: training instances that the landmarks are drawn from.
        bases: coordinates that were stored, by network.
        rows: instances that were stored.
        renew: keeps the right to write.
    """

    def __init__(self, first: int) -> None:
        self.first, self.rows = first, 0
        self.bases: list[Basis] = []
        self.renew: Callable[[], None] = lambda: None

    def begin(self, fitted: Sequence[Landmarked], positions: Tensor) -> None:
        """Take the training set by each network, before instances come in.

        Args:
            fitted: holds the landmarks.
            positions: of these, in the order in which they came, int64 (landmarks,).
        """

    def note(self, positions: Tensor) -> None:
        """Note instances that every network has taken in."""

    def finish(self) -> None:
        """Note that they all came in."""


class Store(Unstored):
    """Keeps the training set in a folder.

    Args:
        location: of the folder, a :class:`turnover.results.location.Location`.
        identity: JSON values that say what the numbers are of.
        passes: the training set, with hashes.

    Attributes:
        complete: all instances are there.
    """

    def __init__(self, location: Any, identity: Mapping[str, Any], passes: Passes) -> None:
        super().__init__(len(passes))
        self._location, self._identity, self._passes = location, identity, passes
        self._manifest: dict[str, Any] | None = None
        self._fitted: Sequence[Landmarked] = ()
        self._seen = 0
        self.complete = False
        self.read()

    def read(self) -> None:
        """Learn what is there."""
        from turnover.results.location import ROOT
        from turnover.results.manifest import STARTED, check_same, manifest_of, read_sealed

        root = read_sealed(self._location, ROOT)
        document = root or read_sealed(self._location, STARTED)
        if document is None:
            if not self._location.is_vacant():
                raise InputError(f"{self._url} is no fit of gram; give another path")
            return
        stored = manifest_of(document)
        if stored.get("kind") != "gram":
            raise InputError(f"{self._url} is no fit of gram, but a result; give another path")
        given, there = (
            {"identity": one, "sizes": {}} for one in (self._identity, stored["identity"])
        )
        check_same(self._location, there, given)
        raw = self._location.get(_ROWS)
        if raw is None:  # cut off before the first instance
            return
        where = f"{self._url}: {_ROWS}"
        self.rows = convert(parse_json(raw, where), int, where)
        with damage(f"{self._url}: {STARTED}", _START_OVER):
            self._manifest, self.first = stored, int(stored["first"])
        held = max(self.rows, self.first)
        if len(self._passes) < held:
            raise InputError(
                f"{self._url} was begun with {held} training instances, and {len(self._passes)} are given: "
                f"give those, and any further ones after them, or another path"
            )
        self.complete = root is not None and self.rows == len(self._passes)
        self._open(finished=self.complete)
        with damage(f"{self._url}: {STARTED}", _START_OVER):
            self.bases = [
                Basis(torch.from_numpy(self._arrays.read(f"map{i}")), float(ridge))
                for i, ridge in enumerate(stored["ridges"])
            ]

    def begin(self, fitted: Sequence[Landmarked], positions: Tensor) -> None:
        """See :class:`Unstored`: begin the store, or read what is there."""
        self._fitted = fitted
        if not torch.equal(positions, positions.sort().values):
            raise self._out_of_order()
        if self._manifest is None:
            self._create()
            return
        self._check_rows()
        self._seen = self.rows
        for number, one in enumerate(fitted):
            self._restore(number, one)
            self._check_landmarks(one, positions)
        if not self.complete:
            self._put_metadata(self._manifest, _CAPACITY)
            self._open(finished=False)  # an array opened before knows the former length

    def note(self, positions: Tensor) -> None:
        """See :class:`Unstored`; they are written once they make a chunk."""
        expected = torch.arange(self._seen, self._seen + len(positions))
        if not torch.equal(positions.cpu(), expected):
            raise self._out_of_order()
        self._seen += len(positions)
        if self._seen - self.rows >= self._step:
            self._write()

    def finish(self) -> None:
        """See :class:`Unstored`."""
        from turnover.results.location import ROOT
        from turnover.results.manifest import seal

        if self.complete:
            return
        if self._seen > self.rows:
            self._write()
        assert self._manifest is not None
        root = self._put_metadata(self._manifest, self.rows)
        self._location.put(ROOT, seal(json.loads(root), self._manifest))

    @property
    def _url(self) -> str:
        return str(self._location.url)

    @property
    def _step(self) -> int:
        return int(self._variables["vectors0"].chunks[0])

    def _out_of_order(self) -> InputError:
        return InputError(
            f"{self._url}: the training batches come in another order than when they were first gone "
            f"through: give a list, or a loader with shuffle=False"
        )

    def _create(self) -> None:
        from turnover.results.manifest import STARTED, make_manifest, seal

        sizes = {"direction": self._fitted[0].directions, "other": self._fitted[0].directions}
        for i, one in enumerate(self._fitted):
            sizes[f"gradient{i}"], sizes[f"width{i}"] = one.coordinates.basis.map.shape
        made = make_manifest(self._identity, _layout(sizes), sizes, {}, "gram")
        ridges = [one.coordinates.basis.ridge for one in self._fitted]
        self._manifest = made | {"first": self.first, "ridges": ridges}
        group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
        self.renew()
        self._location.put(STARTED, seal(group, self._manifest))
        self._location.remove_partial()
        self._variables = _layout(sizes)
        self._put_metadata(self._manifest, _CAPACITY)
        self._open(finished=False)
        for i, one in enumerate(self._fitted):
            self._arrays.write(f"map{i}", (), one.coordinates.basis.map.cpu().numpy())
        self._location.put(_ROWS, b"0")

    def _open(self, *, finished: bool) -> None:
        from turnover.results.arrays import Arrays

        assert self._manifest is not None
        sizes = self._manifest["sizes"]
        self._variables = _layout(sizes)
        train = self.rows if finished else _CAPACITY
        self._arrays = Arrays(
            self._location, dict(self._variables), sizes | {"train": train}, finished=finished
        )

    def _put_metadata(self, manifest: Mapping[str, Any], train: int) -> bytes:
        from turnover.results.arrays import metadata_files
        from turnover.results.location import ROOT

        self.renew()
        files = metadata_files(self._variables, manifest["sizes"] | {"train": train}, {})
        for name in self._variables:
            self._location.put(f"{name}/zarr.json", files[f"{name}/zarr.json"])
        return files[ROOT]

    def _write(self) -> None:
        start, stop = self.rows, self._seen
        self.renew()
        self._patch("id", start, stop, self._passes.ids[start:stop].numpy())
        self._patch("print", start, stop, self._passes.prints[start:stop])
        for i, one in enumerate(self._fitted):
            vectors, scales = one.features.rounded(start, stop)
            self._patch(f"vectors{i}", start, stop, vectors)
            self._patch(f"scales{i}", start, stop, scales)
            for name in _BESIDE:
                self._patch(f"{name}{i}", start, stop, getattr(one.kept, name)[start:stop].numpy())
        self._location.put(_ROWS, json.dumps(stop).encode())
        self.rows = stop

    def _patch(self, name: str, start: int, stop: int, values: Any) -> None:
        rest = [(0, length) for length in values.shape[1:]]
        self._arrays.patch(name, ((start, stop), *rest), values)

    def _check_rows(self) -> None:
        """Refuse other instances than those that are stored."""
        for name, given in (("id", self._passes.ids.numpy()), ("print", self._passes.prints)):
            stored = self._arrays.read(name, (slice(0, self.rows),))
            differ = np.flatnonzero(stored != given[: self.rows])
            if len(differ):
                what = "another id" if name == "id" else "other contents"
                raise InputError(
                    f"{self._url}: training instance {differ[0]} has {what} there than here; give the "
                    f"same instances in the same batches, and further ones in batches after them, or "
                    f"another path"
                )

    def _restore(self, number: int, one: Landmarked) -> None:
        for start in range(0, self.rows, self._step):
            part = (slice(start, min(start + self._step, self.rows)),)
            vectors = self._arrays.read(f"vectors{number}", part)
            one.features.put(start, vectors, self._arrays.read(f"scales{number}", part))
            for name in _BESIDE:
                values = torch.from_numpy(self._arrays.read(f"{name}{number}", part))
                getattr(one.kept, name)[part] = values

    def _check_landmarks(self, one: Landmarked, positions: Tensor) -> None:
        """Refuse a model, objective or inputs that have other gradients than those that are stored."""
        there = positions < self.rows
        if not bool(there.any()):
            return
        stored = one.features.take(positions[there]).flatten(1)
        now = one.coordinates.of_landmarks().cpu().view(len(positions), -1)[there]
        apart = float((stored - now).norm() / stored.norm().clamp_min(1e-30))
        if not apart <= _SAME:
            raise InputError(
                f"{self._url} holds a fit whose landmarks have other gradients, by {apart:.1%} of their "
                f"length: an objective of the same name, or the model, computes something else; {_START_OVER}"
            )


@contextmanager
def storing(url: str | Path, identity: Mapping[str, Any], passes: Passes) -> Iterator[Store]:
    """Begin a store, or continue one; only one process does at a time.

    Args:
        url: path or fsspec URL; missing folders are made.
        identity: JSON values that say what the numbers are of.
        passes: the training set, with hashes.

    Raises:
        InputError: something else is there, or another process writes it.
    """
    from turnover.results.location import Location

    location = Location(url)
    store = Store(location, identity, passes)
    if store.complete:
        yield store
        return
    with location.locked() as renew:
        store = Store(location, identity, passes)  # another process may have written since
        store.renew = renew
        yield store


def identity_of(described: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What a fit must have in common with a stored one: fields of the result, and options."""
    kept = {name: value for name, value in options.items() if name not in ("exact", "resamples")}
    named = {name: value for name, value in described.items() if name != "considered"}
    return named | {"sites": list(described["sites"]), "options": kept}


def _layout(sizes: Mapping[str, int]) -> dict[str, Variable]:
    from turnover.results.arrays import Variable

    networks = sum(name.startswith("width") for name in sizes)
    widest = max(sizes[f"width{i}"] for i in range(networks))
    rows = max(1, _CHUNK // (2 * sizes["direction"] * widest))
    dims: dict[str, tuple[str, ...]] = {"id": ("train",), "print": ("train",)}
    types = {"id": "int64", "print": "uint64"}
    for i in range(networks):
        dims[f"map{i}"] = (f"gradient{i}", f"width{i}")
        dims[f"vectors{i}"] = ("train", "direction", f"width{i}")
        dims[f"scales{i}"] = ("train", "direction")
        dims |= {f"{name}{i}": of for name, of in _BESIDE.items()}
        types[f"vectors{i}"] = "float16"
    lengths = {**sizes, "train": rows}
    return {
        name: Variable(of, types.get(name, "float32"), tuple(lengths[dim] for dim in of))
        for name, of in dims.items()
    }
