"""Where a command that shares its work out finds those who take a part."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from turnover.errors import InputError


def connecting(engine: str, address: str | None) -> AbstractContextManager[None]:
    """A connection to the Ray cluster, for the length of a with statement.

    Raises:
        InputError: an address for another engine, or Ray is missing; on entry: there is no cluster.
    """
    if address is not None and engine != "ray":
        raise InputError("--address is that of a Ray cluster: give --engine ray as well")
    if engine != "ray":
        return nullcontext()
    from turnover.parallel.ray import connected

    return connected(address)
