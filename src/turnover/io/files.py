"""Atomic writes, locks and links, and errors for a full disk or missing permission."""

from __future__ import annotations

import csv
import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from turnover.errors import InputError, WriteError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO})
_UNSUPPORTED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV})
_ZEROS = 2**20


@contextmanager
def writing_to(place: Path | str) -> Iterator[None]:
    """Raise a WriteError if the body meets a full disk, a spent quota or missing permission."""
    try:
        yield
    except Exception as error:
        code = _code(error)
        if code not in _FULL | _REFUSED:
            raise
        fix = "make room there" if code in _FULL else "make it writable"
        raise WriteError(
            f"{place} cannot be written: {os.strerror(code)}; {fix}, and run again"
        ) from error


@contextmanager
def writing_temporary(folder: Path | None = None) -> Iterator[str]:
    """Yield the temporary folder, or the given folder in it, and raise a WriteError if it is full."""
    fix = "make room there, or set TMPDIR to another folder, and run again"
    try:
        place = str(folder or tempfile.gettempdir())
    except FileNotFoundError as error:
        raise WriteError(f"no temporary folder can be written ({error}); {fix}") from error
    with writing_to(f"the temporary folder {place} (TMPDIR names another)"):
        try:
            yield place
        except FileNotFoundError as error:
            raise WriteError(f"the temporary folder {place} was deleted; {fix}") from error


def mapped(file: IO[bytes], shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Map an array of zeros at the end of a file; the array holds the file open.

    Its disk space is allocated now (OSError if full): writing to a page without space kills the process.
    """
    start = file.tell()
    _allocate(file, start, int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64)))
    array: NDArray[Any] = np.memmap(file, dtype, "r+", offset=start, shape=shape)
    return array


def _allocate(file: IO[bytes], start: int, size: int) -> None:
    file.flush()
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), start, size)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    for done in range(0, size, _ZEROS):
        file.write(bytes(min(_ZEROS, size - done)))
    file.flush()


def _code(error: Exception) -> int:
    """Error number of the operating system, 0 for other errors."""
    if isinstance(error, OSError):
        return error.errno or 0
    # Libraries in Rust (safetensors, tokenizers) have exceptions of their own.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a draft that replaces ``path`` when the body ends; it is deleted if the body fails.

    A device or a pipe is refused, and a full disk raises a WriteError.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is a device or a pipe; give the path of a file")
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with writing_to(path):
        try:
            yield draft
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def replace_folder(draft: Path, folder: Path) -> None:
    """Replace a folder by a draft; it is missing for no longer than two renames take."""
    old = folder.with_name(f".{folder.name}.old")
    with writing_to(folder):
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def alone(lock: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Let one process at a time run the body; the kernel releases the lock however the process ends.

    Args:
        lock: file for the lock alone, created if missing.
        what: the thing that is written, for the message to other processes.
        wait: wait for the other process to end, instead of raising an InputError.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock)
    try:
        with writing_to(what):
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise InputError(
            f"{what} is being written by another process; wait for it to end, or give another path"
        ) from None
    try:
        yield
    finally:
        held.release()


def check_within(path: Path, folder: Path, most: int) -> None:
    """Refuse a link that leads out of a folder, a device or pipe, and a file of more than ``most`` bytes."""
    try:
        # The path of the folder itself may contain links.
        real, home = os.path.realpath(path), os.path.realpath(folder)
        found = Path(real).stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not Path(real).is_relative_to(home):
        raise InputError(f"{path} leads out of {folder}: copy its target there, or remove it")
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path} is a device or a pipe, not a file; remove it")
    if found.st_size > most:
        raise InputError(f"{path} has {found.st_size} bytes, where {most} is the most; restore it")


def check_links(folder: Path) -> None:
    """Refuse links that lead out of a folder, or nowhere."""
    home, folders = folder.resolve(), [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as found:
                for entry in found:
                    if entry.is_symlink():
                        if not Path(entry).resolve().is_relative_to(home):
                            raise InputError(
                                f"{entry.path} leads out of {folder}: copy its target there (cp -rL)"
                            )
                    elif entry.is_dir():
                        folders.append(entry.path)
        except OSError as error:
            raise InputError(f"{folder}: cannot be listed: {error}") from error


def write_array(
    path: Path, shape: tuple[int, ...], dtype: DTypeLike, parts: Iterable[NDArray[Any]]
) -> None:
    """Write a ``.npy`` file in parts along the first dimension.

    On a full disk a memory map would kill the process, and ``np.save`` would not report it.
    """
    with path.open("wb") as file:
        write_header(file, shape, dtype)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype=dtype).data)


def write_header(file: IO[bytes], shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Write the header of a ``.npy`` file."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file, atomically."""
    with replacing(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
