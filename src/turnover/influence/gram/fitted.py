"""The training set as one network sees it: gradients, their Gram matrix, and solves with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from turnover.influence.gram import ridge as ridges
from turnover.influence.gram.capture import Rows
from turnover.influence.gram.disk import Blocks, Limits, Scratch
from turnover.influence.gram.iterative import Iterative
from turnover.influence.gram.kernel import Block, cross_of, gram_of
from turnover.influence.gram.solve import Cholesky
from turnover.influence.gram.uncertainty import halves

_CONDITION = 1e5
"""Condition number up to which float32 is good to some 1e-5 of the largest score."""
_KEPT = 2**30
"""Bytes of the factors of all halves that are kept between calls."""


Solver = Cholesky | Iterative


@dataclass
class Fitted:
    """Gradients of the training set, by one network.

    Attributes:
        blocks: of the gradients.
        k: float32 (train, train).
        ridge: lambda.
        factor: what scores are multiplied with, float32 (train,); ``None``: nothing.
        resamples: number of halves.
        limits: up to how many rows to factor.
        device: of everything but ``k``, which may be on disk.
    """

    blocks: Blocks
    k: Tensor
    ridge: float
    factor: Tensor | None
    resamples: int
    limits: Limits
    device: torch.device
    _whole: Solver | None = None
    _halves: list[tuple[Tensor, Solver]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        blocks: Blocks,
        every: Sequence[Rows],
        ridge: float | str,
        *,
        residual: float,
        resamples: int,
        limits: Limits,
        scratch: Scratch,
    ) -> Fitted:
        """Build the Gram matrix, and choose lambda.

        Args:
            blocks: of the rows' gradients.
            every: costs of the rows, batch by batch.
            ridge: see :func:`turnover.influence.gram.ridge.choose`.
            residual: exponent of 1 minus the probability of the label, which multiplies the scores.
            resamples: number of halves.
            limits: when the matrix goes to disk.
            scratch: where it then is.
        """
        costs = torch.cat([rows.costs for rows in every])
        if len(costs) > limits.rows:
            k = scratch.matrix(len(costs))
        else:
            k = costs.new_zeros((len(costs), len(costs)))
        gram_of(blocks, k)
        factor = None
        if residual:
            factor = torch.cat([r.wrong for r in every if r.wrong is not None]) ** residual
        chosen = ridges.choose(ridge, k, costs)
        return cls(blocks, k, chosen, factor, resamples, limits, costs.device)

    def cross(self, block: Block) -> Tensor:
        """Inner products with the gradients of a block: float32 (rows, train)."""
        return cross_of(block, self.blocks, len(self.k))

    def scores(self, cross: Tensor) -> Tensor:
        """Scores (targets, train) of inner products (targets, train)."""
        return self._scaled(self._solver().rows(cross))

    def own(self) -> Tensor:
        """Scores of every training instance on itself: float32 (train,)."""
        return self._scaled(self._solver().leverage)

    def variance(self, cross: Tensor) -> Tensor:
        """Variances of :meth:`scores` over halves of the training set."""
        moments = [cross.new_zeros(cross.shape) for _ in range(2)]
        reference = self._solver().rows(cross)
        for rows, solver in self._resampled():
            # Deviations from the score of the whole, so that squares do not cancel.
            values = solver.rows(cross[:, rows]) / (2 - solver.leverage) - reference[:, rows]
            moments[0][:, rows] += values
            moments[1][:, rows] += values.square()
        return self._spread(*moments)

    def own_variance(self) -> Tensor:
        """Variances of :meth:`own` over halves of the training set."""
        moments = [torch.zeros(len(self.k), device=self.device) for _ in range(2)]
        reference = self._solver().leverage
        for rows, solver in self._resampled():
            values = solver.leverage / (2 - solver.leverage) - reference[rows]
            moments[0][rows] += values
            moments[1][rows] += values.square()
        return self._spread(*moments)

    @property
    def freedom(self) -> int:
        """Degrees of freedom of a variance over halves."""
        return self.resamples // 2 - 1

    def _spread(self, sums: Tensor, squares: Tensor) -> Tensor:
        count = self.resamples // 2
        variance = ((squares - sums.square() / count) / (count - 1)).clamp_min(0)
        return self._scaled(self._scaled(variance))

    def _scaled(self, values: Tensor) -> Tensor:
        return values if self.factor is None else values * self.factor

    def _solver(self) -> Solver:
        if self._whole is None:
            self._whole = self._inverse(None, self.ridge)
        return self._whole

    def _inverse(self, rows: Tensor | None, ridge: float) -> Solver:
        if len(self.k) > self.limits.rows:
            landmarks = self.limits.landmarks
            return Iterative(self.k, ridge, landmarks=landmarks, device=self.device, rows=rows)
        k = self.k if rows is None else self.k[rows][:, rows]
        # No eigenvalue is above the trace.
        condition = float(k.diagonal().sum()) / ridge
        return Cholesky(k, ridge, exact=condition > _CONDITION and k.device.type != "mps")

    def _resampled(self) -> Iterator[tuple[Tensor, Solver]]:
        if self._halves:
            yield from self._halves
            return
        kept: list[tuple[Tensor, Solver]] = []
        drawn = halves(len(self.k), self.resamples)
        for half in drawn:
            rows = half.to(self.device)
            solver = self._inverse(rows, self.ridge / 2)
            if 0 < solver.nbytes * len(drawn) <= _KEPT:
                kept.append((rows, solver))
            yield rows, solver
        self._halves = kept
