"""Blocks of a result as Ray tasks, on the cores of one machine or many. Needs ``turnover[ray]``.

Each task writes regions of its own; this process alone announces targets, holds the lease and finishes the
result. Ray runs a task again whose worker was lost, and gets the same bits.
"""

from __future__ import annotations

import io
import pickle
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray import cloudpickle
from ray.exceptions import RayTaskError
from torch import Tensor, nn

from turnover.batches import Batch
from turnover.dropout.modules import device_of
from turnover.errors import InputError
from turnover.influence.blockwise import Traversal
from turnover.influence.engine import Engine, TargetBlock
from turnover.influence.sinks import Region, StoreSink
from turnover.influence.topk import Found
from turnover.parallel.ray import PATIENCE, WAITING, Settings, kept, places, tensor_of
from turnover.results.store import joining
from turnover.results.writer import Writer


@dataclass(frozen=True)
class _Task:
    """The place of one block in the result."""

    rows: slice
    part: slice
    columns: int
    url: str
    manifest: Mapping[str, Any]
    settings: Settings


def settings_of(engines: Sequence[Engine], num_gpus: float) -> Settings:
    """Settings of tasks that compute the same bits as this process.

    Args:
        engines: of the networks.
        num_gpus: share of a GPU that a task takes if the networks are on CUDA.
    """
    kinds = {device_of(engine.network.model).type for engine in engines}
    if kinds not in ({"cpu"}, {"cuda"}):
        raise InputError(
            f'engine="ray" runs networks on CPUs, or on CUDA, and these are on {" and ".join(sorted(kinds))}'
        )
    return Settings.here(num_gpus if kinds == {"cuda"} else 0.0)


def over(
    settings: Settings, traversal: Traversal, targets: Iterable[Batch], ids: Tensor, writer: Writer
) -> int:
    """Score all targets, each block in a task, and write the scores; returns the number of targets.

    Args:
        settings: of the tasks.
        traversal: scores the blocks; its networks are broadcast once.
        targets: batches, taken as the tasks before them end.
        ids: int64 (train,).
        writer: of the result, begun here.
    """
    url, columns = writer.location.address, traversal.grid(len(ids))[1]
    halving = traversal.estimator.halving
    broadcast = ray.put(_packed(traversal, ids))
    fill, settle = settings.task(_fill), settings.task(_settle)
    scan = settings.task(_scan, num_returns=2)
    flight: dict[Any, tuple[int, slice] | None] = {}
    count = 0

    def land() -> None:
        done, _ = ray.wait(list(flight), timeout=PATIENCE)
        writer.renew()
        for one in done:
            try:
                halving.learn(ray.get(one))
            except RayTaskError as error:
                raise error.cause from error
            scored = flight.pop(one)
            if scored is not None:
                traversal.count(*scored)

    try:
        for rows, batches in traversal.announced(
            targets, ids, StoreSink(writer, traversal.estimator)
        ):
            count += (many := rows.stop - rows.start)
            # Ray leaves references in a list to the task to fetch.
            sent = [batch.mapped(Tensor.cpu, shared=True) for batch in batches]
            block = [broadcast], [ray.put(sent)]
            scanned = []
            for part in traversal.parts(len(ids), columns):
                while len(flight) >= WAITING * max(1, places(settings.gpus)):
                    land()
                task = _Task(rows, part, columns, url, writer.manifest, settings)
                if traversal.scans:
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
def _fill(task: _Task, broadcast: list[Any], targets: list[Any]) -> dict[str, int]:
    """Bounds of forwards after it, as of the others."""
    with _region(task, broadcast, targets) as (traversal, region):
        traversal.fill(region, task.part)
    return traversal.estimator.halving.most


@ray.remote  # type: ignore[untyped-decorator]
def _scan(
    task: _Task, broadcast: list[Any], targets: list[Any]
) -> tuple[dict[str, int], Found | None]:
    """The bounds, which alone go to the driver, and the extremes of the part."""
    with _region(task, broadcast, targets) as (traversal, region):
        found = traversal.scan(region, task.part)
    return traversal.estimator.halving.most, found


@ray.remote  # type: ignore[untyped-decorator]
def _settle(
    task: _Task, broadcast: list[Any], targets: list[Any], *parts: Found | None
) -> dict[str, int]:
    with _region(task, broadcast, targets) as (traversal, region):
        traversal.settle(region, parts)
    return traversal.estimator.halving.most


@contextmanager
def _region(
    task: _Task, broadcast: list[Any], targets: list[Any]
) -> Iterator[tuple[Traversal, Region]]:
    task.settings.take()
    traversal, ids = kept("traversal", broadcast[0], _unpacked)
    engines = traversal.estimator.engines
    block = kept("block", targets[0], lambda batches: TargetBlock(engines, batches))
    writer = joining(task.url, task.manifest, task.rows.stop)
    sink = StoreSink(writer)
    with ExitStack() as stack:
        stack.enter_context(traversal.estimator.halving.noted(writer))
        for engine in engines:
            stack.enter_context(engine.evaluating())
        yield traversal, Region(block, task.rows, ids, task.columns, sink)


class _Array(NamedTuple):
    """The bytes of a tensor, and how it is made of them."""

    raw: np.ndarray[Any, Any]
    dtype: torch.dtype
    shape: torch.Size
    is_parameter: bool
    requires_grad: bool
    on_gpu: bool

    def tensor(self) -> Tensor:
        """The tensor, on the card of this process if it was on one."""
        values = tensor_of(self.raw).view(self.dtype).reshape(self.shape)
        values = values.to("cuda") if self.on_gpu else values
        if self.is_parameter:
            return nn.Parameter(values, requires_grad=self.requires_grad)
        return values.requires_grad_(self.requires_grad)


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
    """Replaces parameters by arrays, which all workers of a node read from one memory.

    Buffers are copied: a forward may write into them. On a GPU every tensor is replaced: the card of a worker
    has another number.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.arrays: list[_Array] = []
        self._seen: dict[int, int] = {}
        self._held: list[Tensor] = []  # or another tensor could get the same id

    def persistent_id(self, value: Any) -> int | None:
        """Number of the array that replaces a parameter."""
        is_parameter = isinstance(value, nn.Parameter)
        on_gpu = isinstance(value, Tensor) and value.device.type == "cuda"
        if type(value) not in (nn.Parameter, Tensor) or not (is_parameter or on_gpu):
            return None
        if value.layout != torch.strided:
            return None
        if id(value) not in self._seen:
            self._seen[id(value)] = len(self.arrays)
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            trained = value.requires_grad
            array = _Array(raw, value.dtype, value.shape, is_parameter, trained, on_gpu)
            self.arrays.append(array)
            self._held.append(value)
        return self._seen[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        """The tensor of a number."""
        return self._tensors[pid]


def _packed(traversal: Traversal, ids: Tensor) -> tuple[bytes, list[_Array], Any]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    try:
        pickler.dump(traversal)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise InputError(
            f'engine="ray" sends networks and objective to other processes, and they do not pickle: {error}'
        ) from error
    return file.getvalue(), pickler.arrays, ids.numpy()


def _unpacked(packed: tuple[bytes, list[_Array], Any]) -> tuple[Traversal, Tensor]:
    pickled, arrays, ids = packed
    tensors = [array.tensor() for array in arrays]
    try:
        traversal: Traversal = _Unpickler(io.BytesIO(pickled), tensors).load()
    except ImportError as error:
        raise InputError(
            f"a Ray worker on {socket.gethostname()} cannot import {error.name}, required by the network or "
            f"the objective: install it there, or name its folder in PYTHONPATH before Ray starts"
        ) from error
    return traversal, tensor_of(ids)
