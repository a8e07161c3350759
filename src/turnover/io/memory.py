"""What the C library does with freed memory: a command owns its process, and may say."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import Any

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
"""Of glibc's malloc.h."""
_KEPT, _KEPT_IN_ALL = 2**26, 2**28
"""Bytes of the largest freed block that is kept for the next one, and of all of them."""


def keep_freed_memory() -> None:
    """Let glibc keep what a training step frees for the next one, whose gradients are as large.

    By default it returns blocks above 32 MiB to the system; fresh pages took an eighth of a step's time.
    Elsewhere than with glibc nothing happens.

    Example::

        keep_freed_memory()
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_IN_ALL)


def return_freed_memory() -> None:
    """Let glibc return what is free to the system, before other work that needs as much.

    Example::

        return_freed_memory()
    """
    gc.collect()
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Any:
    """A function, where the C library has it."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
