"""Checks chunks before they are decompressed: a few bytes may claim to hold any size. Needs zarr."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zarr.storage import WrapperStore

from turnover.errors import InputError

MAX_CHUNK_BYTES = 2**30
"""Of a chunk, compressed or decompressed."""
_MAGIC = bytes.fromhex("28b52ffd")
_SIZES = (0, 2, 4, 8)


class GuardedStore(WrapperStore[Any]):  # type: ignore[misc]
    """A zarr store that rejects chunks over 1 GiB decompressed, and what ``check`` rejects."""

    def __init__(self, store: Any, check: Callable[[str, int], None]) -> None:
        super().__init__(store)
        self._check = check

    def _with_store(self, store: Any) -> GuardedStore:
        return GuardedStore(store, self._check)

    async def get(self, key: str, *args: Any, **options: Any) -> Any:
        """See :class:`zarr.abc.store.Store`; raises ValueError for what is rejected."""
        try:
            self._check(key, MAX_CHUNK_BYTES)
        except InputError as error:
            raise ValueError(str(error)) from error
        found = await super().get(key, *args, **options)
        if found is not None and "/c/" in key:
            size = decompressed_bytes(found.as_numpy_array()[:18].tobytes())
            if size > MAX_CHUNK_BYTES:
                raise ValueError(
                    f"it would be {size} bytes decompressed, where {MAX_CHUNK_BYTES} is the most"
                )
        return found


def decompressed_bytes(frame: bytes) -> int:
    """Decompressed size that a Zstandard frame declares (RFC 8878, section 3.1.1.1)."""
    if frame[:4] != _MAGIC or len(frame) < 5:
        raise ValueError("it is not a Zstandard frame")
    descriptor = frame[4]
    single = bool(descriptor & 0x20)
    size = _SIZES[descriptor >> 6] or int(single)
    start = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    field = frame[start : start + size]
    if not size or len(field) < size:
        raise ValueError("it does not declare its decompressed size")
    return int.from_bytes(field, "little") + 256 * (size == 2)
