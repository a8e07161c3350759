"""Computes parts of the training set in this process, or by Ray."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from turnover.influence.gram.training_parts import Given, Gradients, Work

T = TypeVar("T")


class Computing(Protocol):
    """Computes parts of the training set."""

    def over(
        self,
        given: Iterator[Given],
        work: Work[T],
        done: Callable[[int], None] = ...,
        waiting: Callable[[], None] = ...,
    ) -> Generator[tuple[Tensor, Sequence[T]], None, None]:
        """What is made of each part, and the positions of its instances, in the order of the batches.

        Args:
            given: batches.
            work: makes it.
            done: called with the number of further instances.
            waiting: called now and then, while nothing is there yet.
        """


class InProcess:
    """Computes them in this process, one after another."""

    def __init__(self, gradients: Gradients) -> None:
        self._gradients = gradients

    def over(
        self,
        given: Iterator[Given],
        work: Work[T],
        done: Callable[[int], None] = lambda _: None,
        waiting: Callable[[], None] = lambda: None,  # noqa: ARG002
    ) -> Generator[tuple[Tensor, Sequence[T]], None, None]:
        """See :class:`Computing`."""
        for part in self._gradients.of(given, done=done):
            yield part.positions, work(part)


@contextmanager
def computing(
    engine: str, num_gpus: float, gradients: Gradients, devices: Sequence[torch.device]
) -> Iterator[Computing]:
    """Prepare an engine.

    Args:
        engine: its name.
        num_gpus: share of a GPU that a task takes if the networks are on CUDA.
        gradients: of the networks.
        devices: of the networks.
    """
    if engine == "process":
        yield InProcess(gradients)
        return
    from turnover.influence.gram.ray_parts import Tasks
    from turnover.parallel.ray import Settings, connected

    with connected():
        yield Tasks(Settings.on(devices, num_gpus), gradients)
