"""Engines: this process, or the workers of a Ray cluster."""

from __future__ import annotations

from turnover.errors import InputError

ENGINES = ("process", "ray")


def check_engine(engine: str) -> None:
    """Check that an engine exists, and that its packages are installed.

    Raises:
        InputError: an unknown engine, or a missing package.
    """
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}; there are: {', '.join(ENGINES)}")
    if engine == "ray":
        from turnover.parallel import ray  # noqa: F401 - raises an error that names the package
