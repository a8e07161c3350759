"""Runs on a store that fsspec knows: a copy on this machine, and what was written there copied back."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from turnover.errors import InputError, needing
from turnover.io.files import alone, writing_to
from turnover.io.parsing import read_json, write_json
from turnover.results.location import Location
from turnover.runs.run import DIGESTS

_ATTEMPTS = 3
"""Copies of a run that somebody is writing to."""
_LAST = "metrics.json"
_PUSHING, _REMOVING = "being copied back", "being removed"
"""States of a file that may be there already or not: if that was cut off, what is here counts."""


@contextmanager
def mirrored(url: str, *, new: bool = False) -> Iterator[Path]:
    """A run on a store, as a folder on this machine; what the body writes there is copied back.

    The folder is kept in ``~/.cache/turnover`` (or ``$XDG_CACHE_HOME/turnover``), and what has not
    changed is not copied again. Where the body fails nothing is copied back, and the next one goes on
    with the folder as it is. Copying back that was cut off is ended by the next one. ``digests.json`` and
    the ``zarr.json`` of results are copied last.

    Args:
        url: fsspec URL of the run.
        new: there need be no run; the body may make one.

    Raises:
        InputError: there is no run, it cannot be read, or it was written to meanwhile; names that lead
            out of the folder; another process on this machine uses it; fsspec or the file system is not
            installed (``pip install turnover[s3]``).
    """
    mirror = _Mirror(url)
    with alone(mirror.folder.parent / ".lock", f"{mirror.folder}, the copy of {url} here,"):
        mirror.fetch(new=new)
        yield mirror.folder
        mirror.push()


class _Mirror:
    """A run's folder here and there.

    Attributes:
        folder: the one here.
    """

    def __init__(self, url: str) -> None:
        with needing("a run on a store", "turnover[s3]"):
            import fsspec
        self._url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.url_to_fs(self._url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise InputError(f"{url} cannot be opened: {error}") from error
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        key = hashlib.blake2b(self._url.encode(), digest_size=8).hexdigest()
        self.folder = cache / "turnover" / key / PurePosixPath(self._root).name
        self._note = self.folder.parent / "copied.json"
        with writing_to(self.folder):
            self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    def fetch(self, *, new: bool) -> None:
        """Copy what is another one there, and remove what is not there any more."""
        pending = {name for name, (_, state) in self._noted().items() if state == _REMOVING}
        if pending or any(state == _PUSHING for _, state in self._noted().values()):
            self._push(gone=pending)  # the end of what was cut off
        there = self._there()
        if DIGESTS not in there and not new:
            raise InputError(
                f"{self._url} is not a run: it has no {DIGESTS}, which is copied last (make one: turnover "
                f"fit --out {self._url})"
            )
        for _ in range(_ATTEMPTS):
            self._copy(there)
            before, there = there, self._there()
            if before == there:
                if DIGESTS not in there and (self.folder / DIGESTS).exists():
                    self._push(gone=set())  # a fit that was cut off before it was copied back
                return
        raise InputError(f"{self._url} is being written to; run again when that has ended")

    def _copy(self, there: dict[str, str]) -> None:
        noted = self._noted()
        here = self._here()
        wanted = []
        for name, stamp in there.items():
            known, state = noted.get(name, ["", ""])
            if stamp == known and name in here:
                continue  # or changed here, by a command that was cut off: that goes on
            if state and name in here and here[name] != state:
                raise InputError(
                    f"{self._url}: {name} was changed there, and here in {self.folder}: keep what you want "
                    f"of the one here, and delete it"
                )
            wanted.append(name)
        for name in noted.keys() & here.keys() - there.keys():
            if here[name] == noted[name][1]:
                path = self.folder / name
                path.unlink()
                # A result is there if its folder is.
                while path.parent != self.folder and not any(path.parent.iterdir()):
                    path = path.parent
                    path.rmdir()
        kept = {name: noted[name] for name in noted.keys() & there.keys() - set(wanted)}
        self._write_note(kept)  # if it is cut off now, what came is no change of ours
        self._get(wanted)
        here = self._here()
        self._write_note(kept | {name: [there[name], here[name]] for name in wanted})

    def _get(self, names: list[str]) -> None:
        drafts = [
            self._path(name).with_name(f".{PurePosixPath(name).name}.copied") for name in names
        ]
        with writing_to(self.folder):
            for draft in drafts:
                draft.parent.mkdir(parents=True, exist_ok=True)
            try:
                if names:
                    self._files.get([self._key(name) for name in names], list(map(str, drafts)))
            except FileNotFoundError as error:
                raise InputError(
                    f"{self._url} is being written to; run again when that has ended"
                ) from error
            for name, draft in zip(names, drafts, strict=True):
                draft.replace(self.folder / name)

    def push(self) -> None:
        """Copy back what is another one here, and remove there what was removed here."""
        # All that is noted was here after fetch().
        self._push(gone=self._noted().keys() - self._here().keys())

    def _push(self, *, gone: set[str]) -> None:
        noted, here = self._noted(), self._here()
        changed = {n for n, state in here.items() if noted.get(n, ["", ""])[1] != state}
        if not changed and not gone:
            return
        with Location(f"{self._url}/results").locked() as renew:
            self._compare(noted, changed | gone)
            pending = {name: ["", _PUSHING] for name in changed}
            self._write_note(noted | pending | {name: ["", _REMOVING] for name in gone})
            marks = _marks(changed | gone)
            self._remove(marks & noted.keys())
            self._remove(gone - marks)
            for names in (changed - marks - {_LAST}, marks & here.keys(), changed & {_LAST}):
                renew()
                self._put(sorted(names))
        there = self._there()
        self._write_note({name: [there[name], here[name]] for name in here.keys() & there.keys()})

    def _put(self, names: list[str]) -> None:
        if names:
            local, there = [str(self.folder / n) for n in names], [self._key(n) for n in names]
            self._files.put(local, there)

    def _compare(self, noted: dict[str, Any], names: Iterable[str]) -> None:
        there = self._there()
        for name in (DIGESTS, *names):
            if noted.get(name, ["", ""])[1] in {_PUSHING, _REMOVING}:
                continue
            if there.get(name, "") != noted.get(name, ["", ""])[0]:
                raise InputError(
                    f"{self._url}: {name} was written there by somebody else meanwhile; what was made here "
                    f"is in {self.folder}"
                )

    def _remove(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            with suppress(FileNotFoundError):
                self._files.rm_file(self._key(name))

    def _there(self) -> dict[str, str]:
        """Files of the run on the store: name to what tells that one was replaced."""
        try:
            found = self._files.find(self._root, detail=True)
        except Exception as error:  # of as many kinds as there are stores
            raise InputError(f"{self._url} cannot be read: {error}") from error
        start = len(self._root.rstrip("/")) + 1
        named = {key[start:]: info for key, info in found.items() if info["type"] == "file"}
        for name in named:
            self._path(name)
        return {
            name: str(sorted((str(k), str(v)) for k, v in info.items()))
            for name, info in named.items()
            if not _passing(name)
        }

    def _here(self) -> dict[str, str]:
        """Files of the run here: name to what tells that one was written to."""
        states = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and not _passing(name):
                found = path.stat()
                states[name] = f"{found.st_size} {found.st_mtime_ns}"
        return states

    def _path(self, name: str) -> Path:
        """Where a file of the run is here.

        Raises:
            InputError: not in the folder.
        """
        parts = name.split("/")
        if not all(parts) or {".", ".."} & set(parts) or "\\" in name or "\0" in name:
            raise InputError(f"{self._url}: {name!r} leads out of the run; delete it")
        return self.folder / name

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _noted(self) -> dict[str, Any]:
        return read_json(self._note) if self._note.exists() else {}

    def _write_note(self, noted: dict[str, Any]) -> None:
        write_json(self._note, noted, sealed=True)


def _passing(name: str) -> bool:
    """Locks, leases and what is being written: of no run."""
    parts = name.split("/")
    return any(part.startswith(".") for part in parts) or name.startswith("results/progress/")


def _marks(names: set[str]) -> set[str]:
    """What says that the rest is whole, of what these names are part of."""
    parts = [name.split("/") for name in names]
    results = {f"results/{one[1]}/zarr.json" for one in parts if one[0] == "results" and one[2:]}
    return results | ({DIGESTS} & set(names))
