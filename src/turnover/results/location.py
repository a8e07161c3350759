"""A folder on any file system that fsspec knows, and the right to write into it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from turnover.errors import InputError, needing
from turnover.io.files import alone, check_within, replace_folder, writing_to

LEASE = "progress/lease"
_LEASE_SECONDS = 600.0
"""A remote writer that wrote nothing for this long counts as gone."""
_RENEW_SECONDS = 30.0
_SETTLE_SECONDS = 2.0
"""Those who take over from one that is gone wait for each other this long: the last to write it has it."""
_PARTIAL = ".partial"
"""How the names of cut-off writes end: zarr's and ours."""
_MOST_BYTES = 2**28
"""Of a description."""
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class Place:
    """A folder: its objects by key, whole or absent.

    Local files are written beside their place and renamed, since fsspec's own local writes can be cut
    off halfway; object stores replace an object as a whole.

    Args:
        url: path or fsspec URL.

    Raises:
        InputError: a URL that no installed fsspec file system opens, or zarr is not installed.
    """

    def __init__(self, url: str | Path) -> None:
        with needing("a result on disk", "turnover[results]"):
            import fsspec
            import zarr  # noqa: F401 - told now, not when the scores are there
            from fsspec.implementations.local import LocalFileSystem

        self.url = str(url)
        try:
            # zarr writes through a file system object of its own, so a listing kept here would be stale.
            self._files, self._root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise InputError(f"{self.url} cannot be opened: {error}") from error
        local = isinstance(self._files, LocalFileSystem)
        self.local = Path(self._root) if local else None

    @property
    def address(self) -> str:
        """Path or URL by which other processes find it.

        Raises:
            InputError: it is in the memory of this one.
        """
        from fsspec.implementations.memory import MemoryFileSystem

        if isinstance(self._files, MemoryFileSystem):
            raise InputError(
                f"{self.url} is in this process's memory, where no other one can write"
            )
        return self.url if self.local is None else str(self.local.absolute())

    def zarr(self, *, writable: bool) -> Any:
        """The folder as zarr sees it."""
        from zarr.storage import FsspecStore, LocalStore

        from turnover.results.guard import Checked

        if self.local is not None:
            return Checked(LocalStore(self.local, read_only=not writable), self)
        return Checked(FsspecStore.from_url(self.url, read_only=not writable), self)

    def check(self, key: str, most: int = _MOST_BYTES) -> None:
        """Whether an object may be read: a local file could be a link that leads elsewhere, or have no end.

        Raises:
            InputError: it may not.
        """
        if self.local is not None:
            check_within(self.local / key, self.local, most)

    def get(self, key: str) -> bytes | None:
        """An object's bytes, ``None`` where there is none.

        Raises:
            InputError: what is there locally is no file of the folder.
        """
        self.check(key)
        try:
            return bytes(self._files.cat_file(self._path(key)))
        except _ABSENT:
            return None

    def put(self, key: str, value: bytes) -> None:
        """Write an object, atomically.

        Raises:
            WriteError: a local disk is full, or nothing can be written there.
        """
        if self.local is None:
            self._files.pipe_file(self._path(key), value)
            return
        path = self.local / key
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
        with writing_to(self.url):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                draft.write_bytes(value)
                draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)

    def stamp(self, key: str) -> str:
        """What is another one once an object was replaced; empty where there is none."""
        try:
            found = self._files.info(self._path(key))
        except _ABSENT:
            return ""
        return str(sorted((str(k), str(v)) for k, v in found.items()))

    def exists(self, key: str) -> bool:
        """Whether an object exists."""
        return bool(self._files.exists(self._path(key)))

    def names(self, folder: str) -> set[str]:
        """Names of what is directly in a folder; none where there is no such folder."""
        try:
            return {name.rsplit("/", 1)[-1] for name in self._ls(self._path(folder))}
        except _ABSENT:
            return set()

    def vacant(self) -> bool:
        """Whether there is nothing but what a writer that was cut off at once leaves.

        Raises:
            InputError: the place is taken by a file.
        """
        if self.local is not None and self.local.is_file():
            raise InputError(f"{self.url} is a file, not a result; give another place")
        found = self.names("")
        inner = self.names("progress") if "progress" in found else set()
        lease = LEASE.rsplit("/", 1)[-1]
        left = (found - {"progress"}) | {name for name in inner if not name.startswith(lease)}
        return all(name.endswith(_PARTIAL) for name in left)

    def remove(self, key: str = "") -> None:
        """Remove an object or a folder, or everything; nothing is done where there is none."""
        if self.local is None:
            with suppress(*_ABSENT):
                self._files.rm(self._path(key), recursive=True)
            return
        path = self.local / key
        with writing_to(self.url):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what cut-off writes left. Only local ones leave anything."""
        if self.local is not None:
            for path in self.local.rglob(f"*{_PARTIAL}"):
                path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove everything, but for a writer's right to write here."""
        if self.local is not None:
            self.remove()
            return
        inner = {f"progress/{name}" for name in self.names("progress")}
        for name in sorted((self.names("") - {"progress"}) | (inner - {LEASE}), reverse=True):
            self.remove(name)  # zarr.json first: from then on the rest is no result

    def neighbour(self, what: str) -> Place:
        """A hidden place beside this local one."""
        assert self.local is not None
        return Place(self.local.with_name(f".{self.local.name}.{what}"))

    def become(self, other: Place) -> None:
        """Move this local place to another, in place of what is there; nothing if it is that one."""
        if self.local is not None and other.local is not None:
            replace_folder(self.local, other.local)

    @contextmanager
    def locked(self) -> Iterator[Callable[[], None]]:
        """The only writer of this place; yields what must be called before each write.

        Local: a lock file beside the place, which the kernel releases however the process ends.
        Remote: an object that names its holder and is renewed as it writes.

        Raises:
            InputError: another process writes here; on writing, that another one has taken over.
        """
        if self.local is None:
            with self._leased() as renew:
                yield renew
            return
        path = self.local.with_name(f".{self.local.name}.lock")
        with alone(path, self.url):
            try:
                yield lambda: None
            finally:
                if self.exists("zarr.json"):  # finished: nobody has to lock it to go on
                    path.unlink(missing_ok=True)

    @contextmanager
    def _leased(self) -> Iterator[Callable[[], None]]:
        token = uuid.uuid4().hex
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        renewed = float("-inf")

        value = json.dumps({"token": token, "holder": holder}).encode()

        def write() -> None:
            nonlocal renewed
            self.put(LEASE, value)
            renewed = time.monotonic()

        def renew() -> None:
            if time.monotonic() - renewed < _RENEW_SECONDS:
                return
            found = self._lease()
            if found.get("token") != token:
                raise InputError(
                    f"{self.url} was taken over by {found.get('holder', 'another process')} after this one "
                    f"wrote nothing for a while; let that one finish"
                )
            write()

        def first() -> bool:
            with suppress(FileExistsError):
                self._files.pipe_file(self._path(LEASE), value, mode="create")
            # A store may have taken it and its answer been lost: what is there decides.
            return self._lease().get("token") == token

        try:
            alone = self.get(LEASE) is None and first()
        except OSError as error:
            raise InputError(f"{self.url} cannot be written: {error}") from error
        if not alone:
            found = self._lease()
            silent = self._silent(token)
            if silent is None or silent < _LEASE_SECONDS:
                gone = f"delete {self.url}/{LEASE}"
                if silent is not None:
                    gone = f"{_LEASE_SECONDS - silent:.0f} s (or {gone})"
                raise InputError(
                    f"{self.url} is being written by {found.get('holder')}; wait for it to end, or, if "
                    f"it is gone, {gone}"
                )
            write()
            time.sleep(_SETTLE_SECONDS)
        if self._lease().get("token") != token:
            raise InputError(
                f"{self.url}: another process began to write at the same moment; run again"
            )
        try:
            yield renew
        finally:
            if self._lease().get("token") == token:
                self.remove(LEASE)

    def _silent(self, token: str) -> float | None:
        """Seconds since the lease was written, ``None`` where the store does not say when.

        By the store's clock alone: those of two machines may be days apart, and jump.
        """
        probe = f"{LEASE}.{token}"
        self.put(probe, b"")
        try:
            now, then = (self._files.modified(self._path(key)) for key in (probe, LEASE))
        except FileNotFoundError:  # its writer has just ended
            return float("inf")
        except NotImplementedError:
            return None
        finally:
            self.remove(probe)
        return float((now - then).total_seconds())

    def _lease(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.get(LEASE) or b"{}"))
        except (ValueError, TypeError):
            return {}  # a lease cut off while it was written: its writer is gone

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else str(self._root)

    def _ls(self, path: str) -> list[str]:
        # Some object stores list the folder itself as an empty object.
        found = self._files.ls(path, detail=False)
        return [name.rstrip("/") for name in found if name.strip("/") != path.strip("/")]
