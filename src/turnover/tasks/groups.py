"""Influence of groups of training instances that share a mask: sources, annotators or time blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from turnover import objectives
from turnover.data.encoded import Encoded, batches
from turnover.errors import InputError
from turnover.ids import ghost_ids
from turnover.influence.estimator import Influence
from turnover.io.bars import tqdm
from turnover.objectives import Objective
from turnover.runs.run import Run
from turnover.tasks.explain import SIGNIFICANT_Q
from turnover.tasks.score_trained import by_ids, fitted
from turnover.tasks.training import evaluate

_BATCH = 32
_GHOSTS = 1000
_SPREAD_GHOSTS = 20
_SPREAD_START = 2**34
"""Ghosts whose networks show how far accuracies differ by chance, apart from those of noise floors."""


@dataclass(frozen=True)
class GroupInfluence:
    """A group and its influence on the test rows.

    Attributes:
        key: name of the group.
        rows: number of its training rows.
        score: influence on the mean objective of the test rows, in nats; positive = helpful.
        z: the score in units of the noise floor.
        q: adjusted p-value over the groups.
        accuracy_with: of the group's exposed network on the test rows; ``None``: not measured.
        accuracy_without: of its hidden network, which never learned the group and is as wide.
        standard_error: of the score by gram, in nats; ``None`` where scores have a noise floor alone.
    """

    key: str
    rows: int
    score: float
    z: float
    q: float
    accuracy_with: float | None = None
    accuracy_without: float | None = None
    standard_error: float | None = None

    @property
    def significant(self) -> bool:
        """Whether q is at most 0.05."""
        return self.q <= SIGNIFICANT_Q


@dataclass(frozen=True)
class Groups:
    """The groups of a run, the most harmful first.

    Attributes:
        groups: all groups.
        accuracy: of the whole network on the test rows.
        accuracy_spread: standard deviation of (without - with) over ghosts, that is, by chance; ``None`` for
            a model that was trained without masks.
    """

    groups: tuple[GroupInfluence, ...]
    accuracy: float
    accuracy_spread: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def groups(
    run: Run, objective: Objective = objectives.margin, *, method: str = "linear", predict: int = 10
) -> Groups:
    """Estimate the influence of a run's groups on its test rows, and predict without some of them.

    Args:
        run: a run with groups.
        objective: cost of a prediction.
        method: ``"linear"`` or ``"exact"``; a model that was trained without masks is scored by gram.
        predict: number of most harmful and of most helpful groups with and without which the test rows are
            also predicted, in two passes over them for each.

    Raises:
        InputError: the run's training rows have ids of their own, or another method than the default for a
            model that was trained without masks.
    """
    sizes = Counter(run.train.ids.tolist())
    if not run.train.grouped:
        raise InputError(
            f"{run.folder} has no groups: every training row has an id of its own; "
            f"make one with --group-column"
        )
    keys = dict(zip(run.train.ids.tolist(), run.train.groups, strict=True))
    test = run.encode(run.test)
    if run.masks is None:
        return _by_gram(run, objective, method, sizes, keys, test)
    influence = Influence(run.network, objective, method, ghosts=_GHOSTS, progress=True)
    result = influence.aggregate(
        batches(test, range(len(test)), _BATCH), torch.tensor(sorted(sizes))
    )
    order = np.argsort(result.scores, kind="stable")
    chosen = set(order[:predict].tolist()) | set(order[len(order) - predict :].tolist())
    network = run.network

    def accuracy(bind: Callable[[Sequence[int]], AbstractContextManager[Any]]) -> float:
        found = evaluate(run.model, test, range(len(test)), bind)
        return float(found.correct.float().mean())

    def with_and_without(train_id: int) -> tuple[float, float]:
        return (
            accuracy(lambda rows: network.exposed([train_id] * len(rows))),
            accuracy(lambda _: network.without(train_id)),
        )

    ghosts = ghost_ids(_SPREAD_GHOSTS if predict else 0, start=_SPREAD_START)
    shown = tqdm(ghosts.tolist(), "by chance", unit="ghost", disable=not predict)
    spread = [with_and_without(ghost) for ghost in shown]
    listed = [column for column in order.tolist() if column in chosen]
    measured = {
        column: with_and_without(int(result.train_ids[column]))
        for column in tqdm(listed, "with and without groups", unit="group", disable=not predict)
    }
    found = []
    for column in order.tolist():
        group = int(result.train_ids[column])
        both = measured.get(column, (None, None))
        numbers = (float(values[column]) for values in (result.scores, result.z, result.q))
        found.append(GroupInfluence(keys[group], sizes[group], *numbers, *both))
    differences = [without - exposed for exposed, without in spread]
    return Groups(
        tuple(found),
        accuracy(lambda _: network.mean()),
        float(np.std(differences, ddof=1)) if differences else 0.0,
    )


def _by_gram(
    run: Run,
    objective: Objective,
    method: str,
    sizes: Mapping[int, int],
    keys: Mapping[int, str],
    test: Encoded,
) -> Groups:
    """Sums over the rows of each group, whose standard errors are at most the sums of theirs."""
    if method != "linear":
        raise InputError(
            f"--method {method} is for networks with turn-over masks, and the model of {run.folder} was "
            f"trained without: it is scored by gram; leave it out"
        )
    every = batches(test, range(len(test)), _BATCH)
    result = by_ids(fitted(run, run.encode(run.train), objective).aggregate(every), run)
    assert result.standard_error is not None
    found = []
    for column in np.argsort(result.scores, kind="stable").tolist():
        group = int(result.train_ids[column])
        score, z, q, error = (
            float(values[column])
            for values in (result.scores, result.z, result.q, result.standard_error)
        )
        found.append(GroupInfluence(keys[group], sizes[group], score, z, q, standard_error=error))
    predictions = evaluate(run.model, test, range(len(test)), lambda _: run.whole())
    return Groups(tuple(found), float(predictions.correct.float().mean()), None)
