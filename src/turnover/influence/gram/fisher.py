"""The training set as one network sees it, held by the gradients of labels that the network draws."""

from __future__ import annotations

import torch
from torch import Tensor

from turnover.influence.gram.fitted import Fitted, Solver

_PANEL = 2**27
"""Bytes of inner products at once."""


class SampledFitted(Fitted):
    """As :class:`.fitted.Fitted`, where each instance has its own gradient and those of drawn labels.

    With ``F`` the mean over draws of the sum over instances of ``g g'``, scores are
    ``g_target' (F + lambda I)^-1 g_train``, through inner products alone (Woodbury).
    """

    @property
    def _draws(self) -> int:
        return self._directions - 1

    def scores(self, cross: Tensor) -> Tensor:
        """See :class:`Fitted`."""
        return self._through(cross, self._every(), self._solver(), self.ridge) * self.factor

    def variance(self, cross: Tensor) -> Tensor:
        """See :class:`Fitted`."""

        def of_half(rows: Tensor, solver: Solver) -> Tensor:
            return self._through(cross, rows, solver, self.ridge / 2) / 2

        whole = self._through(cross, self._every(), self._solver(), self.ridge)
        return self._variance(whole, of_half) * self.factor * self.factor

    def own(self) -> Tensor:
        """See :class:`Fitted`."""
        return self._own(self._every(), self._solver(), self.ridge) * self.factor

    def own_variance(self) -> Tensor:
        """See :class:`Fitted`."""

        def of_half(rows: Tensor, solver: Solver) -> Tensor:
            return self._own(rows, solver, self.ridge / 2) / 2

        whole = self._own(self._every(), self._solver(), self.ridge)
        return self._variance(whole, of_half) * self.factor * self.factor

    def _every(self) -> Tensor:
        return torch.arange(len(self.weights), device=self.device)

    def _positions(self, rows: Tensor) -> Tensor:
        """Positions in ``k`` of the drawn labels' gradients of instances."""
        return super()._positions(rows).view(len(rows), -1)[:, 1:].flatten()

    def _lambda(self, ridge: float | str, costs: Tensor) -> float:
        every = super()._lambda(ridge, costs) / float(self.k.diagonal().double().sum())
        drawn = self._positions(self._every()).to(self.k.device)
        return every * len(costs) * float(self.k.diagonal()[drawn].double().mean())

    def _inverse(self, rows: Tensor | None, ridge: float) -> Solver:
        rows = self._positions(self._every()) if rows is None else rows
        return super()._inverse(rows, ridge * self._draws)

    def _through(self, cross: Tensor, rows: Tensor, solver: Solver, ridge: float) -> Tensor:
        """Scores (targets, rows) of instances by the Fisher matrix of the same instances."""
        drawn, own = self._positions(rows), rows * self._directions
        solved = solver.rows(cross[:, drawn])
        found = cross[:, own]
        step = max(1, _PANEL // (4 * len(self.k)))
        for part, at in zip(
            torch.split(solved, step, dim=1), torch.split(drawn, step), strict=True
        ):
            products = self.k[at.to(self.k.device)].to(self.device)[:, own]
            found = found - part @ products
        return found / ridge

    def _own(self, rows: Tensor, solver: Solver, ridge: float) -> Tensor:
        step = max(1, _PANEL // (4 * len(self.k)))
        found = []
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            cross = self.k[(part * self._directions).to(self.k.device)].to(self.device)
            values = self._through(cross, rows, solver, ridge)
            found.append(values[:, start : start + step].diagonal())
        return torch.cat(found)
