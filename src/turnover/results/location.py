"""A folder on any file system that fsspec supports: objects written atomically, by one writer at a time."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from turnover.errors import InputError, needing
from turnover.io.files import alone, check_within, replace_folder, replacing, writing_to

ROOT = "zarr.json"
"""Metadata of the result, written last: without it a result is not finished."""
PROGRESS = "progress"
LEASE = f"{PROGRESS}/lease"
_LEASE_SECONDS = 600.0
"""A holder that wrote nothing for this long has lost the lease."""
_RENEW_SECONDS = 30.0
_SETTLE_SECONDS = 2.0
"""Writers that take over an expired lease wait this long for each other: the last to write it holds it."""
_PARTIAL = ".partial"
"""Suffix of unfinished writes, zarr's and ours."""
_MAX_METADATA_BYTES = 2**28
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class Location:
    """A folder of objects, each of which is either whole or absent.

    Local files are written beside their path and renamed, since fsspec's own local writes can be cut off
    halfway; object stores replace an object as a whole.
    """

    def __init__(self, url: str | Path) -> None:
        with needing("a result on disk", "turnover[results]"):
            import fsspec
            import zarr  # noqa: F401 - fail before the scores are computed
            from fsspec.implementations.local import LocalFileSystem

        self.url = str(url)
        try:
            # zarr writes through a file system object of its own, so a cached listing would be stale.
            self._files, self._root = fsspec.url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise InputError(f"{self.url} cannot be opened: {error}") from error
        local = isinstance(self._files, LocalFileSystem)
        self.local = Path(self._root) if local else None

    @property
    def address(self) -> str:
        """Path or URL by which other processes find the folder."""
        from fsspec.implementations.memory import MemoryFileSystem

        if isinstance(self._files, MemoryFileSystem):
            raise InputError(
                f"{self.url} is in the memory of this process, where no other process can write"
            )
        return self.url if self.local is None else str(self.local.absolute())

    def zarr_store(self, *, writable: bool) -> Any:
        """The folder as a zarr store that checks what it reads."""
        from zarr.storage import FsspecStore, LocalStore

        from turnover.results.guard import GuardedStore

        if self.local is not None:
            return GuardedStore(LocalStore(self.local, read_only=not writable), self.check)
        return GuardedStore(FsspecStore.from_url(self.url, read_only=not writable), self.check)

    def check(self, key: str, max_bytes: int = _MAX_METADATA_BYTES) -> None:
        """Refuse to read a local file that is a link out of the folder, a device or pipe, or too large."""
        if self.local is not None:
            check_within(self.local / key, self.local, max_bytes)

    def get(self, key: str) -> bytes | None:
        """Bytes of an object, ``None`` if it is absent."""
        self.check(key)
        try:
            return bytes(self._files.cat_file(self._path(key)))
        except _ABSENT:
            return None

    def put(self, key: str, value: bytes) -> None:
        """Write an object, atomically."""
        if self.local is None:
            self._files.pipe_file(self._path(key), value)
            return
        with self.writing():
            (self.local / key).parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.local / key) as draft:
            draft.write_bytes(value)

    def writing(self) -> AbstractContextManager[None]:
        """Raise :class:`WriteError` if a local disk is full or refuses; stores report their own errors."""
        return nullcontext() if self.local is None else writing_to(self.url)

    def version(self, key: str) -> str:
        """A string that changes when an object is replaced; empty if it is absent."""
        try:
            found = self._files.info(self._path(key))
        except _ABSENT:
            return ""
        return str(sorted((str(k), str(v)) for k, v in found.items()))

    def exists(self, key: str) -> bool:
        """Whether an object exists."""
        return bool(self._files.exists(self._path(key)))

    def names(self, folder: str) -> set[str]:
        """Names of the objects and folders directly in a folder; empty if it is absent."""
        path = self._path(folder)
        try:
            found = [name.rstrip("/") for name in self._files.ls(path, detail=False)]
        except _ABSENT:
            return set()
        # Some object stores list the folder itself as an empty object.
        return {name.rsplit("/", 1)[-1] for name in found if name.strip("/") != path.strip("/")}

    def is_vacant(self) -> bool:
        """Whether the folder is empty, except for what a writer leaves that was cut off at once."""
        if self.local is not None and self.local.is_file():
            raise InputError(f"{self.url} is a file, not a result; give another path")
        return all(key.endswith(_PARTIAL) or key.startswith(LEASE) for key in self._keys())

    def remove(self, key: str = "") -> None:
        """Remove an object, a folder, or everything; do nothing if it is absent."""
        with self.writing(), suppress(*_ABSENT):
            self._files.rm(self._path(key), recursive=True)

    def remove_partial(self) -> None:
        """Remove unfinished writes, which only local ones leave."""
        if self.local is not None:
            for path in self.local.rglob(f"*{_PARTIAL}"):
                path.unlink(missing_ok=True)

    @contextmanager
    def replaced(self) -> Iterator[Location]:
        """Yield an empty folder that takes the place of this one when the body ends.

        Local: a folder beside this one, which stays until then. Remote: this folder, emptied first.
        """
        if self.local is None:
            for key in sorted(self._keys() - {LEASE}, reverse=True):
                self.remove(key)  # zarr.json first: from then on the rest is no result
            yield self
            return
        path = self.local.with_name(f".{self.local.name}.draft")
        draft = Location(path)
        draft.remove()
        yield draft
        replace_folder(path, self.local)

    @contextmanager
    def locked(self) -> Iterator[Callable[[], None]]:
        """Be the only writer of this folder; yields a function to call before each write.

        Local: a lock file beside the folder, which the kernel releases however the process ends.
        Remote: a lease.
        """
        if self.local is None:
            with _Lease(self, self._files, self._path(LEASE)).held() as renew:
                yield renew
            return
        path = self.local.with_name(f".{self.local.name}.lock")
        with alone(path, self.url):
            try:
                yield lambda: None
            finally:
                if self.exists(ROOT):  # a finished result needs no lock
                    path.unlink(missing_ok=True)

    def _keys(self) -> set[str]:
        """Keys directly in the folder and in its folder of progress."""
        found = self.names("")
        inner = self.names(PROGRESS) if PROGRESS in found else set()
        return (found - {PROGRESS}) | {f"{PROGRESS}/{name}" for name in inner}

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else str(self._root)


class _Lease:
    """The right to write a remote folder: an object that names its holder, who renews it while writing."""

    def __init__(self, location: Location, files: Any, path: str) -> None:
        self._location, self._files, self._path = location, files, path
        self._url = location.url
        self._token = uuid.uuid4().hex
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        self._value = json.dumps({"token": self._token, "holder": holder}).encode()
        self._renewed = float("-inf")

    @contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Hold the lease in the body; yields :meth:`renew`. Fails if another process holds it."""
        try:
            if created := self._read() is None:
                with suppress(FileExistsError):
                    self._files.pipe_file(self._path, self._value, mode="create")
                # The store may have created it although its answer was lost.
                created = self._is_ours()
        except OSError as error:
            raise InputError(f"{self._url} cannot be written: {error}") from error
        if not created:
            self._check_expired()
            self._write()
            time.sleep(_SETTLE_SECONDS)
        if not self._is_ours():
            raise InputError(
                f"{self._url}: another process began to write at the same moment; run again"
            )
        try:
            yield self.renew
        finally:
            if self._is_ours():
                self._location.remove(LEASE)

    def renew(self) -> None:
        """Write the lease again, if not written recently; fails if another process has taken over."""
        if time.monotonic() - self._renewed < _RENEW_SECONDS:
            return
        found = self._read() or {}
        if found.get("token") != self._token:
            raise InputError(
                f"{self._url} was taken over by {found.get('holder', 'another process')} after this process "
                f"wrote nothing for a while; let that one finish"
            )
        self._write()

    def _check_expired(self) -> None:
        holder, age = (self._read() or {}).get("holder"), self._age()
        if age is not None and age >= _LEASE_SECONDS:
            return
        fix = f"delete {self._url}/{LEASE}"
        if age is not None:
            fix = f"wait {_LEASE_SECONDS - age:.0f} s (or {fix})"
        raise InputError(
            f"{self._url} is being written by {holder}; wait for it to end, or, if it is gone, {fix}"
        )

    def _write(self) -> None:
        self._location.put(LEASE, self._value)
        self._renewed = time.monotonic()

    def _read(self) -> dict[str, Any] | None:
        raw = self._location.get(LEASE)
        try:
            return None if raw is None else dict(json.loads(raw))
        except (ValueError, TypeError):
            return {}  # its writer was cut off

    def _is_ours(self) -> bool:
        return (self._read() or {}).get("token") == self._token

    def _age(self) -> float | None:
        """Seconds since the lease was written, by the store's clock; ``None`` if the store keeps no times.

        Clocks of two machines may differ by days, and jump.
        """
        suffix = f".{self._token}"
        self._location.put(LEASE + suffix, b"")
        try:
            now = self._files.modified(self._path + suffix)
            then = self._files.modified(self._path)
        except FileNotFoundError:  # its holder has just ended
            return float("inf")
        except NotImplementedError:
            return None
        finally:
            self._location.remove(LEASE + suffix)
        return float((now - then).total_seconds())
