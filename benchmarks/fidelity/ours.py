"""Turn-over and gram, as any user calls them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

import turnover
from turnover import objectives

from .methods import Attribution, Scored
from .problems import Split

_ROWS = 250
_DIRECTIONS = 2  # gram's default


def batches(split: Split) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, labels and, as ids, the numbers of the rows."""
    ids = torch.arange(len(split))
    parts = (torch.split(split.x, _ROWS), torch.split(split.y, _ROWS), torch.split(ids, _ROWS))
    return list(zip(*parts, strict=True))


@contextmanager
def attached(task: Attribution, count: int) -> Iterator[list[turnover.Network]]:
    """The first turn-over networks, under the masks that they were trained with."""
    with ExitStack() as stack:
        networks = []
        for seed, model in zip(task.seeds[:count], task.models, strict=False):
            spec = turnover.MaskSpec(task.keep, seed=seed)
            network = turnover.attach(model, list(task.sites), spec)
            stack.callback(network.detach)
            networks.append(network)
        yield networks


def gram(count: int, features: str = "gradients") -> Callable[[Attribution], Scored]:
    """Gram with default settings on so many networks."""

    def run(task: Attribution) -> Scored:
        with ExitStack() as stack:
            networks: list[turnover.Network] | list[nn.Module] = (
                stack.enter_context(attached(task, count)) if task.sites else task.models[:count]
            )
            start = time.perf_counter()
            influence = turnover.Influence(networks, method=turnover.Gram(features=features))
            influence.fit(batches(task.problem.train))
            fitted = time.perf_counter()
            result = influence.estimate(batches(task.problem.test))
            scored = time.perf_counter()
            own = influence.self_influence().scores if task.suspicions else None
        # What is kept between fit and estimate: inner products of all pairs, and their factor.
        rows = len(task.problem.train) * min(_DIRECTIONS, task.problem.classes - 1)
        stored = 2 * 4 * rows**2 * count
        return Scored(result.scores, own, fitted - start, scored - fitted, stored, count)

    return run


def turn_over(count: int, method: str = "linear") -> Callable[[Attribution], Scored]:
    """Turn-over dropout itself on so many networks; nothing is prepared, and a seed is stored."""

    def run(task: Attribution) -> Scored:
        train = batches(task.problem.train)
        ids = torch.arange(len(task.problem.train))
        with attached(task, count) as networks:
            start = time.perf_counter()
            influence = turnover.Influence(networks, method=method)
            scores = influence.estimate(batches(task.problem.test), ids).scores
            seconds = time.perf_counter() - start
            own = None
            if task.suspicions:
                suspicion = turnover.Influence(
                    networks, objective=objectives.cross_entropy, method="exact"
                )
                own = suspicion.self_influence(train).scores
        return Scored(scores, own, 0.0, seconds, 8 * count, count)

    return run
