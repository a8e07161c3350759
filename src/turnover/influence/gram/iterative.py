"""Solves with ``K + lambda I`` for a ``K`` on disk: conjugate gradients for many targets at once.

Each step reads ``K`` once. The preconditioner is a Nystroem approximation from random landmarks
(Frangella, Tropp and Udell, SIAM J. Matrix Anal. Appl. 44, 2023), which keeps steps few.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from turnover.errors import InputError

_PANEL = 2**27
"""Bytes of K read at once."""
_STEPS = 300
_TOLERANCE = 3e-6
PROBES = 256


class Iterative:
    """``(K + lambda I)^-1`` of some rows, with the interface of :class:`.solve.Cholesky`.

    Args:
        k: float32 (all rows, all rows), on disk.
        ridge: lambda.
        landmarks: number of rows in the preconditioner.
        device: where products are computed.
        block: rows of each instance.
        rows: int64, sorted positions; ``None``: all of them.
    """

    nbytes = 0

    def __init__(
        self,
        k: Tensor,
        ridge: float,
        *,
        landmarks: int,
        device: torch.device,
        block: int,
        rows: Tensor | None,
    ) -> None:
        self._k = k
        self._ridge = ridge
        self._device = device
        self._block = block
        self._rows = torch.arange(len(k)) if rows is None else rows.cpu()
        self._all = rows is None
        self._vectors, self._change, self._floor = self._approximate(landmarks)

    def rows(self, cross: Tensor) -> Tensor:
        """``cross (K + lambda I)^-1``: float32, of the shape (targets, rows) of ``cross``."""
        return self._solved(cross.T.to(self._device)).T

    @cached_property
    def leverage(self) -> Tensor:
        """Blocks on the diagonal of ``K (K + lambda I)^-1``: float32 (instances, block, block), estimated.

        The Nystroem approximation's are exact; the rest is estimated with random signs (Hutchinson,
        Communications in Statistics 19, 1990).
        """
        generator = torch.Generator().manual_seed(0)
        # A row has the same signs in every half, so that the estimate hardly differs between them.
        signs = torch.randint(2, (len(self._k), PROBES), generator=generator)[self._rows]
        probes = (2.0 * signs - 1).to(self._device)
        rest = self._solved(probes) - self._preconditioned(probes)
        rest, probes, vectors = (
            values.view(-1, self._block, values.shape[1])
            for values in (rest, probes, self._vectors)
        )
        identity = torch.eye(self._block, device=self._device)
        blocks = identity / self._floor + (vectors * self._change) @ vectors.mT
        blocks = blocks + rest @ probes.mT / PROBES
        return self._bounded(identity - self._ridge * blocks)

    def _bounded(self, blocks: Tensor) -> Tensor:
        """Estimates of blocks of ``K (K + lambda I)^-1`` moved into their bounds, below I and K / lambda."""
        rows = self._rows.view(-1, self._block)
        diagonal = [self._k[rows[:, i, None], rows] for i in range(self._block)]
        sizes, turn = torch.linalg.eigh(torch.stack(diagonal, dim=1).to(self._device) / self._ridge)
        sizes = sizes.clamp_min(torch.finfo(sizes.dtype).tiny).sqrt()[:, None, :]
        into, back = turn / sizes, turn * sizes
        values, vectors = torch.linalg.eigh(into.mT @ ((blocks + blocks.mT) / 2) @ into)
        bounded = back @ (vectors * values.clamp(0, 1)[:, None, :]) @ vectors.mT @ back.mT
        values, vectors = torch.linalg.eigh(bounded)
        clamped: Tensor = (vectors * values.clamp(0, 1)[:, None, :]) @ vectors.mT
        return clamped

    def _approximate(self, landmarks: int) -> tuple[Tensor, Tensor, float]:
        """Eigenvectors, their change of the inverse, and lambda plus the last eigenvalue."""
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(self._rows), generator=generator)[:landmarks].sort().values
        # Rows of the symmetric K, as they are contiguous on disk.
        columns = self._k[self._rows[chosen]][:, self._rows].T.to(self._device)
        core = columns[chosen.to(self._device)].double()
        values, vectors = torch.linalg.eigh(core)
        large = values > 1e-6 * values[-1]
        half = columns @ (vectors[:, large] / values[large].sqrt()).float()
        squares, turn = torch.linalg.eigh((half.T @ half).double())
        squares = squares.clamp_min(0)
        kept = squares > 1e-6 * squares[-1]
        basis = half @ (turn[:, kept] / squares[kept].sqrt()).float()
        floor = self._ridge + float(squares[kept][0])
        change = 1 / (squares[kept] + self._ridge) - 1 / floor
        return basis, change.float(), floor

    def _preconditioned(self, values: Tensor) -> Tensor:
        projected = self._vectors.T @ values
        return values / self._floor + self._vectors @ (self._change[:, None] * projected)

    def _product(self, values: Tensor) -> Tensor:
        """``(K + lambda I) values``."""
        out = self._ridge * values
        step = max(1, _PANEL // (4 * len(self._k)))
        for start in range(0, len(self._rows), step):
            rows = self._rows[start : start + step]
            panel = self._k[start : start + step]
            if not self._all:
                panel = self._k[rows].index_select(1, self._rows)
            out[start : start + step] += panel.to(self._device) @ values
        return out

    def _solved(self, wanted: Tensor) -> Tensor:
        solution = self._preconditioned(wanted)
        residual = wanted - self._product(solution)
        size = wanted.norm(dim=0).clamp_min(torch.finfo(wanted.dtype).tiny)
        turned = self._preconditioned(residual)
        direction = turned
        fall = (residual * turned).sum(dim=0)
        for _ in range(_STEPS):
            if bool((residual.norm(dim=0) <= _TOLERANCE * size).all()):
                return solution
            product = self._product(direction)
            # Solved columns have directions of 0.
            step = fall / (direction * product).sum(dim=0).clamp_min(1e-38)
            solution = solution + step * direction
            residual = residual - step * product
            turned = self._preconditioned(residual)
            new = (residual * turned).sum(dim=0)
            direction = turned + new / fall.clamp_min(1e-38) * direction
            fall = new
        raise InputError(
            f"conjugate gradients did not converge in {_STEPS} steps with lambda {self._ridge:.3g}: "
            f"give a larger ridge"
        )
