"""Connect to Ray, and make its workers compute the same bits as this process. Needs ``turnover[ray]``."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterable, Iterator
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
"""Workers that a task may lose; a task that always kills its worker must end."""
WAITING = 2
"""Tasks submitted for each place where one can run, so that no place is idle."""
PATIENCE = 10.0
"""Seconds to wait for a connection, and between two checks of the lease."""


@dataclass(frozen=True)
class Settings:
    """Settings of a process on which the bits of its results depend, and the share of a GPU of a task."""

    threads: int
    precision: str
    dtype: torch.dtype
    gpus: float = 0.0

    @classmethod
    def here(cls, gpus: float = 0.0) -> Settings:
        """Return the settings of this process."""
        if torch.is_autocast_enabled("cuda" if gpus else "cpu"):
            raise InputError(
                'engine="ray" does not send autocast to its workers: use it within the model\'s forward'
            )
        if not places():
            raise InputError(
                f"this process has {torch.get_num_threads()} threads, more than any node of the Ray "
                f"cluster has CPUs: call torch.set_num_threads, or set OMP_NUM_THREADS"
            )
        if not places(gpus):
            raise InputError(
                f"the networks are on CUDA, and no node of the Ray cluster has {gpus:g} GPUs for a task: "
                f"lower num_gpus, start Ray with --num-gpus, or move the networks to the CPU"
            )
        return cls(
            torch.get_num_threads(),
            torch.get_float32_matmul_precision(),
            torch.get_default_dtype(),
            gpus,
        )

    @classmethod
    def on(cls, devices: Iterable[torch.device], num_gpus: float) -> Settings:
        """Return settings of tasks that compute the same bits as this process.

        Args:
            devices: of the networks.
            num_gpus: share of a GPU that a task takes if they are on CUDA.
        """
        kinds = {device.type for device in devices}
        if kinds not in ({"cpu"}, {"cuda"}):
            listed = " and ".join(sorted(kinds))
            raise InputError(
                f'engine="ray" runs networks on CPUs, or on CUDA, and these are on {listed}'
            )
        return cls.here(num_gpus if kinds == {"cuda"} else 0.0)

    def task(self, function: Any, **options: Any) -> Any:
        """Return a remote function that takes as many CPUs as it has threads, and its share of a GPU."""
        taken = {"num_cpus": self.threads, "num_gpus": self.gpus, "max_retries": _RETRIES}
        return function.options(**taken, **options)

    def take(self) -> None:
        """Apply the settings to this process, a worker."""
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.precision)
        torch.set_default_dtype(self.dtype)


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Use the Ray cluster that this process is connected to, else connect to one, or start one here.

    Args:
        address: host:port of a cluster; ``None``: ``RAY_ADDRESS``, else start one on this machine.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report to its developers
    if address is not None:
        _probe(address)
    try:
        ray.init(address, include_dashboard=False, configure_logging=False, log_to_driver=False)
    # It also raises SystemExit, which would end the process without a message.
    except (ConnectionError, ValueError, RuntimeError, ImportError, SystemExit) as error:
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise InputError(
            f"no connection to Ray at {where}: {error}. A cluster with tokens needs RAY_AUTH_MODE=token "
            f"and RAY_AUTH_TOKEN here as well"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Check that something answers at an address: Ray itself takes a minute to fail."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise InputError(f"the address of a Ray cluster is host:port, not {address!r}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"no connection to Ray at {address}: {error}; is it running there (ray start --head)?"
        ) from error


def places(gpus: float = 0.0) -> int:
    """Count the tasks, each with its share of a GPU, that the cluster can run at once."""
    threads = torch.get_num_threads()
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count = 0
    for resources in alive:
        of_cpus = int(resources.get("CPU", 0)) // threads
        count += min(of_cpus, int(resources.get("GPU", 0) / gpus)) if gpus else of_cpus
    return count


_held: dict[str, Any] = {}
"""Cache of a worker: the objects it was sent, and the last block of targets, whose derivatives are reused."""


def kept(name: str, reference: Any, make: Any) -> Any:
    """Return what is made of an object, and make it once as long as the object is the same."""
    found = _held.get(name)
    if found is None or found[0] != reference:
        _held.pop(name, None)
        found = _held[name] = (reference, make(ray.get(reference)))
    return found[1]


def tensor_of(values: np.ndarray[Any, Any]) -> Tensor:
    """Return an array as a tensor, in the same memory if that is aligned as torch's own."""
    if values.ctypes.data % 64:
        return torch.tensor(values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the array is read-only, and never written
        return torch.from_numpy(values)
