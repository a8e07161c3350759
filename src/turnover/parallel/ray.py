"""A connection to Ray, and settings under which its workers compute the same bits.

Needs ``turnover[ray]``.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnover.errors import InputError, needing

with needing('engine="ray"', "turnover[ray]"):
    import ray

_RETRIES = 5
"""Workers that a task may lose: one that always takes its worker with it must end."""
WAITING = 2
"""Tasks submitted for each place where one can run, so that none stands idle."""
PATIENCE = 10.0
"""Seconds between two looks at the right to write."""


@dataclass(frozen=True)
class Settings:
    """Of this process, and of its tasks: with others they would not compute the same bits."""

    threads: int
    precision: str
    dtype: torch.dtype

    @classmethod
    def here(cls) -> Settings:
        """Those of this process.

        Raises:
            InputError: autocast, or threads that no node has.
        """
        if torch.is_autocast_enabled("cpu"):
            raise InputError(
                'engine="ray" leaves autocast behind: open it within the model\'s forward'
            )
        if not places():
            raise InputError(
                f"this process has {torch.get_num_threads()} threads, and no node of the Ray cluster so "
                f"many CPUs: call torch.set_num_threads, or set OMP_NUM_THREADS"
            )
        return cls(
            torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_default_dtype()
        )

    def task(self, function: Any, **options: Any) -> Any:
        """The remote function as a task that takes as many CPUs as it has threads."""
        return function.options(num_cpus=self.threads, max_retries=_RETRIES, **options)

    def take(self) -> None:
        """Make them those of this process, which is a worker."""
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.precision)
        torch.set_default_dtype(self.dtype)


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """The Ray that this process is connected to; else one that is there, or one of this machine.

    Args:
        address: of the one that is there, host:port; ``None``: that of ``RAY_ADDRESS``, if it is set.

    Raises:
        InputError: there is none.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its makers
    if address is not None:
        _probe(address)
    try:
        ray.init(address, include_dashboard=False, configure_logging=False, log_to_driver=False)
    # It also leaves by SystemExit, which would end the process without a word.
    except (ConnectionError, ValueError, RuntimeError, ImportError, SystemExit) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise InputError(
            f"no connection to Ray at {where}: {error}. A cluster that asks for a token wants "
            f"RAY_AUTH_MODE=token and RAY_AUTH_TOKEN here as well"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Whether anything answers there: Ray itself takes a minute to say no."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise InputError(f"the address of a Ray cluster is host:port, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no connection to Ray at {address}: {error}; is it running there (ray start --head)?"
        ) from error


def places() -> int:
    """Tasks that the cluster can run at once."""
    threads = torch.get_num_threads()
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(int(resources.get("CPU", 0)) // threads for resources in alive)


_held: dict[str, Any] = {}
"""Of a worker: what it was sent, and the block of targets it scored last, whose derivatives serve again."""


def kept(name: str, reference: Any, make: Any) -> Any:
    """What is made of an object, made once as long as the object is the same."""
    found = _held.get(name)
    if found is None or found[0] != reference:
        _held.pop(name, None)
        found = _held[name] = (reference, make(ray.get(reference)))
    return found[1]


def tensor_of(values: np.ndarray[Any, Any]) -> Tensor:
    """An array as a tensor in the same memory, where that begins as torch's own does."""
    if values.ctypes.data % 64:
        return torch.tensor(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it may not be written to, and is not
        return torch.from_numpy(values)
