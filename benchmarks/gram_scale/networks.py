"""The network of a problem of the board, and its scores by exact gram and by cheaper ways."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.fidelity import board
from benchmarks.fidelity.problems import Problem
from turnover import Gram, Influence
from turnover.batches.loaders import Numbers

Scores = NDArray[np.float32]
WAYS = ("landmarks", "exact cross products")
_ROWS = 200
_DIRECTIONS = 2  # gram's default


class Network:
    """The first standard network that the board attributes.

    Args:
        problem: what it is trained on.
        folder: for files of methods.

    Attributes:
        task: as methods of the board take it.
        counts: of landmarks that are tried.
        directions: gradients of an instance.
        exact: gram of all pairs, fitted.
        scores: of exact gram, (targets, train).
    """

    def __init__(self, problem: Problem, folder: Path) -> None:
        self.problem = problem
        self.task = board.task_of(problem, "standard", folder, 1)
        rows = len(problem.train)
        self.counts = (max(200, rows // 10), rows // 4)
        self.directions = min(_DIRECTIONS, problem.classes - 1)
        self._train = _cut(problem.train.x, problem.train.y)
        self.targets = _cut(problem.test.x, problem.test.y)
        self.exact = Influence(self.task.models[0], method="gram").fit(self._train)
        self.scores: Scores = self.exact.estimate(self.targets).scores
        self._found: dict[tuple[str, int], tuple[Influence, Scores]] = {}

    def by_landmarks(self, way: str, count: int) -> tuple[Influence, Scores]:
        """Gram by so many landmarks, fitted, and its scores."""
        if (way, count) not in self._found:
            method = Gram(landmarks=count, exact=way == "exact cross products")
            influence = Influence(self.task.models[0], method=method).fit(self._train)
            self._found[way, count] = influence, influence.estimate(self.targets).scores
        return self._found[way, count]

    def stored_bytes(self, count: int) -> int:
        """Bytes of the vectors of all training instances by so many landmarks."""
        return 2 * len(self.problem.train) * count * self.directions**2

    def projected(self, count: int) -> Scores:
        """Scores by randomly projected gradients, in float16 as many bytes as so many landmarks take.

        Projections of gradients with inner products ``K`` are distributed as ``K^(1/2)`` times normal
        numbers.
        """
        values, vectors, fitted = self._joint
        generator = torch.Generator().manual_seed(0)
        size = count * self.directions
        normal = torch.randn((len(values), size), generator=generator, dtype=torch.float64)
        made = (vectors * values.clamp_min(0).sqrt()) @ (vectors.T @ (normal / size**0.5))
        own, target = made.tensor_split([len(fitted.k)])
        system = own.T @ own
        system.diagonal().add_(fitted.ridge)
        solved = torch.linalg.solve(system, own.T).T
        scores = (target @ solved.T).view(len(target), *fitted.weights.shape)
        weighted = (scores * fitted.weights.double()).sum(dim=2) * fitted.factor.double()
        found: Scores = weighted.float().numpy()
        return found

    @cached_property
    def _joint(self) -> tuple[Tensor, Tensor, Any]:
        """Eigenvalues and -vectors of the inner products of all instances, and exact gram's fit."""
        driver: Any = self.exact._driver
        fitted = driver._fitted[0]
        crosses = torch.cat([one for _, (one,) in driver._targets(self.targets, Numbers.ROWS)])
        others: Any = Influence(self.task.models[0], method=Gram(directions=0)).fit(self.targets)
        theirs = others._driver._fitted[0].k.double()
        upper = torch.cat([fitted.k.double(), crosses.T.double()], 1)
        lower = torch.cat([crosses.double(), theirs], 1)
        values, vectors = torch.linalg.eigh(torch.cat([upper, lower]))
        return values, vectors, fitted


def _cut(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    ids = torch.arange(len(y))
    return list(zip(*(torch.split(one, _ROWS) for one in (x, y, ids)), strict=True))
