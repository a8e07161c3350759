"""Scores by landmarks of several networks together, some instances at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover.influence.engine import TargetSum
from turnover.influence.gram.kernel import Block
from turnover.influence.gram.landmark_targets import Targets
from turnover.influence.gram.landmarks import Landmarked
from turnover.influence.gram.uncertainty import Pool
from turnover.influence.topk import Extremes

SAMPLE = 4096
"""Instances that the variances of a target are pooled over."""
MOST = 2**28
"""Bytes of the inner products of a block of targets with all instances."""
CANDIDATES = 4
"""Instances whose inner products are taken, for each that is wanted."""


class TargetPool(Pool):
    """Pooled variances of targets, with their noise floor.

    Attributes:
        floor: root mean square of the standard errors of each target, float64 (targets,).
        freedom: degrees of freedom of the standard errors.
    """

    def __init__(self, variance: Tensor, freedom: int, scale: Tensor) -> None:
        super().__init__(variance, freedom, scale)
        found, self.freedom = self.moderated(variance, scale)
        self.floor: NDArray[np.float64] = found.double().mean(dim=1).sqrt().cpu().numpy()


class Scored:
    """A block of targets by all networks.

    Args:
        fitted: the training set by each network.
        given: gradients of the targets by each, or the targets.
        scale: the factor of all scores of an instance, float32 (train,) on the CPU.
    """

    def __init__(
        self, fitted: Sequence[Landmarked], given: Sequence[Block | Targets], scale: Tensor
    ) -> None:
        self.targets = [
            one if isinstance(one, Targets) else Targets(network, network.coordinates.of(one))
            for network, one in zip(fitted, given, strict=True)
        ]
        self._fitted = fitted
        self._scale = scale

    def correct(self, products: Sequence[Tensor], positions: Tensor) -> None:
        """Take in the inner products with the gradients of some instances, by each network."""
        for one, found in zip(self.targets, products, strict=True):
            one.correct(found, positions)

    def pool(self, sample: Tensor) -> TargetPool:
        """Variances pooled over a sample of instances."""
        _, variance = self._measured(self.targets, sample)
        return TargetPool(variance, self._freedom, self._scale[sample].to(variance.device))

    def all(self, columns: Tensor, pool: TargetPool) -> tuple[Tensor, Tensor]:
        """Scores and standard errors of instances: float32 (targets, instances)."""
        shape = len(self.targets[0]), len(columns)
        scores, errors = torch.empty(shape), torch.empty(shape)
        for place, positions in self._chunks(columns):
            score, variance = self._measured(self.targets, positions)
            scores[:, place] = score.cpu()
            errors[:, place] = self._errors(variance, positions, pool).cpu()
        return scores, errors

    def strongest(self, columns: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The most helpful and most harmful instances, from high to low.

        Returns:
            Their places in columns, int64 (targets, ranks), and scores, float32.
        """
        extremes = Extremes(len(self.targets[0]), count)
        order = []
        for place, positions in self._chunks(columns):
            order.append(place)
            extremes.add(self._each(self.targets, positions).mean(dim=0))
        found, scores = extremes.result()
        return torch.cat(order)[torch.from_numpy(found)], torch.from_numpy(scores)

    def add_missed(
        self, products: Sequence[Tensor], positions: Tensor, wanted: Tensor, out: Tensor
    ) -> None:
        """Add what landmarks miss of wanted pairs.

        Args:
            products: inner products with the gradients of instances by each network, float32 (targets,
                gradients).
            positions: of these instances.
            wanted: positions of the wanted ones (targets, wanted).
            out: float32 (targets, wanted).
        """
        missing = torch.stack(
            [
                one.missing(found, positions) * network.factor[positions].to(network.device)
                for one, found, network in zip(self.targets, products, self._fitted, strict=True)
            ]
        )
        values = missing.mean(dim=0).cpu()
        ordered, order = positions.sort()
        place = torch.searchsorted(ordered, wanted).clamp_max(len(ordered) - 1)
        there = ordered[place] == wanted
        out += torch.where(there, values.gather(1, order[place]), 0.0)

    def errors(self, positions: Tensor, pool: TargetPool) -> Tensor:
        """Standard errors of instances that differ between targets, at positions (targets, ranks)."""
        found = torch.empty(positions.shape)
        for target, row in enumerate(positions):
            ordered, back = row.sort()
            _, variance = self._measured([one.at(target) for one in self.targets], ordered)
            found[target, back] = self._errors(variance, ordered, pool, target)[0].cpu()
        return found

    @property
    def _freedom(self) -> int:
        networks = len(self._fitted)
        return self._fitted[0].freedom if networks == 1 else networks - 1

    def _each(self, targets: Sequence[Targets], positions: slice | Tensor) -> Tensor:
        """Scores by each network: float32 (networks, targets, instances)."""
        device = self._fitted[0].device
        found = [
            (one.scores(positions) * network.factor[positions].to(network.device)).to(device)
            for one, network in zip(targets, self._fitted, strict=True)
        ]
        return torch.stack(found)

    def _measured(
        self, targets: Sequence[Targets], positions: slice | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Scores and their variances: float32 (targets, instances)."""
        if len(targets) > 1:
            each = self._each(targets, positions)
            return each.mean(dim=0), each.var(dim=0) / len(each)
        scores, variance = targets[0].measured(positions)
        factor = self._fitted[0].factor[positions].to(scores.device)
        return scores * factor, variance * factor * factor

    def _errors(
        self,
        variance: Tensor,
        positions: slice | Tensor,
        pool: TargetPool,
        target: int | None = None,
    ) -> Tensor:
        scale = self._scale[positions].to(variance.device)
        return pool.moderated(variance, scale, target)[0].sqrt()

    def _chunks(self, columns: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Places in columns and positions, increasing, of instances that are read together."""
        ordered, order = columns.sort()
        for chunk in self._fitted[0].chunks():
            bounds = torch.tensor([chunk.start, chunk.stop])
            start, stop = torch.searchsorted(ordered, bounds).tolist()
            if start < stop:
                yield order[start:stop], ordered[start:stop]


class TargetSums:
    """Adds up targets by one network, to their mean, or to a sum with weights."""

    def __init__(self, weights: Tensor | None) -> None:
        self._weights = weights
        self._sums: dict[object, TargetSum] = {}
        self._one: Targets | None = None

    def add(self, targets: Targets) -> None:
        """Add the next targets."""
        values: dict[object, Tensor] = {"own": targets.own}
        values |= dict(targets.missed.items())
        if targets.beside is not None:
            values["beside"] = targets.beside
        for name, value in values.items():
            self._sums.setdefault(name, TargetSum(self._weights)).add(value)
        self._one = targets

    def total(self) -> Targets:
        """All of them as one."""
        assert self._one is not None
        totals = {name: one.total() for name, one in self._sums.items()}
        found = Targets(self._one.fitted, totals.pop("own"))
        found.beside = totals.pop("beside", None)
        found.missed = {group: total for group, total in totals.items() if isinstance(group, int)}
        return found


def spread_over(count: int, most: int) -> Tensor:
    """Some of ``count`` places, at random and increasing."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[:most].sort().values
