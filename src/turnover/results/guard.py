"""Chunks as they are on disk, looked at before they are unpacked: a few bytes may claim to be any size.

Needs zarr.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zarr.storage import WrapperStore

from turnover.errors import InputError

if TYPE_CHECKING:
    from turnover.results.location import Place

MOST_BYTES = 2**30
"""Of a chunk, packed or unpacked."""
_MAGIC = bytes.fromhex("28b52ffd")
_SIZES = (0, 2, 4, 8)


class Checked(WrapperStore[Any]):  # type: ignore[misc]
    """A zarr store that gives no chunk which would unpack to more than one may hold, nor any of elsewhere."""

    def __init__(self, store: Any, place: Place) -> None:
        super().__init__(store)
        self._place = place

    def _with_store(self, store: Any) -> Checked:
        return Checked(store, self._place)

    async def get(self, key: str, *args: Any, **options: Any) -> Any:
        """What is stored.

        Raises:
            ValueError: it is refused.
        """
        try:
            self._place.check(key, MOST_BYTES)
        except InputError as error:
            raise ValueError(str(error)) from error
        found = await super().get(key, *args, **options)
        if found is not None and "/c/" in key:
            size = unpacked_bytes(found.as_numpy_array()[:18].tobytes())
            if size > MOST_BYTES:
                raise ValueError(
                    f"it would be {size} bytes unpacked, where {MOST_BYTES} is the most"
                )
        return found


def unpacked_bytes(frame: bytes) -> int:
    """Bytes that a Zstandard frame says it unpacks to (RFC 8878, section 3.1.1.1).

    Raises:
        ValueError: no such frame, or one that does not say it.
    """
    if frame[:4] != _MAGIC or len(frame) < 5:
        raise ValueError("it is not a Zstandard frame")
    described = frame[4]
    single = bool(described & 0x20)
    size = _SIZES[described >> 6] or int(single)
    start = 5 + (not single) + (0, 1, 2, 4)[described & 3]
    field = frame[start : start + size]
    if not size or len(field) < size:
        raise ValueError("it does not say how large it is unpacked")
    return int.from_bytes(field, "little") + 256 * (size == 2)
