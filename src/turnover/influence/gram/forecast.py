"""What gram would take: seconds, memory and disk, estimated from a few rows before all are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from turnover.batches import Batch
from turnover.influence.gram.cost import Job, all_pairs
from turnover.influence.gram.disk import Limits
from turnover.influence.gram.options import Gram, capture_of, residual_of
from turnover.influence.gram.trials import GradientTrial
from turnover.objectives import Objective


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
    options = Gram()
    residuals = residual_of(model, objective, options) > 0
    capture = capture_of(model, objective, options, residuals=residuals)
    trial = GradientTrial(capture, sample, None, None)
    cost = all_pairs(Job(options, Limits(), 1, rows, [targets], None, 0.0, 0), trial)
    mean = means * trial.target + trial.products(means, rows * trial.gradients)
    return Forecast(cost.seconds + mean, cost.memory, cost.disk)
