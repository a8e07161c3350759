"""The right to write a remote folder: an object that names its holder, who renews it while writing."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from turnover.errors import InputError

PROGRESS = "progress"
LEASE = f"{PROGRESS}/lease"
ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_LEASE_SECONDS = 600.0
"""A holder that wrote nothing for this long has lost the lease."""
_RENEW_SECONDS = 30.0
_SETTLE_SECONDS = 2.0
"""Writers that take over an expired lease wait this long for each other: the last to write it holds it."""


class Lease:
    """A lease of this process on a folder.

    Args:
        files: fsspec file system.
        root: path of the folder there.
        url: its URL, for messages.
    """

    def __init__(self, files: Any, root: str, url: str) -> None:
        self._files, self._path, self._url = files, f"{root}/{LEASE}", url
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
                created = (
                    self._is_ours()
                )  # the store may have created it although its answer was lost
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
                self._remove(self._path)

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
            fix = f"{_LEASE_SECONDS - age:.0f} s (or {fix})"
        raise InputError(
            f"{self._url} is being written by {holder}; wait for it to end, or, if it is gone, {fix}"
        )

    def _write(self) -> None:
        self._files.pipe_file(self._path, self._value)
        self._renewed = time.monotonic()

    def _read(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads(self._files.cat_file(self._path)))
        except ABSENT:
            return None
        except (ValueError, TypeError):
            return {}  # its writer was cut off

    def _is_ours(self) -> bool:
        return (self._read() or {}).get("token") == self._token

    def _age(self) -> float | None:
        """Seconds since the lease was written, by the store's clock; ``None`` if the store keeps no times.

        Clocks of two machines may differ by days, and jump.
        """
        probe = f"{self._path}.{self._token}"
        self._files.pipe_file(probe, b"")
        try:
            now, then = (self._files.modified(path) for path in (probe, self._path))
        except FileNotFoundError:  # its holder has just ended
            return float("inf")
        except NotImplementedError:
            return None
        finally:
            self._remove(probe)
        return float((now - then).total_seconds())

    def _remove(self, path: str) -> None:
        with suppress(*ABSENT):
            self._files.rm(path)
