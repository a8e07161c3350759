"""Networks in use by estimators, blocks of targets before them, and scores over networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from turnover.batches import Batch
from turnover.dropout.modules import device_of, evaluating
from turnover.dropout.network import Network
from turnover.errors import InputError
from turnover.influence.halving import Halving
from turnover.influence.progress import Counts
from turnover.objectives import Objective

T = TypeVar("T")


@dataclass(frozen=True)
class Scores:
    """Influence of ids on targets: float32 (targets, ids), the mean over networks.

    Attributes:
        mean: on the device of the first network.
        standard_error: of the mean, likewise; ``None`` for one network.
    """

    mean: Tensor
    standard_error: Tensor | None = None


class Once:
    """Keeps what is computed once."""

    def __init__(self) -> None:
        self._kept: dict[Any, Any] = {}

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What ``make`` returned when this key was first asked for."""
        if key not in self._kept:
            self._kept[key] = make()
        kept: T = self._kept[key]
        return kept


class Engine(Once):
    """One network in use by estimators, and what they learned of it.

    Args:
        network: the network.
        objective: callable (outputs, batch) -> (rows,).
        sites: masked sites; at others the network runs whole.
        halving: bounds of its forwards, shared by the engines of an estimate.

    Attributes:
        counts: takes reports of the work done.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        sites: Sequence[str],
        halving: Halving | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self.sites = list(sites)
        self.halving = halving or Halving()
        self.counts = Counts()

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process begins with nothing learned, and shows no progress.
        return type(self), (self.network, self.objective, self.sites, self.halving)

    @property
    def units(self) -> int:
        """Mask units of the scored sites."""
        return sum(self.network.known_units(self.sites).values())

    def moved(self, batch: Batch) -> Batch:
        """The batch on the network's device."""
        return batch.to(device_of(self.network.model))

    def measure(self, batch: Batch) -> None:
        """Learn unknown widths of sites from a forward."""
        network = self.network
        # All of them: the digest of the network covers the masks of sites that are not scored, too.
        if all(units is not None for units in network.units.values()):
            return
        with torch.no_grad(), network.masking.probing():
            self.moved(batch.rows(0, 1)).call(network.model)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Run in eval mode, without gradients by parameters; both are restored after.

        Dropout or batch statistics would be taken for influence. Only masks are differentiated, so below
        the first site no graph is built.
        """
        model = self.network.model
        trained = [p for p in model.parameters() if p.requires_grad]
        with evaluating(model):
            for parameter in trained:
                parameter.requires_grad_(False)
            try:
                # The linear method needs autograd even where the caller needs none.
                with torch.inference_mode(False):
                    yield
            finally:
                for parameter in trained:
                    parameter.requires_grad_(True)


class TargetBlock(Once):
    """The targets of some batches, before some networks.

    Args:
        engines: one for each network.
        batches: the targets, in order.
    """

    def __init__(self, engines: Sequence[Engine], batches: Sequence[Batch]) -> None:
        super().__init__()
        self.engines = engines
        self.batches = batches

    def each(self, function: Callable[[Engine, Sequence[Batch]], Tensor]) -> Iterator[Tensor]:
        """Rows of a function of the targets, (targets, ...), by each network in turn."""
        for engine in self.engines:
            yield self._rows(partial(function, engine))

    def scores(self, function: Callable[[Engine, Sequence[Batch]], Tensor]) -> Scores:
        """Scores over networks, by a function that scores for one: float32 (targets, ids)."""
        return over_networks(list(self.each(function)))

    def targets(self) -> Iterator[TargetBlock]:
        """Each target as a block of its own."""
        for batch in self.batches:
            for row in range(len(batch)):
                yield TargetBlock(self.engines, [batch.rows(row, row + 1)])

    def _rows(self, function: Callable[[Sequence[Batch]], Tensor]) -> Tensor:
        return function(self.batches)


class TargetSum:
    """Adds up rows of targets in float64: to their mean, or to a sum with weights.

    Args:
        weights: float64 (targets,); ``None``: 1 / targets each.
    """

    def __init__(self, weights: Tensor | None = None) -> None:
        self._weights = weights
        self._count = 0
        self._sum: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add the next targets, (targets, ...)."""
        rows, before = rows.double(), self._count
        self._count += len(rows)
        if self._weights is not None:
            some = self._weights[before : self._count].to(rows.device)
            if len(some) < len(rows):
                raise self._misfit("more")
            rows = rows * some.view(-1, *[1] * (rows.dim() - 1))
        total = rows.sum(dim=0)
        self._sum = total if self._sum is None else self._sum + total

    def total(self) -> Tensor:
        """The mean, or the sum, as one target: float32 (1, ...)."""
        assert self._sum is not None
        if self._weights is None:
            return (self._sum / self._count).float()[None]
        if len(self._weights) > self._count:
            raise self._misfit(str(self._count))
        return self._sum.float()[None]

    def _misfit(self, targets: str) -> InputError:
        assert self._weights is not None
        return InputError(
            f"{len(self._weights)} weights for {targets} targets: give one for each target"
        )


class MeanTarget(TargetBlock):
    """The mean objective over all targets, as one target: the mean of every function's rows.

    Args:
        engines: one for each network.
        batches: the targets, in order.
        weights: float64 (targets,), factors of a sum in place of the mean.
    """

    def __init__(
        self, engines: Sequence[Engine], batches: Sequence[Batch], weights: Tensor | None = None
    ) -> None:
        super().__init__(engines, batches)
        self._weights = weights

    def targets(self) -> Iterator[TargetBlock]:
        """Itself."""
        yield self

    def _rows(self, function: Callable[[Sequence[Batch]], Tensor]) -> Tensor:
        found = TargetSum(self._weights)
        for batch in self.batches:
            found.add(function([batch]))
        return found.total()


def measure(engines: Sequence[Engine], batch: Batch) -> None:
    """Learn the widths of all sites, and check that no two networks are the same."""
    for engine in engines:
        engine.measure(batch)
    networks = [engine.network for engine in engines]
    for (first, one), (second, other) in combinations(enumerate(networks), 2):
        if one.fingerprint() == other.fingerprint() and _same_weights(one.model, other.model):
            raise InputError(
                f"networks {first} and {second} have the same masks and weights: one is given twice, and "
                f"would count double in the mean over networks"
            )


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(*(chain(m.parameters(), m.buffers()) for m in (one, other)), strict=False)
    return all(a.dtype == b.dtype and torch.equal(a, b.to(a.device)) for a, b in pairs)


def over_networks(scores: Sequence[Tensor]) -> Scores:
    """Mean and standard error over networks of scores (targets, ids)."""
    if len(scores) == 1:
        return Scores(scores[0])
    stacked = torch.stack([one.to(scores[0].device) for one in scores])
    error = stacked.std(dim=0) / len(scores) ** 0.5
    return Scores(stacked.mean(dim=0), error)


def to_numpy(values: Tensor) -> NDArray[np.float32]:
    """The values of a float32 tensor on any device."""
    return values.cpu().numpy()
