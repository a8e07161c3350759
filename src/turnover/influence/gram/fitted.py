"""The training set as one network sees it: gradients, their Gram matrix, and solves with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from turnover.errors import InputError
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
        k: float32 (train * directions, train * directions).
        ridge: lambda.
        weights: of the directions of every instance, float32 (train, directions).
        factor: what scores are multiplied with, float32 (train,); ``None``: nothing.
        own_factor: what scores of an instance on itself are also multiplied with, likewise.
        resamples: number of halves.
        limits: up to how many rows to factor.
        device: of everything but ``k``, which may be on disk.
    """

    blocks: Blocks
    k: Tensor
    ridge: float
    weights: Tensor
    factor: Tensor | None
    own_factor: Tensor | None
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
        own_residual: bool,
        resamples: int,
        limits: Limits,
        scratch: Scratch,
        done: Callable[[int], None],
    ) -> Fitted:
        """Build the Gram matrix, and choose lambda.

        Args:
            blocks: of the rows' gradients.
            every: costs of the rows, batch by batch.
            ridge: see :func:`turnover.influence.gram.ridge.choose`.
            residual: exponent of 1 minus the probability of the label, which multiplies the scores.
            own_residual: whether that of an instance multiplies its score on itself, too, since its
                objective is the loss.
            resamples: number of halves.
            limits: when the matrix goes to disk.
            scratch: where it then is.
            done: told how many entries of it more are worked out.
        """
        costs = torch.cat([rows.costs for rows in every])
        directed = [rows.weights for rows in every if rows.weights is not None]
        weights = torch.cat(directed) if directed else costs.new_ones((len(costs), 1))
        size = weights.numel()
        k = scratch.matrix(size) if size > limits.rows else costs.new_zeros((size, size))
        gram_of(blocks, k, done)
        if not bool(torch.isfinite(k.diagonal()).all()):  # no product is larger than those
            raise InputError(
                "the inner products of the training instances' gradients are beyond float32: scale the "
                "objective down"
            )
        known = [rows.residuals for rows in every if rows.residuals is not None]
        factor = torch.cat(known) ** residual if residual else None
        own = torch.cat(known) if own_residual else None
        chosen = ridges.choose(ridge, k, costs)
        return cls(blocks, k, chosen, weights, factor, own, resamples, limits, costs.device)

    def solve(self) -> None:
        """Factor the matrix now, which else is done when it is first needed."""
        self._solver()

    def cross(self, block: Block) -> Tensor:
        """Inner products with the gradients of a block: float32 (rows, train * directions)."""
        return cross_of(block, self.blocks, len(self.k))

    def scores(self, cross: Tensor) -> Tensor:
        """Scores (targets, train) of inner products (targets, train * directions)."""
        return self._scaled(_contracted(self._solver().rows(cross), self.weights))

    def own(self) -> Tensor:
        """Scores of every training instance on itself: float32 (train,)."""
        return self._own_scaled(_form(self._solver().leverage, self.weights, self.weights))

    def variance(self, cross: Tensor) -> Tensor:
        """Variances of :meth:`scores` over halves of the training set."""
        moments = [cross.new_zeros((len(cross), len(self.weights))) for _ in range(2)]
        reference = _contracted(self._solver().rows(cross), self.weights)
        for rows, solver in self._resampled():
            # Deviations from the score of the whole, so that squares do not cancel.
            found = solver.rows(cross[:, self._places(rows)])
            values = _contracted(found, self._for_half(rows, solver)) - reference[:, rows]
            moments[0][:, rows] += values
            moments[1][:, rows] += values.square()
        return self._scaled(self._scaled(self._spread(*moments)))

    def own_variance(self) -> Tensor:
        """Variances of :meth:`own` over halves of the training set."""
        moments = [torch.zeros(len(self.weights), device=self.device) for _ in range(2)]
        reference = _form(self._solver().leverage, self.weights, self.weights)
        for rows, solver in self._resampled():
            found = _form(solver.leverage, self.weights[rows], self._for_half(rows, solver))
            values = found - reference[rows]
            moments[0][rows] += values
            moments[1][rows] += values.square()
        return self._own_scaled(self._own_scaled(self._spread(*moments)))

    @property
    def freedom(self) -> int:
        """Degrees of freedom of a variance over halves."""
        return self.resamples // 2 - 1

    def _spread(self, sums: Tensor, squares: Tensor) -> Tensor:
        count = self.resamples // 2
        return ((squares - sums.square() / count) / (count - 1)).clamp_min(0)

    def _for_half(self, rows: Tensor, solver: Solver) -> Tensor:
        """Weights that put scores from a half on the scale of the whole."""
        twice = 2 * torch.eye(self._block, device=self.device)
        weights = self.weights[rows][:, :, None]
        solved: Tensor = torch.linalg.solve(twice - solver.leverage, weights)
        return solved[:, :, 0]

    @property
    def _block(self) -> int:
        return self.weights.shape[1]

    def _places(self, rows: Tensor) -> Tensor:
        """Where the directions of instances are."""
        inside = torch.arange(self._block, device=rows.device)
        return (rows[:, None] * self._block + inside).flatten()

    def _scaled(self, values: Tensor) -> Tensor:
        return values if self.factor is None else values * self.factor

    def _own_scaled(self, values: Tensor) -> Tensor:
        values = self._scaled(values)
        return values if self.own_factor is None else values * self.own_factor

    def _solver(self) -> Solver:
        if self._whole is None:
            self._whole = self._inverse(None, self.ridge)
        return self._whole

    def _inverse(self, rows: Tensor | None, ridge: float) -> Solver:
        if len(self.k) > self.limits.rows:
            landmarks = self.limits.landmarks
            return Iterative(
                self.k, ridge, landmarks=landmarks, device=self.device, block=self._block, rows=rows
            )
        k = self.k if rows is None else self.k[rows][:, rows]
        # No eigenvalue is above the trace.
        condition = float(k.diagonal().sum()) / ridge
        exact = condition > _CONDITION and k.device.type != "mps"
        return Cholesky(k, ridge, exact=exact, block=self._block)

    def _resampled(self) -> Iterator[tuple[Tensor, Solver]]:
        if self._halves:
            yield from self._halves
            return
        kept: list[tuple[Tensor, Solver]] = []
        drawn = halves(len(self.weights), self.resamples)
        for half in drawn:
            rows = half.to(self.device)
            solver = self._inverse(self._places(rows), self.ridge / 2)
            if 0 < solver.nbytes * len(drawn) <= _KEPT:
                kept.append((rows, solver))
            yield rows, solver
        self._halves = kept


def _contracted(rows: Tensor, weights: Tensor) -> Tensor:
    """Scores (targets, instances) of solves (targets, instances * directions)."""
    return torch.einsum("tnd,nd->tn", rows.view(len(rows), *weights.shape), weights)


def _form(blocks: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left' block right`` of every instance: (instances,)."""
    return torch.einsum("nd,nde,ne->n", left, blocks, right)
