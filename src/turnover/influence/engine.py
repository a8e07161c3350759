"""Scores of the targets of one block by one or several networks, on any ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from turnover.batches import Batch
from turnover.dropout.modules import device_of, evaluating
from turnover.dropout.network import Network
from turnover.errors import InputError
from turnover.influence.exact import ExactEstimator
from turnover.influence.linear import LinearScorer, finite, mask_gradients
from turnover.influence.progress import Counts
from turnover.influence.reach import Run
from turnover.objectives import Objective


@dataclass(frozen=True)
class Scores:
    """Influence of ids on targets: float32 (targets, ids), the mean over networks.

    Attributes:
        mean: on the device of the first network.
        standard_error: of the mean, likewise; ``None`` for one network.
    """

    mean: Tensor
    standard_error: Tensor | None = None

    def columns(self, start: int, stop: int) -> Scores:
        """The scores of some ids alone."""
        error = self.standard_error
        return Scores(self.mean[:, start:stop], None if error is None else error[:, start:stop])


Score = Callable[[Tensor], Scores]
"""Scores of ids, int64 (ids,)."""


class Engine:
    """The estimators of one network.

    Args:
        network: the network.
        objective: callable (outputs, batch) -> (rows,).
        block: ids in one forward of the exact estimator; ``None``: as many as the caches hold.
        sites: masked sites; at others the network runs whole.
    """

    def __init__(
        self, network: Network, objective: Objective, block: int | None, sites: Sequence[str]
    ) -> None:
        self.network = network
        self.objective = objective
        self.block = block
        self.sites = list(sites)
        self._exact = ExactEstimator(network, objective, block, sites)
        self._independent: set[Run] = set()
        self.counts = Counts()
        """Told of backward passes, and of pairs that were scored exactly."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process begins with nothing learned, and has nobody to tell.
        return type(self), (self.network, self.objective, self.block, self.sites)

    def forget(self) -> None:
        """Score what comes as if it were the first."""
        self._exact.forget()

    @property
    def units(self) -> int:
        """Mask units of the scored sites."""
        return sum(self.network.known_units(self.sites).values())

    def measure(self, batch: Batch) -> None:
        """Learn the widths of the sites from a forward, where they are not known yet."""
        network = self.network
        # All of them: the digest of the network tells the masks of sites that are not scored, too.
        if all(units is not None for units in network.units.values()):
            return
        with torch.no_grad(), network.masking.probing():
            batch.rows(0, 1).to(device_of(network.model)).call(network.model)

    def gradients(self, batches: Sequence[Batch]) -> Tensor:
        """Derivatives of the targets' objectives by the mask entries: float32 (targets, units)."""
        parts = []
        for batch in batches:
            moved = batch.to(device_of(self.network.model))
            part = mask_gradients(
                self.network, self.objective, moved, self.sites, self._independent
            )
            parts.append(finite(part, "mask derivative"))
            self.counts.advance("backward", len(batch))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def scorer(self, gradients: Tensor) -> LinearScorer:
        """The linear estimator of rows of derivatives."""
        return LinearScorer(gradients, self.network.spec, self.network.known_units(self.sites))

    def exact(self, batches: Sequence[Batch], ids: Tensor) -> Tensor:
        """Exact scores: float32 (targets, ids)."""
        device = device_of(self.network.model)
        moved = [batch.to(device) for batch in batches]
        scores = self._exact.scores(moved, ids, partial(self.counts.advance, "exact"))
        return finite(scores, "influence")

    @property
    def elements(self) -> int:
        """Elements of the largest output of a module in an exact forward, for one row."""
        return self._exact.elements

    @property
    def rows_at_once(self) -> int:
        """Rows in an exact forward."""
        return self._exact.rows_at_once

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode, put back after: dropout or batch statistics would be taken for influence.

        Masks are differentiated and parameters are not: below the first site no graph is built.
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


class TargetBlock:
    """The targets of some batches, before some networks.

    Args:
        engines: one for each network.
        batches: the targets, in order.
    """

    def __init__(self, engines: Sequence[Engine], batches: Sequence[Batch]) -> None:
        self._engines = engines
        self._batches = batches

    def linear(self, ids: Tensor) -> Scores:
        """Linear scores."""
        return over_networks([scorer.scores(ids) for scorer in self._scorers])

    def own(self, ids: Tensor) -> Scores:
        """Linear scores (1, targets) of target i and ``ids[i]``."""
        return over_networks([scorer.own(ids)[None] for scorer in self._scorers])

    def exact(self, ids: Tensor) -> Scores:
        """Exact scores."""
        return over_networks([self._exact(engine, ids) for engine in self._engines])

    def targets(self) -> Iterator[TargetBlock]:
        """Each target as a block of its own."""
        for batch in self._batches:
            for row in range(len(batch)):
                yield TargetBlock(self._engines, [batch.rows(row, row + 1)])

    @cached_property
    def _scorers(self) -> list[LinearScorer]:
        return [engine.scorer(self._gradients(engine)) for engine in self._engines]

    def _gradients(self, engine: Engine) -> Tensor:
        return engine.gradients(self._batches)

    def _exact(self, engine: Engine, ids: Tensor) -> Tensor:
        return engine.exact(self._batches, ids)


class MeanTarget(TargetBlock):
    """The mean objective over all targets, as one target.

    The derivatives are summed first; for the exact scores the targets are gone over for every block of
    ids.
    """

    def targets(self) -> Iterator[TargetBlock]:
        """Itself."""
        yield self

    def _gradients(self, engine: Engine) -> Tensor:
        return self._mean(lambda batch: engine.gradients([batch]))

    def _exact(self, engine: Engine, ids: Tensor) -> Tensor:
        return self._mean(lambda batch: engine.exact([batch], ids))

    def _mean(self, of: Callable[[Batch], Tensor]) -> Tensor:
        total = sum(of(batch).double().sum(dim=0) for batch in self._batches)
        assert isinstance(total, Tensor)
        return (total / sum(map(len, self._batches))).float()[None]


def measure(engines: Sequence[Engine], batch: Batch) -> None:
    """Learn the widths of all sites, by which one network can be told from another.

    Raises:
        InputError: two networks have the same masks and weights.
    """
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
