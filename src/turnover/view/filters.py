"""Filters and orders of the page's lists."""

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
_DECISIONS = ("any", "none", "made", KEEP, REMOVE, "relabel")


@dataclass(frozen=True)
class ErrorFilter:
    """Selects and orders errors.

    Attributes:
        true: name of the true class, empty for any.
        predicted: name of the predicted class, empty for any.
        low: lowest confidence, from 0 to 1.
        high: highest confidence.
        q: highest q of an error's most significant instance; 1 is all.
        words: words that must all be in the text, the key or a class name.
        sort: ``significant``, ``z``, ``confidence``, each from the highest, or ``row``.
        start: how many to skip.
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
    """Selects and orders training instances.

    Attributes:
        label: name of their class, empty for any.
        decision: ``any``, ``none``, ``made``, ``keep``, ``remove`` or ``relabel``.
        words: words that must all be in the text, the key or the class name.
        sort: ``doubt`` (most doubtful label first), ``harmful`` (to the whole test set, most harmful first),
            ``self`` (most memorized first), ``errors`` (significant on the most errors first), or ``row``.
        start: how many to skip.
    """

    label: str = ""
    decision: str = "any"
    words: str = ""
    sort: str = "harmful"
    start: int = 0


def containing(
    passes: NDArray[np.bool_], words: str, texts: Callable[[], list[str]]
) -> NDArray[np.int64]:
    """Positions that pass and whose text contains every word; texts are in lower case, made if needed."""
    found, wanted = np.flatnonzero(passes), words.lower().split()
    if not wanted:
        return found
    known = texts()
    kept = [one for one in found.tolist() if all(word in known[one] for word in wanted)]
    return np.array(kept, dtype=np.int64)


def ordered(
    found: NDArray[np.int64], sort: str, keys: Mapping[str, NDArray[Any]]
) -> NDArray[np.int64]:
    """Sort by a key, the lowest first and NaN last; refuse an unknown key."""
    if sort not in keys:
        raise InputError(f"unknown order {sort!r}; there are {', '.join(keys)}")
    return found[np.argsort(keys[sort][found], kind="stable")]


def decided(rows: int, wanted: str, decisions: Mapping[int, str]) -> NDArray[np.bool_]:
    """Rows whose decision is of a kind (see :class:`InstanceFilter`), bool (rows,)."""
    if wanted not in _DECISIONS:
        raise InputError(f"unknown kind of decision {wanted!r}; there are {', '.join(_DECISIONS)}")
    passes = np.full(rows, wanted in ("any", "none"))
    for row, decision in decisions.items():
        kind = decision if decision in (KEEP, REMOVE) else "relabel"
        passes[row] = wanted in ("any", "made", kind)
    return passes
