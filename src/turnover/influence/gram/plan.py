"""What a fit of gram and the scores of targets would take, before or after the fit."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from turnover.batches import Batch
from turnover.batches.loaders import Numbers, rows_of
from turnover.dropout.network import Network
from turnover.errors import InputError
from turnover.influence.gram.cost import Job, all_pairs, landmarks
from turnover.influence.gram.disk import Limits
from turnover.influence.gram.options import (
    Gram,
    capture_of,
    damping_of,
    landmarks_of,
    measure,
    residual_of,
)
from turnover.influence.gram.trials import GradientTrial
from turnover.influence.plan import FitPlan
from turnover.influence.protocol import Setup

_BATCHES = 8
"""Training batches that trials may take."""


def plan_of(
    options: Gram,
    setup: Setup,
    limits: Limits,
    targets: Iterable[Any],
    train: Iterable[Any],
    top: int | None,
) -> FitPlan:
    """Try a few rows, and count the rest.

    Args:
        options: of gram.
        setup: networks and objective; the first network is tried.
        limits: of memory.
        targets: batches.
        train: training batches, re-iterable.
        top: ids to keep on each side of each target; ``None``: all.

    Raises:
        InputError: no batches, or training batches that cannot be gone through again.
    """
    if isinstance(train, Iterator):
        raise InputError(
            "a plan takes some of the training batches, which fit needs as well: give a list or a data "
            "loader"
        )
    model, objective = setup.models[0], setup.objective
    wanted = setup.batches.checked(targets, Numbers.UNUSED)
    first = next(wanted, None)
    if first is None:
        raise InputError("no targets given")
    sizes = [len(batch) for batch in chain([first], wanted)]
    sample, instances, read = _sampled(setup, train)
    measure(setup.models, sample[0])
    residuals = residual_of(model, objective, options) > 0
    capture = capture_of(model, objective, options, residuals=residuals)
    trial = GradientTrial(capture, sample, first, damping_of(objective, options))
    parameters = 2**62
    if options.features == "gradients":
        module = model.model if isinstance(model, Network) else model
        parameters = sum(one.numel() for one in module.parameters() if one.requires_grad)
    networks = len(setup.models)
    job = Job(options, limits, networks, instances, sizes, top, read, parameters)
    large = instances * trial.gradients > limits.rows
    marked = large if options.landmarks == "auto" else options.landmarks is not None
    ways = {exact: marked and options.exact is exact for exact in (False, True)}
    count = landmarks_of(options, instances)
    costs = [all_pairs(job, trial, chosen=not marked), *landmarks(job, trial, count, ways)]
    return FitPlan(sum(sizes), instances, trial.gradients, tuple(costs))


def _sampled(setup: Setup, train: Iterable[Any]) -> tuple[list[Batch], int, float]:
    """The first training batches, the number of all instances, and seconds to read one."""
    sample: list[Batch] = []
    rows = 0
    start = time.perf_counter()
    seconds = 0.0
    for batch in setup.batches.adapted(train, Numbers.DATA):
        if len(sample) < _BATCHES:
            numbers = torch.arange(rows, rows + len(batch))
            sample.append(replace(batch, ids=numbers) if batch.ids is None else batch)
        rows += len(batch)
        seconds = time.perf_counter() - start
        if len(sample) == _BATCHES and rows_of(train) is not None:
            break
    if not sample:
        raise InputError("no training batches given")
    return sample, rows_of(train) or rows, seconds / rows
