"""Many computations on the same data, none of which waits for another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

Work = Callable[..., Any]
"""From the data and a job to its result: deterministic, and without a change to the data."""


Sweep = Callable[[Work, Sequence[Tensor], Iterable[Any]], Iterator[tuple[int, Any]]]
"""From work, data and jobs to the number and the result of every job, as they end."""


def evenly(count: int, most: int) -> list[slice]:
    """As few parts of as equal size as there can be, none of more than ``most``; ``count`` is >= 1."""
    parts = -(-count // most)
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def here(work: Work, data: Sequence[Tensor], jobs: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """The jobs in this process, one after the other."""
    return ((number, work(*data, job)) for number, job in enumerate(jobs))
