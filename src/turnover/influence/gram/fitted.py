"""The training set as one network sees it: gradients, their Gram matrix, and solves with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from turnover.influence.gram import ridge as ridges
from turnover.influence.gram.balanced import Spread
from turnover.influence.gram.capture import Rows
from turnover.influence.gram.disk import Blocks, Limits, Scratch
from turnover.influence.gram.iterative import Iterative
from turnover.influence.gram.kernel import Block, check_finite, cross_of, gram_of
from turnover.influence.gram.solve import Cholesky
from turnover.influence.gram.uncertainty import halves

KEPT = 2**30
"""Bytes up to which the factors of all halves are kept between calls."""

Solver = Cholesky | Iterative


class Fitted:
    """Gradients of the training set by one network, with their Gram matrix.

    Args:
        blocks: gradients of the rows.
        every: costs of the rows, batch by batch.
        ridge: see :func:`turnover.influence.gram.ridge.choose`.
        residual: exponent of 1 minus the probability of the label, which multiplies the scores.
        own_residual: whether scores of instances on themselves are multiplied by it once more, as their
            objective is the loss.
        resamples: number of halves.
        limits: when the matrix goes to disk.
        scratch: holds it then.
        done: called with the number of further entries computed.

    Attributes:
        k: the Gram matrix, float32 (train * directions, train * directions).
        ridge: lambda.
        weights: of the directions of every instance, float32 (train, directions).
        factor: multiplies scores, float32 (train,).
        device: of all tensors but ``k``, which may be on disk.
        freedom: degrees of freedom of a variance over halves.
    """

    def __init__(
        self,
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
    ) -> None:
        costs = torch.cat([rows.costs for rows in every])
        directed = [rows.weights for rows in every if rows.weights is not None]
        self.weights = torch.cat(directed) if directed else costs.new_ones((len(costs), 1))
        size = self.weights.numel()
        k = scratch.matrix(size) if size > limits.rows else costs.new_zeros((size, size))
        gram_of(blocks, k, done)
        check_finite(k.diagonal())  # which holds the largest products
        known = [rows.residuals for rows in every if rows.residuals is not None]
        self.factor = torch.cat(known) ** residual if residual else torch.ones_like(costs)
        self._own_factor = torch.cat(known) if own_residual else torch.ones_like(costs)
        self.k = k
        self.device = costs.device
        self.freedom = resamples // 2 - 1
        self._blocks = blocks
        self._limits = limits
        self._resamples = resamples
        self._directions = self.weights.shape[1]
        self._whole: Solver | None = None
        self._halves: list[tuple[Tensor, Solver]] = []
        self.ridge = self._lambda(ridge, costs)

    def solve(self) -> None:
        """Factor the matrix now, and not when it is first needed."""
        self._solver()

    def cross(self, block: Block) -> Tensor:
        """Inner products with the gradients of a block: float32 (rows, train * directions)."""
        return cross_of(block, self._blocks, len(self.k))

    def scores(self, cross: Tensor) -> Tensor:
        """Scores (targets, train) of inner products (targets, train * directions)."""
        return _contracted(self._solver().rows(cross), self.weights) * self.factor

    def own(self) -> Tensor:
        """Scores of every training instance on itself: float32 (train,)."""
        leverage = _form(self._solver().leverage, self.weights, self.weights)
        return leverage * self.factor * self._own_factor

    def variance(self, cross: Tensor) -> Tensor:
        """Variances of :meth:`scores` over halves of the training set."""

        def of_half(rows: Tensor, solver: Solver) -> Tensor:
            solved = solver.rows(cross[:, self._positions(rows)])
            return _contracted(solved, self._weights_of_half(rows, solver))

        whole = _contracted(self._solver().rows(cross), self.weights)
        return self._variance(whole, of_half) * self.factor * self.factor

    def own_variance(self) -> Tensor:
        """Variances of :meth:`own` over halves of the training set."""

        def of_half(rows: Tensor, solver: Solver) -> Tensor:
            weights = self._weights_of_half(rows, solver)
            return _form(solver.leverage, self.weights[rows], weights)

        whole = _form(self._solver().leverage, self.weights, self.weights)
        variance = self._variance(whole, of_half)
        for _ in range(2):
            variance = variance * self.factor * self._own_factor
        return variance

    def _variance(self, whole: Tensor, of_half: Callable[[Tensor, Solver], Tensor]) -> Tensor:
        """Variance over halves of values (..., train), each of which is in half of them."""
        spread = Spread(tuple(whole.shape), self._resamples // 2, whole.device)
        for rows, solver in self._resampled():
            spread.add(rows, of_half(rows, solver) - whole[..., rows])
        return spread.variance()

    def _weights_of_half(self, rows: Tensor, solver: Solver) -> Tensor:
        """Weights that put scores from a half on the scale of the whole."""
        twice = 2 * torch.eye(self._directions, device=self.device)
        weights = self.weights[rows][:, :, None]
        solved: Tensor = torch.linalg.solve(twice - solver.leverage, weights)
        return solved[:, :, 0]

    def _positions(self, rows: Tensor) -> Tensor:
        """Positions in ``k`` of the directions of instances."""
        inside = torch.arange(self._directions, device=rows.device)
        return (rows[:, None] * self._directions + inside).flatten()

    def _lambda(self, ridge: float | str, costs: Tensor) -> float:
        return ridges.choose(ridge, self.k, costs)

    def _solver(self) -> Solver:
        if self._whole is None:
            self._whole = self._inverse(None, self.ridge)
        return self._whole

    def _inverse(self, rows: Tensor | None, ridge: float) -> Solver:
        block = self._directions
        if len(self.k) > self._limits.rows:
            landmarks, device = self._limits.landmarks, self.device
            return Iterative(
                self.k, ridge, landmarks=landmarks, device=device, block=block, rows=rows
            )
        k = self.k if rows is None else self.k[rows][:, rows]
        return Cholesky(k, ridge, block=block)

    def _resampled(self) -> Iterator[tuple[Tensor, Solver]]:
        if self._halves:
            yield from self._halves
            return
        kept: list[tuple[Tensor, Solver]] = []
        drawn = halves(len(self.weights), self._resamples)
        for half in drawn:
            rows = half.to(self.device)
            solver = self._inverse(self._positions(rows), self.ridge / 2)
            if 0 < solver.nbytes * len(drawn) <= KEPT:
                kept.append((rows, solver))
            yield rows, solver
        self._halves = kept


def _contracted(rows: Tensor, weights: Tensor) -> Tensor:
    """Scores (targets, instances) of solves (targets, instances * directions)."""
    return torch.einsum("tnd,nd->tn", rows.view(len(rows), *weights.shape), weights)


def _form(blocks: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left' block right`` of every instance: (instances,)."""
    return torch.einsum("nd,nde,ne->n", left, blocks, right)
