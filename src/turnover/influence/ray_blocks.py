"""Blocks of a result as Ray tasks, on the cores of one machine or many. Needs ``turnover[ray]``.

Each task writes regions of its own; this process alone announces targets, holds the lease and finishes the
result. Ray runs a task again whose worker was lost, and gets the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayTaskError
from torch import Tensor

from turnover.batches import Batch
from turnover.dropout.modules import device_of
from turnover.influence.blockwise import Traversal
from turnover.influence.engine import Engine, TargetBlock
from turnover.influence.sinks import Region, StoreSink
from turnover.influence.topk import Found
from turnover.parallel.ray import PATIENCE, WAITING, Settings, kept, places, tensor_of
from turnover.parallel.ray_objects import Packed, packed, unpacked
from turnover.results.store import joining
from turnover.results.writer import Writer

_LEAVING = 60.0
"""Seconds that tasks may take to end after an error."""


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
    return Settings.on((device_of(engine.network.model) for engine in engines), num_gpus)


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
    broadcast = ray.put((packed(traversal), ids.numpy()))
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
        _leave(flight, writer)
    return count


def _leave(flight: Iterable[Any], writer: Writer) -> None:
    """Wait for tasks after an error, as long as they may write.

    They are not canceled: one that is about to end would take this process with it (Ray 2.60,
    ``NormalTaskSubmitter::CancelTask``).
    """
    left, limit = list(flight), time.monotonic() + _LEAVING
    while left and time.monotonic() < limit:
        _, left = ray.wait(left, timeout=PATIENCE)
        writer.renew()


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
    traversal, ids = kept("traversal", broadcast[0], _received)
    engines = traversal.estimator.engines
    block = kept("block", targets[0], lambda batches: TargetBlock(engines, batches))
    writer = joining(task.url, task.manifest, task.rows.stop)
    sink = StoreSink(writer)
    with ExitStack() as stack:
        stack.enter_context(traversal.estimator.halving.noted(writer))
        for engine in engines:
            stack.enter_context(engine.evaluating())
        yield traversal, Region(block, task.rows, ids, task.columns, sink)


def _received(sent: tuple[Packed, Any]) -> tuple[Traversal, Tensor]:
    traversal: Traversal = unpacked(sent[0])
    return traversal, tensor_of(sent[1])
