"""Targets, in the coordinates of landmarks, and the scores of training instances on them."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from turnover.influence.gram.balanced import Spread
from turnover.influence.gram.landmarks import Instances, Landmarked


class Targets:
    """Targets by one network.

    Args:
        fitted: the training set.
        own: coordinates, float32 (targets, width).

    Attributes:
        own: coordinates.
        missed: ``sum of d V B`` over the instances of each group, float32 (targets, width).
        beside: ``d V w`` of every instance, float32 (targets, train); ``None``: not taken.
    """

    def __init__(self, fitted: Landmarked, own: Tensor) -> None:
        self.fitted, self.own = fitted, own
        self.missed: dict[int, Tensor] = {}
        self.beside: Tensor | None = None

    def __len__(self) -> int:
        return len(self.own)

    def at(self, target: int) -> Targets:
        """One of the targets."""
        some = slice(target, target + 1)
        one = Targets(self.fitted, self.own[some])
        one.beside = None if self.beside is None else self.beside[some]
        one._whole = self._whole[some]
        one._halves = [half[some] for half in self._halves]
        return one

    def missing(self, products: Tensor, positions: Tensor) -> Tensor:
        """What exact inner products change in scores of some instances: float32 (targets, some).

        ``d V w``. Landmarks, whose products were exact, get their own remainders back, which are none.

        Args:
            products: inner products with their gradients, float32 (targets, gradients).
            positions: of the instances.
        """
        vectors, found = self._missed_of(products, positions)
        kept, beside = self.fitted.of(positions), self.fitted.beside_others(positions)
        difference = replace(kept, inverse=kept.inverse - beside.inverse)
        back = self._whole @ _held(vectors, difference, kept.weights).T
        return self._times_weights(found, positions) + back

    def correct(self, products: Tensor, positions: Tensor) -> None:
        """Take in the inner products with some instances; arguments as of :meth:`missing`."""
        vectors, found = self._missed_of(products, positions)
        group, holding = self.fitted.of(positions).group, self.fitted.holding
        for number in torch.unique(group).tolist():
            some = (group == number).nonzero()[:, 0]
            by = found[:, some, holding].flatten(1)
            held = by @ vectors[some][:, holding].flatten(0, 1)
            self.missed[number] = self.missed[number] + held if number in self.missed else held
        if self.beside is None:
            self.beside = torch.zeros((len(self), len(self.fitted.factor)))
        self.beside[:, positions] = self._times_weights(found, positions).cpu()

    def _times_weights(self, found: Tensor, positions: Tensor) -> Tensor:
        return torch.einsum("tnd,nd->tn", found, self.fitted.of(positions).weights)

    def _missed_of(self, products: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of instances in their order, and ``d V`` (targets, instances, directions)."""
        order = positions.argsort()
        vectors = self.fitted.vectors(positions[order])[order.argsort()]
        products = products.to(self.own.device).view(len(self), len(positions), -1)
        products = products - torch.einsum("tw,ndw->tnd", self.own, vectors)
        return vectors, torch.einsum(
            "tnd,nde->tne", products, self.fitted.beside_others(positions).inverse
        )

    @cached_property
    def _whole(self) -> Tensor:
        return self.fitted.solved(None, self.own - self._missed_by(list(self.missed)))

    @cached_property
    def _halves(self) -> list[Tensor]:
        fitted, found = self.fitted, []
        for row in fitted.halves_of(torch.arange(fitted.groups)):
            for half in sorted(set(row.tolist())):
                inside = (row == half).nonzero()[:, 0].tolist()
                found.append(fitted.solved(half, self.own - 2 * self._missed_by(inside)))
        return found

    def _missed_by(self, groups: list[int]) -> Tensor:
        known = [self.missed[group] for group in groups if group in self.missed]
        return torch.stack(known).sum(dim=0) if known else torch.zeros_like(self.own)

    def scores(self, positions: slice | Tensor) -> Tensor:
        """Scores of instances before their factor: float32 (targets, instances)."""
        kept = self.fitted.beside_others(positions)
        found = self._whole @ _held(self.fitted.vectors(positions), kept, kept.weights).T
        return self._with_beside(found, positions)

    def _with_beside(self, found: Tensor, positions: slice | Tensor) -> Tensor:
        return found if self.beside is None else found + self.beside[:, positions].to(found.device)

    def measured(self, positions: slice | Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`scores`, and their variances over halves of the training set."""
        fitted = self.fitted
        kept = fitted.beside_others(positions)
        vectors = fitted.vectors(positions)
        whole = self._whole @ _held(vectors, kept, kept.weights).T
        held = _held(vectors, kept, fitted.weights_of_half(positions))
        spread = Spread(tuple(whole.shape), fitted.freedom + 1, whole.device)
        for row in fitted.halves_of(kept.group):
            for half in row.unique().tolist():
                some = (row == half).nonzero()[:, 0]
                spread.add(some, self._halves[half] @ held[some].T - whole[:, some])
        return self._with_beside(whole, positions), spread.variance()


def _held(vectors: Tensor, kept: Instances, weights: Tensor) -> Tensor:
    """``B V w``: float32 (instances, width)."""
    by_vector = torch.einsum("nde,ne->nd", kept.inverse, weights)
    return torch.einsum("ndw,nd->nw", vectors, by_vector)
