"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1
"""Of glibc's malloc.h."""
_KEPT, _KEPT_IN_ALL = 2**26, 2**28
"""Bytes of the largest freed block that is kept for the next one, and of all of them."""
_USUAL, _USUAL_IN_ALL = 2**25, 2**26
"""The most of both that glibc goes up to by itself."""


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc keep what a training step frees for the next one; afterwards it returns all to the system.

    By itself it returns blocks above 32 MiB, such as the gradient of a wide head. Fresh pages for them took a
    fifth of a step's time. Elsewhere than with glibc nothing happens.

    Example::

        with freed_memory_kept():
            training.train(...)
    """
    found = ctypes.CDLL(None) if sys.platform == "linux" else None
    mallopt, trim = (getattr(found, name, None) for name in ("mallopt", "malloc_trim"))
    if mallopt is None or trim is None:
        yield
        return
    _set(mallopt, _KEPT, _KEPT_IN_ALL)
    try:
        yield
    finally:
        _set(mallopt, _USUAL, _USUAL_IN_ALL)
        gc.collect()
        trim(0)


def _set(mallopt: Any, block: int, in_all: int) -> None:
    mallopt(_M_MMAP_THRESHOLD, block)
    mallopt(_M_TRIM_THRESHOLD, in_all)
