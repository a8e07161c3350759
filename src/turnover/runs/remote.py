"""Runs on a store that fsspec supports: copied to this machine, and copied back when written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from turnover.errors import InputError, needing
from turnover.io.files import alone, writing_to
from turnover.io.parsing import convert, read_json, write_json
from turnover.results.location import Location
from turnover.runs.run import DIGESTS

_ATTEMPTS = 3
"""Attempts to copy a run that another process is writing to."""
_LAST = "metrics.json"
_PUSHING, _REMOVING = "being copied back", "being removed"
"""States of a file during a push; if it was interrupted, the file on this machine counts."""
_UNKNOWN = ("", "")


@contextmanager
def mirrored(url: str, *, new: bool = False) -> Iterator[Path]:
    """Copy a run on a store into a folder on this machine; changes that the body makes are copied back.

    The folder is kept in ``~/.cache/turnover`` (or ``$XDG_CACHE_HOME/turnover``), and unchanged files are
    not copied again. If the body fails, nothing is copied back, and the next call continues with the folder
    as it is. An interrupted copy back is finished by the next call. ``digests.json`` and the ``zarr.json``
    of results are copied last.

    Args:
        url: fsspec URL of the run.
        new: the run may be missing; the body may create it.

    Raises:
        InputError: the run is missing, cannot be read, or was written to meanwhile; names that lead out of
            the folder; another process on this machine uses it; fsspec or the file system is not
            installed (``pip install turnover[s3]``).
    """
    mirror = _Mirror(url)
    with alone(mirror.folder.parent / ".lock", f"{mirror.folder}, the copy of {url} here,"):
        mirror.fetch(new=new)
        yield mirror.folder
        mirror.push()


class _Mirror:
    """Folder of a run on this machine and on a store.

    The note ``copied.json`` holds stamp (on the store) and state (here) of each file at the last copy.

    Attributes:
        folder: the one on this machine.
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
        self._busy = f"{self._url} is being written to; wait for it to end, and run again"
        with writing_to(self.folder):
            self.folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)

    def fetch(self, *, new: bool) -> None:
        """Copy files that changed on the store, and delete files that were deleted there."""
        states = {name: state for name, (_, state) in self._noted().items()}
        pending = {name for name, state in states.items() if state == _REMOVING}
        if pending or _PUSHING in states.values():
            self._push(gone=pending)  # finishes an interrupted push
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
                    self._push(gone=set())  # a fit that was interrupted before it was copied back
                return
        raise InputError(self._busy)

    def push(self) -> None:
        """Copy back files that changed here, and delete files that were deleted here."""
        # After fetch() all noted files were here.
        self._push(gone=self._noted().keys() - self._here().keys())

    def _copy(self, there: dict[str, str]) -> None:
        noted = self._noted()
        here = self._here()
        wanted = []
        for name, stamp in there.items():
            known, state = noted.get(name, _UNKNOWN)
            if stamp == known and name in here:
                continue  # if it changed here, an interrupted command continues with it
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
                # An empty folder would be read as a result.
                while path.parent != self.folder and not any(path.parent.iterdir()):
                    path = path.parent
                    path.rmdir()
        kept = {name: noted[name] for name in noted.keys() & there.keys() - set(wanted)}
        self._write_note(
            kept
        )  # if interrupted now, the copied files do not count as changes made here
        self._get(wanted)
        here = self._here()
        self._write_note(kept | {name: (there[name], here[name]) for name in wanted})

    def _get(self, names: list[str]) -> None:
        paths = [self._path(name) for name in names]
        drafts = [path.with_name(f".{path.name}.copied") for path in paths]
        with writing_to(self.folder):
            for draft in drafts:
                draft.parent.mkdir(parents=True, exist_ok=True)
            try:
                if names:
                    self._files.get([self._key(name) for name in names], list(map(str, drafts)))
            except FileNotFoundError as error:
                raise InputError(self._busy) from error
            for path, draft in zip(paths, drafts, strict=True):
                draft.replace(path)

    def _push(self, *, gone: set[str]) -> None:
        noted, here = self._noted(), self._here()
        changed = {n for n, state in here.items() if noted.get(n, _UNKNOWN)[1] != state}
        if not changed and not gone:
            return
        with Location(f"{self._url}/results").locked() as renew:
            self._compare(noted, changed | gone)
            pending = dict.fromkeys(changed, ("", _PUSHING)) | dict.fromkeys(gone, ("", _REMOVING))
            self._write_note(noted | pending)
            marks = _marks(changed | gone)
            self._remove(marks & noted.keys())
            self._remove(gone - marks)
            for names in (changed - marks - {_LAST}, marks & here.keys(), changed & {_LAST}):
                renew()
                self._put(sorted(names))
        there = self._there()
        self._write_note({name: (there[name], here[name]) for name in here.keys() & there.keys()})

    def _put(self, names: list[str]) -> None:
        if names:
            local, there = [str(self.folder / n) for n in names], [self._key(n) for n in names]
            self._files.put(local, there)

    def _compare(self, noted: dict[str, tuple[str, str]], names: Iterable[str]) -> None:
        """Refuse to overwrite files that another process wrote on the store."""
        there = self._there()
        for name in (DIGESTS, *names):
            stamp, state = noted.get(name, _UNKNOWN)
            if state not in {_PUSHING, _REMOVING} and there.get(name, "") != stamp:
                raise InputError(
                    f"{self._url}: {name} was written there by somebody else meanwhile; what was made here "
                    f"is in {self.folder}"
                )

    def _remove(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            with suppress(FileNotFoundError):
                self._files.rm_file(self._key(name))

    def _there(self) -> dict[str, str]:
        """Files of the run on the store, each with a stamp that changes when it is replaced."""
        try:
            found = self._files.find(self._root, detail=True)
        except Exception as error:  # stores raise many kinds
            raise InputError(f"{self._url} cannot be read: {error}") from error
        start = len(self._root.rstrip("/")) + 1
        named = {key[start:]: info for key, info in found.items() if info["type"] == "file"}
        for name in named:
            self._path(name)
        return {
            name: str(sorted((str(k), str(v)) for k, v in info.items()))
            for name, info in named.items()
            if not _is_transient(name)
        }

    def _here(self) -> dict[str, str]:
        """Files of the run on this machine, each with a state that changes when it is written."""
        states = {}
        for path in self.folder.rglob("*"):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and not _is_transient(name):
                found = path.stat()
                states[name] = f"{found.st_size} {found.st_mtime_ns}"
        return states

    def _path(self, name: str) -> Path:
        """Path on this machine of a file of the run; refuses names that lead out of the folder."""
        parts = name.split("/")
        if not all(parts) or {".", ".."} & set(parts) or "\\" in name or "\0" in name:
            raise InputError(f"{self._url}: {name!r} leads out of the run; delete it")
        return self.folder / name

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _noted(self) -> dict[str, tuple[str, str]]:
        values = read_json(self._note) if self._note.exists() else {}
        return convert(values, dict[str, tuple[str, str]], self._note)

    def _write_note(self, noted: dict[str, tuple[str, str]]) -> None:
        write_json(self._note, noted, sealed=True)


def _is_transient(name: str) -> bool:
    """Whether a file is a lock, a lease or a draft, and not part of the run."""
    parts = name.split("/")
    return any(part.startswith(".") for part in parts) or name.startswith("results/progress/")


def _marks(names: set[str]) -> set[str]:
    """Files that say that the rest of the run, or of a result among these names, is complete."""
    parts = [name.split("/") for name in names]
    results = {f"results/{one[1]}/zarr.json" for one in parts if one[0] == "results" and one[2:]}
    return results | ({DIGESTS} & set(names))
