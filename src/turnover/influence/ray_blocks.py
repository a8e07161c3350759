"""Blocks of a result as Ray tasks, on the cores of one machine or many. Needs ``turnover[ray]``.

Each task writes regions of its own; this process alone announces targets, keeps the right to write and
finishes the result. A task that is lost with its worker is run again by Ray, and makes the same bits.
"""

from __future__ import annotations

import io
import pickle
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray import cloudpickle
from ray.exceptions import RayTaskError
from torch import Tensor, nn

from turnover.batches import Batch
from turnover.dropout.modules import device_of
from turnover.errors import InputError
from turnover.influence.blockwise import Walk
from turnover.influence.engine import TargetBlock
from turnover.influence.sinks import StoreSink
from turnover.influence.topk import Found
from turnover.parallel.ray import PATIENCE, WAITING, Settings, kept, places, tensor_of
from turnover.results.store import joining
from turnover.results.writer import Writer


@dataclass(frozen=True)
class _Task:
    """Where one block belongs."""

    rows: slice
    part: slice
    columns: int
    url: str
    manifest: Mapping[str, Any]
    settings: Settings


def check(walk: Walk) -> None:
    """Whether tasks would compute what this process would.

    Raises:
        InputError: a network that is not on the CPU, autocast, or threads that no node has.
    """
    devices = {device_of(engine.network.model).type for engine in walk.engines}
    if devices != {"cpu"}:
        raise InputError(f'engine="ray" runs on CPUs, and a network is on {max(devices - {"cpu"})}')
    Settings.here()


def over(walk: Walk, targets: Iterable[Batch], ids: Tensor, writer: Writer) -> int:
    """Score all targets, each block in a task, and write them; returns how many targets there were.

    Args:
        walk: how they are gone through; its networks are broadcast once.
        targets: batches, taken as the tasks before them end.
        ids: int64 (train,).
        writer: of the result, begun here.

    Raises:
        InputError: as :meth:`turnover.Influence.estimate`, from whichever task; a network that does not
            pickle.
        ray.exceptions.RayError: a block lost its worker again and again.
    """
    url, columns = writer.location.address, walk.grid(len(ids))[1]
    settings = Settings.here()
    broadcast = ray.put(_packed(walk, ids))
    fill, settle = settings.task(_fill), settings.task(_settle)
    scan = settings.task(_scan, num_returns=2)
    flight: dict[Any, tuple[int, slice] | None] = {}
    count = 0

    def land() -> None:
        done, _ = ray.wait(list(flight), timeout=PATIENCE)
        writer.renew()
        for one in done:
            try:
                ray.get(one)
            except RayTaskError as error:
                raise error.cause from error
            scored = flight.pop(one)
            if scored is not None:
                walk.count(scored[0], len(ids), scored[1])

    try:
        for rows, batches in walk.announced(targets, ids, StoreSink(writer, walk)):
            count += (many := rows.stop - rows.start)
            # References in a list are not fetched before the task asks for them.
            block = [broadcast], [ray.put(batches)]
            scanned = []
            for part in walk.parts(len(ids), columns):
                while len(flight) >= WAITING * max(1, places()):
                    land()
                task = _Task(rows, part, columns, url, writer.manifest, settings)
                if walk.scans:
                    ended, found = scan.remote(task, *block)
                    scanned.append(found)
                else:
                    ended = fill.remote(task, *block)
                flight[ended] = many, part
            if scanned:  # begins when all of them have ended
                flight[settle.remote(task, *block, *scanned)] = None
        while flight:
            land()
    finally:
        for one in flight:
            ray.cancel(one, force=True)
    return count


@ray.remote  # type: ignore[untyped-decorator]
def _fill(task: _Task, broadcast: list[Any], targets: list[Any]) -> None:
    with _begun(task, broadcast, targets) as (walk, block, ids, sink):
        walk.fill(block, task.rows, ids, sink, task.columns, task.part)


@ray.remote  # type: ignore[untyped-decorator]
def _scan(task: _Task, broadcast: list[Any], targets: list[Any]) -> tuple[None, Found | None]:
    """What the part has, apart from whether it has ended: that alone goes to the driver."""
    with _begun(task, broadcast, targets) as (walk, block, ids, sink):
        return None, walk.scan(block, task.rows, ids, sink, task.columns, task.part)


@ray.remote  # type: ignore[untyped-decorator]
def _settle(task: _Task, broadcast: list[Any], targets: list[Any], *parts: Found | None) -> None:
    with _begun(task, broadcast, targets) as (walk, block, ids, sink):
        walk.settle(block, task.rows, ids, sink, task.columns, parts)


@contextmanager
def _begun(
    task: _Task, broadcast: list[Any], targets: list[Any]
) -> Iterator[tuple[Walk, TargetBlock, Tensor, StoreSink]]:
    task.settings.take()
    walk, ids = kept("walk", broadcast[0], _unpacked)
    block = kept("block", targets[0], lambda batches: TargetBlock(walk.engines, batches))
    sink = StoreSink(joining(task.url, task.manifest, task.rows.stop))
    with ExitStack() as stack:
        for engine in walk.engines:
            stack.enter_context(engine.evaluating())
        yield walk, block, ids, sink


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
    """Leaves parameters out as arrays, which all workers of a node then read from one memory.

    Buffers are copied: a forward may write into them.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.arrays: list[tuple[np.ndarray[Any, Any], torch.dtype, torch.Size, bool]] = []
        self._seen: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        """Number of the array that a parameter is left out as."""
        if type(value) is not nn.Parameter or value.layout != torch.strided:
            return None
        if id(value) not in self._seen:
            self._seen[id(value)] = len(self.arrays)
            raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            self.arrays.append((raw, value.dtype, value.shape, value.requires_grad))
        return self._seen[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, parameters: list[nn.Parameter]) -> None:
        super().__init__(file)
        self._parameters = parameters

    def persistent_load(self, pid: int) -> nn.Parameter:
        """The parameter of a number."""
        return self._parameters[pid]


def _packed(walk: Walk, ids: Tensor) -> tuple[bytes, list[Any], Any]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(walk)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise InputError(
            f'engine="ray" sends networks and objective to other processes, and they do not pickle: {error}'
        ) from error
    return file.getvalue(), pickler.arrays, ids.numpy()


def _unpacked(packed: tuple[bytes, list[Any], Any]) -> tuple[Walk, Tensor]:
    pickled, arrays, ids = packed
    parameters = []
    for raw, dtype, shape, trained in arrays:
        values = tensor_of(raw).view(dtype).reshape(shape)
        parameters.append(nn.Parameter(values, requires_grad=trained))
    try:
        walk = _Unpickler(io.BytesIO(pickled), parameters).load()
    except ImportError as error:
        raise InputError(
            f"a Ray worker on {socket.gethostname()} cannot import {error.name}, which the network or the "
            f"objective is of: install it there, or name its folder in PYTHONPATH before Ray starts"
        ) from error
    return walk, tensor_of(ids)
