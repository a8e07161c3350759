"""Which entries of a list the page wants, and in what order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.tasks.review import KEEP, REMOVE

PAGE = 50
"""Entries of a list that are sent at once."""


@dataclass(frozen=True)
class ErrorFilter:
    """Which errors are listed, and in what order.

    Attributes:
        true: name of the true class, empty for any.
        predicted: of the predicted one, likewise.
        low: lowest confidence, from 0 to 1.
        high: highest confidence.
        q: list those that have an instance with at most this q; 1 is all.
        words: every one must stand in the text, the key or a class name.
        sort: ``significant``, ``z``, ``confidence``, each from the highest, or ``row``.
        start: how many to leave out.
    """

    true: str = ""
    predicted: str = ""
    low: float = 0.0
    high: float = 1.0
    q: float = 1.0
    words: str = ""
    sort: str = "significant"
    start: int = 0


@dataclass(frozen=True)
class InstanceFilter:
    """Which training instances are listed, and in what order.

    Attributes:
        label: name of their class, empty for any.
        decision: ``any``, ``none``, ``made``, ``keep``, ``remove`` or ``relabel``.
        words: every one must stand in the text, the key or the class name.
        sort: ``harmful`` (to the whole test set, most harmful first), ``self`` (most learned by heart
            first), ``errors`` (significant on the most errors first), or ``row``.
        start: how many to leave out.
    """

    label: str = ""
    decision: str = "any"
    words: str = ""
    sort: str = "harmful"
    start: int = 0


def containing(
    found: NDArray[np.int64], words: str, haystack: Callable[[], list[str]]
) -> NDArray[np.int64]:
    """Those whose text, in small letters, has every word.

    Args:
        found: int64, positions in the haystack.
        words: with blanks between.
        haystack: the texts, asked for where there are words.
    """
    wanted = words.lower().split()
    if not wanted:
        return found
    texts = haystack()
    kept = [one for one in found.tolist() if all(word in texts[one] for word in wanted)]
    return np.array(kept, dtype=np.int64)


def ordered(
    found: NDArray[np.int64], sort: str, keys: Mapping[str, NDArray[Any]]
) -> NDArray[np.int64]:
    """What was found, by a key from the lowest; what has none comes last.

    Raises:
        InputError: an unknown order.
    """
    if sort not in keys:
        raise InputError(f"unknown order {sort!r}; there are {', '.join(keys)}")
    return found[np.argsort(keys[sort][found], kind="stable")]


def decided(rows: int, wanted: str, decisions: Mapping[int, str]) -> NDArray[np.bool_]:
    """bool (rows,): the rows whose decision is of a kind (see :class:`InstanceFilter`).

    Raises:
        InputError: an unknown kind.
    """
    kinds: dict[str, Callable[[str], bool]] = {
        "any": lambda _: True,
        "none": lambda _: False,
        "made": lambda _: True,
        "keep": lambda decision: decision == KEEP,
        "remove": lambda decision: decision == REMOVE,
        "relabel": lambda decision: decision not in (KEEP, REMOVE),
    }
    if wanted not in kinds:
        raise InputError(f"unknown kind of decision {wanted!r}; there are {', '.join(kinds)}")
    passes = np.full(rows, wanted in ("any", "none"))
    for row, decision in decisions.items():
        passes[row] = kinds[wanted](decision)
    return passes
