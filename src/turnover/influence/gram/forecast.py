"""What gram would take: seconds, memory and disk, estimated from a few rows before all are computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from turnover.batches import Batch
from turnover.dropout.modules import device_of
from turnover.influence.gram.disk import Limits
from turnover.influence.gram.kernel import block_of, is_full
from turnover.influence.gram.options import Gram, capture_of, directions_of, residual_of
from turnover.objectives import Objective

_PILOT_SECONDS = 4.0
"""Time of the rows that are tried, about."""
_LARGEST = 1500
"""Rows of the matrix whose factoring is timed."""
_DOUBLE_FROM = 10_000
"""Rows of the Gram matrix from which it is factored in float64, with the default ridge."""


@dataclass(frozen=True)
class Forecast:
    """Estimates; within a factor of two on CPUs that do nothing else.

    Attributes:
        seconds: of the gradients, their products, and the solves.
        memory: bytes beyond the model and the data.
        disk: bytes of temporary files.
    """

    seconds: float
    memory: int
    disk: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        minutes = self.seconds / 60
        said = f"{self.seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min"
        disk = f", {self.disk / 2**30:.1f} GiB of temporary files" if self.disk else ""
        return f"{said}, {self.memory / 2**30:.2f} GiB of memory beyond the model{disk}"


def forecast(
    model: nn.Module,
    objective: Objective,
    sample: Sequence[Batch],
    *,
    rows: int,
    targets: int,
    means: int,
) -> Forecast:
    """Estimate what fitting gram and scoring takes.

    Args:
        model: trained module.
        objective: cost of a prediction.
        sample: batches of training instances, of which the first few are tried.
        rows: training instances.
        targets: targets of :meth:`turnover.Influence.estimate`.
        means: targets of :meth:`turnover.Influence.aggregate`.
    """
    options, limits = Gram(), Limits()
    residuals = residual_of(model, objective, options) > 0
    capture = capture_of(model, objective, options, residuals=residuals)
    capture.rows(sample[0], training=True)  # checks that rows do not mix, once
    found, start, tried = [], time.perf_counter(), 0
    for batch in sample:
        found += [capture.rows(batch, training=True).cheapest()]
        tried += len(batch)
        if time.perf_counter() - start > _PILOT_SECONDS or is_full(found):
            break
    row_seconds = (time.perf_counter() - start) / tried
    block = block_of(found)
    tile = torch.zeros((block.rows, block.rows), device=block.device)
    pair_seconds = _timed(lambda: block.add_gram(block, tile), block.device) / tile.numel()
    size = rows * max(1, directions_of(objective, options))
    large = size > limits.rows
    gradients = block.nbytes * size // block.rows
    seconds = (rows + targets + means) * row_seconds
    seconds += size * (size / 2 + targets + means) * pair_seconds
    # Factors and inverses of the whole and of eight halves, and eight solves for each target.
    operations = 2 * size**3 + 8 * (targets + 1) * size**2
    double = size > _DOUBLE_FROM
    seconds += operations / _solved_per_second(min(size, _LARGEST), device_of(model), double=double)
    matrix = 4 * size * size
    solving = matrix * (7 if double else 5)
    scores = 8 * targets * rows
    return Forecast(
        seconds,
        min(gradients, limits.memory) + (0 if large else solving) + scores + 2 * block.nbytes,
        max(0, gradients - limits.memory) + (matrix if large else 0),
    )


def _timed(function: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(2):  # the first call is slower
        _wait(device)
        start = time.perf_counter()
        function()
        _wait(device)
        times.append(time.perf_counter() - start)
        if times[0] > _PILOT_SECONDS:
            break
    return min(times)


def _solved_per_second(size: int, device: torch.device, *, double: bool) -> float:
    """Operations per second of a Cholesky factor."""
    system = torch.eye(size, dtype=torch.float64 if double else torch.float32, device=device) * 2
    return size**3 / 3 / max(_timed(lambda: torch.linalg.cholesky(system), device), 1e-9)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
