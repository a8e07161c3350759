"""Many computations on the same data, none of which waits for another: here, or as Ray tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from turnover.errors import InputError
from turnover.parallel.jobs import Sweep, here

ENGINES = ("process", "ray")


def check_engine(engine: str) -> None:
    """Whether there is such an engine.

    Raises:
        InputError: there is none, or it needs a package that is missing.
    """
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}; there are: {', '.join(ENGINES)}")
    if engine == "ray":
        from turnover.parallel import ray  # noqa: F401 - says what is missing


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
    from turnover.parallel import ray, ray_jobs

    with ray.connected(), ExitStack() as under_way:
        ray.Settings.here()
        yield lambda *given: under_way.enter_context(closing(ray_jobs.sweep(*given)))
