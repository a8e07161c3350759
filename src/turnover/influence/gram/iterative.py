"""Solves with ``K + lambda I`` where ``K`` is on disk: conjugate gradients for many targets at once.

``K`` is read once for each step. Preconditioned by its Nystroem approximation from random landmarks
(Frangella, Tropp and Udell, SIAM J. Matrix Anal. Appl. 44, 2023), so that steps are few.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from turnover.errors import InputError

_PANEL = 2**27
"""Bytes of K that are read at once."""
_STEPS = 300
_TOLERANCE = 1e-5
_PROBES = 64


class Iterative:
    """``(K + lambda I)^-1`` of some rows, with the interface of ``Cholesky``.

    Args:
        k: float32 (all rows, all rows), on disk.
        ridge: lambda.
        landmarks: rows that the preconditioner is made of.
        device: where products are computed.
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
        rows: Tensor | None = None,
    ) -> None:
        self._k = k
        self._ridge = ridge
        self._device = device
        self._rows = torch.arange(len(k)) if rows is None else rows.cpu()
        self._all = rows is None
        self._vectors, self._change, self._floor = self._approximate(landmarks)

    def rows(self, cross: Tensor) -> Tensor:
        """``cross (K + lambda I)^-1``: float32, of the shape (targets, rows) of ``cross``.

        Raises:
            InputError: no convergence, with a small lambda.
        """
        return self._solved(cross.T.to(self._device)).T

    @cached_property
    def leverage(self) -> Tensor:
        """Diagonal of ``K (K + lambda I)^-1``: float32 (rows,), estimated.

        That of the Nystroem approximation is exact, and what it lacks comes from random signs
        (Hutchinson, Communications in Statistics 19, 1990).
        """
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (len(self._rows), _PROBES), generator=generator)
        probes = (2.0 * signs - 1).to(self._device)
        rest = self._solved(probes) - self._inverted(probes)
        diagonal = 1 / self._floor + self._vectors.square() @ self._change
        diagonal = diagonal + (probes * rest).mean(dim=1)
        return (1 - self._ridge * diagonal).clamp(0, 1)

    def _approximate(self, landmarks: int) -> tuple[Tensor, Tensor, float]:
        """Eigenvectors, what they change of the inverse, and lambda with the last eigenvalue."""
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(self._rows), generator=generator)[:landmarks].sort().values
        # Rows in place of columns: K is symmetric, and rows lie together on disk.
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

    def _inverted(self, values: Tensor) -> Tensor:
        projected = self._vectors.T @ values
        return values / self._floor + self._vectors @ (self._change[:, None] * projected)

    def _product(self, values: Tensor) -> Tensor:
        """``(K + lambda I) values``."""
        out = self._ridge * values
        step = max(1, _PANEL // (4 * len(self._k)))
        for start in range(0, len(self._rows), step):
            rows = self._rows[start : start + step]
            panel = (
                self._k[start : start + step]
                if self._all
                else self._k[rows].index_select(1, self._rows)
            )
            out[start : start + step] += panel.to(self._device) @ values
        return out

    def _solved(self, wanted: Tensor) -> Tensor:
        solution = self._inverted(wanted)
        residual = wanted - self._product(solution)
        size = wanted.norm(dim=0).clamp_min(torch.finfo(wanted.dtype).tiny)
        turned = self._inverted(residual)
        direction = turned
        fall = (residual * turned).sum(dim=0)
        for _ in range(_STEPS):
            if bool((residual.norm(dim=0) <= _TOLERANCE * size).all()):
                return solution
            product = self._product(direction)
            # Columns that are done have directions of 0.
            step = fall / (direction * product).sum(dim=0).clamp_min(1e-38)
            solution = solution + step * direction
            residual = residual - step * product
            turned = self._inverted(residual)
            new = (residual * turned).sum(dim=0)
            direction = turned + new / fall.clamp_min(1e-38) * direction
            fall = new
        raise InputError(
            f"conjugate gradients did not converge in {_STEPS} steps with lambda {self._ridge:.3g}: "
            f"give a larger ridge"
        )
