"""Instance ids: checks, ghosts, and ids of strings and contents."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from turnover.errors import InputError


def check_ids(ids: Tensor | Sequence[int]) -> Tensor:
    """Convert ids to a one-dimensional int64 tensor, or refuse them where bits would be lost."""
    if not isinstance(ids, Tensor):
        ids = _ids_as_tensor(ids)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(
            f"instance ids must be integers, got {ids.dtype}: float ids collide from 2**24 on. "
            f"Use int64, or turnover.string_ids for string keys."
        )
    if ids.dim() != 1:
        raise InputError(f"instance ids must have shape (rows,), got {tuple(ids.shape)}")
    if ids.dtype == torch.uint64 and bool((ids.view(torch.int64) < 0).any()):
        raise InputError(
            "instance ids must lie below 2**63, and some uint64 ids do not; use "
            "turnover.string_ids on their decimal form"
        )
    return ids.to(torch.int64)


def _ids_as_tensor(ids: Sequence[int]) -> Tensor:
    if not len(ids):
        return torch.empty(0, dtype=torch.int64, device="cpu")
    items = ids if isinstance(ids, list | tuple) else ()
    strange = next((value for value in items if isinstance(value, str | bytes | bool)), None)
    if strange is not None:
        raise TypeError(
            f"instance ids must be integers, got {strange!r} of type {type(strange).__name__}: use "
            f"turnover.string_ids for string keys"
        )
    try:
        return torch.as_tensor(ids, device="cpu")
    except (OverflowError, RuntimeError, ValueError) as error:
        raise InputError(
            f"instance ids must be integers below 2**63: {error}; use turnover.string_ids on their "
            f"decimal form"
        ) from error


def check_training_ids(ids: Tensor | Sequence[int]) -> Tensor:
    """As :func:`check_ids`, and refuse negative ids, which are ghosts."""
    ids = check_ids(ids)
    if bool((ids < 0).any()):
        first = int(ids[ids < 0][0])
        raise InputError(
            f"training instance ids must be >= 0, got {first}: negative ids are ghosts, which are "
            f"never trained on"
        )
    return ids


def check_scored_ids(ids: Tensor | Sequence[int]) -> Tensor:
    """Check training ids to score: int64 (train,) on the CPU, at least one and each once."""
    ids = check_ids(ids).cpu()
    if not len(ids):
        raise InputError("no training ids given")
    twice = repeated(ids)
    if twice:
        raise given_twice(twice)
    return ids


def given_twice(ids: Sequence[int]) -> InputError:
    """The error of training ids that are scored more than once."""
    few = list(ids[:5])
    return InputError(f"training ids are given twice: {few}; score each id (group) once")


def repeated(ids: Tensor) -> list[int]:
    """Return the ids that appear more than once."""
    values, counts = torch.unique(ids, return_counts=True)
    twice: list[int] = values[counts > 1].tolist()
    return twice


def ghost_ids(count: int, *, start: int = 0) -> Tensor:
    """Ids that no training instance can have, so that their influence is pure noise.

    Args:
        count: number of ids, >= 0.
        start: ghosts to skip, >= 0; disjoint ranges are independent.

    Returns:
        int64 tensor (count,): ``-1 - start, -2 - start, ...``.

    Raises:
        InputError: a negative count or start.
    """
    if count < 0 or start < 0:
        raise InputError(f"count and start must be >= 0, got {count} and {start}")
    return -1 - torch.arange(start, start + count, dtype=torch.int64, device="cpu")


def string_ids(keys: Iterable[str]) -> Tensor:
    """Stable 63-bit ids of string keys; equal keys share an id and form a group.

    Args:
        keys: one string per instance: its own key, or that of its group (source, annotator).

    Returns:
        int64 tensor (instances,), values >= 0: BLAKE2b hashes, the same in every process and release.

    Raises:
        TypeError: a key is not a string (kinds may not be mixed).
        InputError: two different keys share an id (about 1 in 10**7 at a million keys).
    """
    seen: dict[int, str] = {}
    ids = []
    for key in keys:
        if not isinstance(key, str):
            raise TypeError(
                f"string_ids takes strings only, got {key!r} of type {type(key).__name__}: ids must "
                f"be all integers or all strings"
            )
        value = int.from_bytes(text_digest(key), "little") >> 1
        if seen.setdefault(value, key) != key:
            raise InputError(
                f"keys {seen[value]!r} and {key!r} have the same 63-bit hash; rename one of them"
            )
        ids.append(value)
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def content_ids(contents: Iterable[str]) -> Tensor:
    """Ids for data without an id column: hashes of the content and its occurrence count.

    Sorting the data again changes no id, appended rows get new ids, and exact duplicates get different
    ids.

    Args:
        contents: one string per instance with all of its content (text and label).

    Returns:
        int64 tensor (instances,), distinct, values >= 0.
    """
    counts: Counter[str] = Counter()
    keys = []
    for content in contents:
        keys.append(f"{content}\0{counts[content]}")
        counts[content] += 1
    return string_ids(keys)


def text_digest(text: str) -> bytes:
    """64-bit BLAKE2b hash of a text."""
    # Files read with surrogateescape hold lone surrogates, which strict UTF-8 cannot encode.
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
