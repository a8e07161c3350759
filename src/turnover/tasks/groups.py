"""Groups of training instances that share a mask: what each source, annotator or time block did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from turnover import objectives
from turnover.data.encoded import Encoded, batches
from turnover.errors import InputError
from turnover.ids import ghost_ids
from turnover.influence.estimator import Influence
from turnover.objectives import Objective
from turnover.runs.run import Run
from turnover.tasks.explain import SIGNIFICANT_Q
from turnover.tasks.training import evaluate

_BATCH = 32
_GHOSTS = 1000
_SPREAD_GHOSTS = 20
_SPREAD_START = 2**34
"""Ghosts whose networks say how far accuracies differ by chance, away from those of noise floors."""


@dataclass(frozen=True)
class GroupInfluence:
    """One group, and what it did to the test rows.

    Attributes:
        key: the group.
        rows: training rows in it.
        score: influence on the mean objective of the test rows, in nats; positive = helpful.
        z: the score in units of the noise floor.
        q: adjusted p-value over the groups.
        accuracy_with: of the group's exposed network on the test rows; ``None`` where it was not asked
            for.
        accuracy_without: of its hidden network, which never learned the group; as wide as the other.
    """

    key: str
    rows: int
    score: float
    z: float
    q: float
    accuracy_with: float | None = None
    accuracy_without: float | None = None

    @property
    def significant(self) -> bool:
        """Whether q is at most 0.05."""
        return self.q <= SIGNIFICANT_Q


@dataclass(frozen=True)
class Groups:
    """The groups of a run, the most harmful first.

    Attributes:
        groups: all of them.
        accuracy: of the whole network on the test rows.
        accuracy_spread: standard deviation of (without - with) over ghosts: what is chance.
    """

    groups: tuple[GroupInfluence, ...]
    accuracy: float
    accuracy_spread: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def groups(
    run: Run, objective: Objective = objectives.margin, *, method: str = "linear", predict: int = 10
) -> Groups:
    """Influence of the groups of a run on its test rows, and predictions without some of them.

    Args:
        objective: what a prediction costs.
        method: ``"linear"`` or ``"exact"``.
        predict: test rows are also predicted with and without the so many most harmful and most helpful
            groups: two passes over the test rows for each.

    Raises:
        InputError: the run's training rows have ids of their own.
    """
    sizes = Counter(run.train.ids.tolist())
    if len(sizes) == len(run.train):
        raise InputError(
            f"{run.folder} has no groups: every training row has an id of its own; "
            f"train with `turnover fit --group-column`"
        )
    keys = dict(zip(run.train.ids.tolist(), run.train.keys, strict=True))
    test = run.encode(run.test)
    influence = Influence(run.network, objective, method, ghosts=_GHOSTS, progress=True)
    result = influence.aggregate(
        batches(test, range(len(test)), _BATCH), torch.tensor(sorted(sizes))
    )
    order = np.argsort(result.scores, kind="stable")
    chosen = set(order[:predict].tolist()) | set(order[len(order) - predict :].tolist())
    accuracies = _Accuracies(run, test)
    spread = [
        accuracies.of(int(ghost))
        for ghost in ghost_ids(_SPREAD_GHOSTS if predict else 0, start=_SPREAD_START)
    ]
    found = []
    for column in tqdm(order.tolist(), desc="with and without groups", unit="group"):
        group = int(result.train_ids[column])
        both = accuracies.of(group) if column in chosen else (None, None)
        numbers = (float(values[column]) for values in (result.scores, result.z, result.q))
        found.append(GroupInfluence(keys[group], sizes[group], *numbers, *both))
    differences = [without - exposed for exposed, without in spread]
    return Groups(
        tuple(found),
        accuracies.under(lambda _: run.network.mean()),
        float(np.std(differences, ddof=1)) if differences else 0.0,
    )


class _Accuracies:
    """Accuracy on the test rows under masks."""

    def __init__(self, run: Run, test: Encoded) -> None:
        self._run, self._test = run, test

    def under(self, bind: Callable[[Sequence[int]], AbstractContextManager[Any]]) -> float:
        found = evaluate(self._run.model, self._test, range(len(self._test)), bind)
        return float(found.correct.float().mean())

    def of(self, train_id: int) -> tuple[float, float]:
        """Of the exposed and of the hidden network of an id."""
        network = self._run.network
        return (
            self.under(lambda rows: network.exposed([train_id] * len(rows))),
            self.under(lambda _: network.without(train_id)),
        )
