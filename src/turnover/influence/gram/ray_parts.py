"""Parts of the training set as Ray tasks, on the cores of one machine or many. Needs ``turnover[ray]``.

A part ends where its gradients fill a block, and gradients depend on what earlier batches have shown of the
model. A task is sent before either is known, with as many batches as are expected to make a part. What a task
was sent in vain is sent again, so that parts and bits are those of one process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayTaskError
from torch import Tensor

from turnover.influence.gram.capture import Learned
from turnover.influence.gram.disk import Elsewhere
from turnover.influence.gram.kernel import Size
from turnover.influence.gram.training_parts import Expected, Given, Gradients, Work, are_full
from turnover.parallel.ray import PATIENCE, WAITING, Settings, kept, places, tensor_of
from turnover.parallel.ray_objects import Packed, packed, unpacked

T = TypeVar("T")


class _Shared(Elsewhere):
    """In Ray's object store."""

    def _put(self, values: Tensor) -> Any:
        return ray.put(values.cpu().contiguous().numpy())

    def _fetch(self, place: Any) -> Tensor:
        return tensor_of(ray.get(place))


@dataclass(frozen=True)
class _Known:
    """What a task knows of earlier batches: what captures learned, and the bounds of forwards."""

    learned: list[Learned]
    halved: Mapping[str, int]


@dataclass(frozen=True)
class _Ended:
    """What a task found.

    Attributes:
        made: of the part, by network, packed.
        sizes: of each of its batches, by network.
        after: what is known after it.
    """

    made: Packed
    sizes: list[list[Size]]
    after: _Known


@dataclass(frozen=True)
class _Flight:
    """A task, the number of its batches, and what was known when it was sent."""

    task: Any
    count: int
    before: _Known


class _Queue:
    """Batches, until their parts have landed; the first ones are in tasks.

    Args:
        given: all batches.
        expected: sizes of their gradients.
    """

    def __init__(self, given: Iterator[Given], expected: Expected) -> None:
        self._given, self._expected = given, expected
        self._held: list[Given] = []
        self._sent = 0
        self._measured: list[list[Size]] = []
        """Sizes of the first ones, once they are known."""

    def take(self) -> list[Given]:
        """The batches of the next task: as many as are expected to make a part."""
        start, sizes = self._sent, list[list[Size]]()
        while not are_full(sizes) and self.has(self._sent):
            known = self._sent < len(self._measured)
            batch = self._held[self._sent][0]
            sizes.append(self._measured[self._sent] if known else self._expected.of(batch))
            self._sent += 1
        return self._held[start : self._sent]

    def has(self, index: int) -> bool:
        """Whether there are more batches than ``index`` that have not landed."""
        if index == len(self._held):
            self._held += islice(self._given, 1)
        return index < len(self._held)

    def measure(self, sizes: list[list[Size]]) -> None:
        """Note sizes of the first batches."""
        self._measured = sizes
        for (batch, _), found in zip(self._held, sizes, strict=False):
            self._expected.learn(batch, found)

    def land(self, count: int) -> Tensor:
        """Give up the first batches; returns the positions of their instances."""
        positions = torch.cat([places for _, places in self._held[:count]])
        del self._held[:count]
        self._sent, self._measured = self._sent - count, []
        return positions

    def restart(self) -> None:
        """Take all batches again that have not landed."""
        self._sent = 0


class Tasks:
    """Computes parts in Ray tasks (:class:`.engines.Computing`).

    Args:
        settings: of the tasks.
        gradients: of the networks, which are broadcast once, with the first part.
    """

    def __init__(self, settings: Settings, gradients: Gradients) -> None:
        self._settings, self._gradients = settings, gradients
        self._networks: Any = None
        self._flight: deque[_Flight] = deque()

    def over(
        self,
        given: Iterator[Given],
        work: Work[T],
        done: Callable[[int], None] = lambda _: None,
        waiting: Callable[[], None] = lambda: None,
    ) -> Generator[tuple[Tensor, Sequence[T]], None, None]:
        """See :class:`.engines.Computing`; a part is waited for before later ones are looked at."""
        if self._networks is None:
            self._networks = ray.put(_sent(self._gradients))
        # Ray leaves references in a list to the task to fetch.
        broadcast = [self._networks, ray.put(packed(work.with_blocks(_Shared), constant=True))]
        queue = _Queue(given, self._gradients.expected)
        try:
            while self._send(queue, broadcast):
                first = self._flight[0]
                ended = _waited(first.task, waiting)
                now = _known(self._gradients)
                if not _valid(first.before, ended.after, now):
                    self._again(queue)
                    continue
                queue.measure(ended.sizes)
                if not are_full(ended.sizes) and queue.has(first.count):
                    self._again(queue)
                    continue
                self._flight.popleft()
                positions = queue.land(len(ended.sizes))
                if first.before.learned == now.learned:
                    _learn(self._gradients, ended.after)
                if len(ended.sizes) < first.count:
                    self._again(queue)
                yield positions, unpacked(ended.made)
                done(len(positions))
        finally:
            self._flight.clear()

    def _send(self, queue: _Queue, broadcast: list[Any]) -> bool:
        """Send as many tasks as may be under way; whether there are any."""
        part = self._settings.task(_part)
        while len(self._flight) < WAITING * max(1, places(self._settings.gpus)):
            given = queue.take()
            if not given:
                break
            own = [(batch.mapped(Tensor.cpu, shared=True).own_memory(), at) for batch, at in given]
            known = _known(self._gradients)
            task = part.remote(self._settings, known, broadcast, [ray.put(own)])
            self._flight.append(_Flight(task, len(given), known))
        return bool(self._flight)

    def _again(self, queue: _Queue) -> None:
        """Send what is under way again.

        The tasks are not canceled, as in :mod:`turnover.influence.ray_blocks`: they end, and are not heard.
        """
        self._flight.clear()
        queue.restart()


@ray.remote  # type: ignore[untyped-decorator]
def _part(settings: Settings, known: _Known, broadcast: list[Any], given: list[Any]) -> _Ended:
    settings.take()
    gradients = kept("gradients", broadcast[0], _received)
    work = kept("work", broadcast[1], unpacked)
    _learn(gradients, known)
    part = next(gradients.of(ray.get(given[0])))
    return _Ended(packed(work(part), constant=True), part.sizes, _known(gradients))


def _sent(gradients: Gradients) -> tuple[Packed, Packed]:
    networks = packed((gradients.captures, gradients.halving))
    return networks, packed(list(gradients.whitenings), constant=True)


def _received(sent: tuple[Packed, Packed]) -> Gradients:
    gradients = Gradients(*unpacked(sent[0]))
    gradients.whitenings = unpacked(sent[1])
    return gradients


def _waited(task: Any, waiting: Callable[[], None]) -> _Ended:
    ready: list[Any] = []
    while not ready:
        ready, _ = ray.wait([task], timeout=PATIENCE)
        waiting()
    try:
        ended: _Ended = ray.get(task)
    except RayTaskError as error:
        raise error.cause from error
    return ended


def _known(gradients: Gradients) -> _Known:
    return _Known([one.learned for one in gradients.captures], dict(gradients.halving.most))


def _learn(gradients: Gradients, known: _Known) -> None:
    gradients.halving.learn(known.halved)
    for capture, learned in zip(gradients.captures, known.learned, strict=True):
        capture.learn(learned)


def _valid(before: _Known, after: _Known, now: _Known) -> bool:
    """Whether a task has found what it would have found with what is known now.

    A layout that it saw for the first time may meanwhile have been seen by an earlier part.
    """
    if before.learned == now.learned:
        return True
    pairs = zip(before.learned, now.learned, strict=True)
    return after.learned == before.learned and all(one.agrees(other) for one, other in pairs)
