"""Many computations on the same data, none of which waits for another: here, or as Ray tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from typing import Any

from torch import Tensor

from turnover.errors import InputError

ENGINES = ("process", "ray")

Work = Callable[..., Any]
"""From the data and a job to its result: deterministic, and without a change to the data."""
Sweep = Callable[[Work, Sequence[Tensor], Iterable[Any]], Iterator[tuple[int, Any]]]
"""From work, data and jobs to the number and the result of every job, as they end."""


def check_engine(engine: str) -> None:
    """Whether there is such an engine.

    Raises:
        InputError: there is none, or it needs a package that is missing.
    """
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}; there are: {', '.join(ENGINES)}")
    if engine == "ray":
        from turnover.integrations import ray  # noqa: F401 - says what is missing


@contextmanager
def sweeping(engine: str) -> Iterator[Sweep]:
    """What does the jobs, ready to; those that are under way when the body ends are given up.

    Args:
        engine: ``"process"``: this one, a job after the other; ``"ray"``: tasks of a Ray cluster with as
            many threads each as this process has, in the same bits.

    Raises:
        InputError: as :func:`check_engine`, or a Ray cluster that would not compute the same.
    """
    check_engine(engine)
    if engine == "process":
        yield here
        return
    from turnover.integrations import ray, ray_tasks

    with ray.connected(), ExitStack() as under_way:
        ray.Settings.here()
        yield lambda *given: under_way.enter_context(closing(ray_tasks.sweep(*given)))


def evenly(count: int, most: int) -> list[slice]:
    """As few parts of as equal size as there can be, none of more than ``most``; ``count`` is >= 1."""
    parts = -(-count // most)
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def here(work: Work, data: Sequence[Tensor], jobs: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """The jobs in this process, one after the other."""
    return ((number, work(*data, job)) for number, job in enumerate(jobs))
