"""Jobs of a sweep (:mod:`turnover.parallel.engines`) as Ray tasks. Needs ``turnover[ray]``.

The data are sent once, and each job when it is its turn. Results come back to this process, which alone
writes what is kept. A job that is lost with its worker is done again by Ray, and gives the same bits.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray import cloudpickle
from ray.exceptions import RayTaskError
from torch import Tensor

from turnover.errors import InputError
from turnover.parallel.jobs import Work
from turnover.parallel.ray import WAITING, Settings, kept, places, tensor_of

_Packed = tuple[bytes, list[tuple[NDArray[np.uint8], torch.dtype, torch.Size]]]


def sweep(
    work: Work, data: Sequence[Tensor], jobs: Iterable[Any]
) -> Generator[tuple[int, Any], None, None]:
    """Results of jobs as their tasks end; no more than a few wait for a worker.

    Args:
        work: what is done with data and a job.
        data: on the CPU; all workers of a node read them from one memory, and none may write to it.
        jobs: taken as the tasks before them end.

    Raises:
        InputError: from whichever task; data that are not on the CPU, or work that does not pickle.
        ray.exceptions.RayError: a job lost its worker again and again.
    """
    shared = ray.put(_packed(work, data))
    settings = Settings.here()
    task = settings.task(_done)
    flight: dict[Any, int] = {}

    def landed() -> list[tuple[int, Any]]:
        done, _ = ray.wait(list(flight))
        try:
            return [(flight.pop(one), ray.get(one)) for one in done]
        except RayTaskError as error:
            raise error.cause from error

    try:
        for number, job in enumerate(jobs):
            while len(flight) >= WAITING * max(1, places()):
                yield from landed()
            # A reference in a list is not fetched before the task asks for it.
            flight[task.remote(settings, [shared], job)] = number
        while flight:
            yield from landed()
    finally:
        for one in flight:
            ray.cancel(one, force=True)


@ray.remote  # type: ignore[untyped-decorator]
def _done(settings: Settings, shared: list[Any], job: Any) -> Any:
    settings.take()
    work, data = kept("sweep", shared[0], _unpacked)
    return work(*data, job)


def _packed(work: Work, data: Sequence[Tensor]) -> _Packed:
    devices = {values.device.type for values in data}
    if devices - {"cpu"}:
        raise InputError(f'engine="ray" runs on CPUs, and data are on {max(devices - {"cpu"})}')
    try:
        pickled: bytes = cloudpickle.dumps(work)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise InputError(
            f'engine="ray" sends what builds the networks to other processes, and it does not pickle: '
            f"{error}"
        ) from error
    flat = [values.detach().contiguous() for values in data]
    arrays = [values.reshape(-1).view(torch.uint8).numpy() for values in flat]
    return pickled, [(a, v.dtype, v.shape) for a, v in zip(arrays, flat, strict=True)]


def _unpacked(packed: _Packed) -> tuple[Work, list[Tensor]]:
    pickled, arrays = packed
    try:
        work: Work = cloudpickle.loads(pickled)
    except ImportError as error:
        raise InputError(
            f"a Ray worker on {socket.gethostname()} cannot import {error.name}, which what builds the "
            f"networks is of: install it there, or name its folder in PYTHONPATH before Ray starts"
        ) from error
    return work, [tensor_of(raw).view(dtype).reshape(shape) for raw, dtype, shape in arrays]
