"""What files hold that somebody else may have written: data of the right kind, or a refusal in one line."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from turnover.errors import InputError

_WRONG = (
    *(AttributeError, IndexError, KeyError, OverflowError, RecursionError),
    *(TypeError, ValueError, ZeroDivisionError),
)


def json_of(raw: bytes | str) -> Any:
    """Values of a JSON text.

    Raises:
        ValueError: not JSON, nested too deeply, or half a character pair, which no file can hold again.
    """
    text = raw.decode() if isinstance(raw, bytes) else raw
    try:
        values = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a character pair (surrogate)") from None
    return values


@contextmanager
def as_written(where: Path | str, mend: str = "restore it, or make it again") -> Iterator[None]:
    """The body takes values of a file for what was written there.

    Raises:
        InputError: they are something else.
    """
    try:
        yield
    except InputError:
        raise
    except _WRONG as error:
        said = " ".join(repr(error).split())[:300]
        raise InputError(f"{where}: damaged, or not as it was written ({said}); {mend}") from error


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
