"""Files that are there whole or not at all, and what is said when a disk is full or not ours to write."""

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
    """The body writes there.

    Raises:
        WriteError: the disk is full, a quota is spent, or nothing can be written there.
    """
    try:
        yield
    except Exception as error:
        code = _code(error)
        if code not in _FULL | _REFUSED:
            raise
        mend = "make room there" if code in _FULL else "see to it that it can be"
        raise WriteError(
            f"{place} cannot be written: {os.strerror(code)}; {mend}, and run again"
        ) from error


@contextmanager
def writing_temporary(folder: Path | None = None) -> Iterator[str]:
    """The body writes into the temporary folder, which this yields.

    Args:
        folder: one in it, if it has been made.

    Raises:
        WriteError: it is full, or nothing can be written there.
    """
    mend = "make room there, or name another one by TMPDIR, and run again"
    try:
        place = str(folder or tempfile.gettempdir())
    except FileNotFoundError as error:
        raise WriteError(f"there is no temporary folder to write to ({error}); {mend}") from error
    with writing_to(f"the temporary folder {place} (TMPDIR names another)"):
        try:
            yield place
        except FileNotFoundError as error:
            raise WriteError(f"the temporary folder {place} is gone; {mend}") from error


def mapped(file: IO[bytes], shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array of zeros at the end of a file, written through a memory map.

    The file takes its room on the disk now: a page of a map for which there is none kills the process.
    The array holds the file open.

    Raises:
        OSError: the disk has no room for it.
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
    """What the operating system said, 0 where it was not asked."""
    if isinstance(error, OSError):
        return error.errno or 0
    # Libraries in Rust (safetensors, tokenizers) have exceptions of their own.
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else 0


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what becomes ``path`` when the body ends; nothing stays if it fails.

    Raises:
        InputError: a device or a pipe is there, which a file would take the place of.
        WriteError: the disk is full, or nothing can be written there.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is a device or a pipe; give the path of a file")
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing_to(path):
        try:
            yield draft
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def replace_folder(draft: Path, folder: Path) -> None:
    """Move a folder to the place of another, which is gone for no longer than two renames take.

    Raises:
        WriteError: nothing can be written there.
    """
    old = folder.with_name(f".{folder.name}.old")
    with writing_to(folder):
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        draft.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def alone(lock: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """The body is run by one process at a time; the kernel lets the next one in however it ends.

    Args:
        lock: a file of no other use, made where it is not there.
        what: the other processes are kept from writing, for the message.
        wait: for the other process to end.

    Raises:
        InputError: another process is at it, or the lock cannot be written.
    """
    from filelock import FileLock, Timeout

    held = FileLock(lock)
    try:
        with writing_to(what):
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise InputError(
            f"{what} is being written by another process; wait for it to end, or give another place"
        ) from None
    try:
        yield
    finally:
        held.release()


def check_within(path: Path, folder: Path, most: int) -> None:
    """Whether a file, if it is there, is a plain one of a folder, of at most so many bytes.

    Raises:
        InputError: a link leads out of the folder, it is a device or a pipe, which has no end, or larger.
    """
    try:
        # The folder itself may be reached by links.
        real, home = os.path.realpath(path), os.path.realpath(folder)
        found = Path(real).stat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    if not Path(real).is_relative_to(home):
        raise InputError(
            f"{path} leads out of {folder}: put there what it leads to, or take it out"
        )
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise InputError(f"{path} is a device or a pipe, not a file; take it out")
    if found.st_size > most:
        raise InputError(f"{path} has {found.st_size} bytes, where {most} is the most; restore it")


def check_links(folder: Path) -> None:
    """Whether all links in a folder stay in it.

    Raises:
        InputError: one leads out of it, or nowhere; or the folder cannot be listed.
    """
    home, folders = folder.resolve(), [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as found:
                for entry in found:
                    if entry.is_symlink():
                        if not Path(entry).resolve().is_relative_to(home):
                            raise InputError(
                                f"{entry.path} leads out of {folder}: put there what it leads to (cp -rL)"
                            )
                    elif entry.is_dir():
                        folders.append(entry.path)
        except OSError as error:
            raise InputError(f"{folder}: cannot be listed: {error}") from error


def write_array(
    path: Path, shape: tuple[int, ...], dtype: DTypeLike, parts: Iterable[NDArray[Any]]
) -> None:
    """Write a ``.npy`` file, part by part along the first dimension.

    Neither through a memory map, where a full disk kills the process, nor by ``np.save``, which does
    not say that the disk was full.
    """
    with path.open("wb") as file:
        write_header(file, shape, dtype)
        for part in parts:
            file.write(np.ascontiguousarray(part, dtype=dtype).data)


def write_header(file: IO[bytes], shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Write the beginning of a ``.npy`` file."""
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file, atomically."""
    with replacing(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
