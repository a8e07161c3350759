"""Explain predictions: the most helpful and most harmful training instances, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.data.base import Data
from turnover.errors import InputError
from turnover.results.result import Result
from turnover.runs.run import Run
from turnover.runs.targets import read_targets

SIGNIFICANT_Q = 0.05
AMONG = ("predicted", "true")
NOT_SIGNIFICANT = "not distinguishable from noise"
TURNOVER_MEANS = (
    "Turn-over: what the instance itself left in this network, the difference between its exposed and "
    "its hidden sub-network; q says how surely that is more than chance."
)
GRAM_MEANS = (
    "Gram: what retraining without the instance would change, including how the other instances make "
    "up for it, estimated from gradients. Read the order: sizes come out several times too small. The "
    "standard error says how far another training set would move the score; retraining on that set "
    "moves it about 1.8 times as far."
)


@dataclass(frozen=True)
class Instance:
    """A training instance; its text is None where it was left out."""

    key: str
    label: str
    text: str | None


@dataclass(frozen=True)
class Influential(Instance):
    """A training instance and its influence on a target, or on several together.

    Attributes:
        score: influence in the objective's units (nats).
        z: the score in units of the noise floor.
        q: adjusted p-value, from 0 to 1.
        standard_error: of the score by gram, in nats; ``None`` where scores have a noise floor alone.
    """

    score: float
    z: float
    q: float
    standard_error: float | None = field(default=None, kw_only=True)

    @property
    def significant(self) -> bool:
        """Whether q is at most 0.05."""
        return self.q <= SIGNIFICANT_Q


@dataclass(frozen=True)
class GramInfluential(Instance):
    """A training instance and its influence on a target by gram, with standard error, in nats."""

    score: float
    standard_error: float


@dataclass(frozen=True)
class GramExplanation:
    """The most helpful (highest first) and most harmful (lowest first) instances by gram."""

    helpful: tuple[GramInfluential, ...]
    harmful: tuple[GramInfluential, ...]


@dataclass(frozen=True)
class Explanation:
    """One target with its most helpful and most harmful training instances.

    Helpful instances pushed toward the true class, harmful ones away from it.

    Attributes:
        key: of the target.
        text: of the target; ``None`` where it was left out.
        true_label: its class.
        predicted_label: the predicted class.
        confidence: probability of the predicted class.
        noise_floor: standard deviation of the ghosts' scores on this target, in nats.
        n_significant: training instances with q <= 0.05, listed or not.
        helpful: highest score first.
        harmful: lowest score first.
        gram: the same by gram; ``None`` where it was not estimated.
    """

    key: str
    text: str | None
    true_label: str
    predicted_label: str
    confidence: float
    noise_floor: float
    n_significant: int
    helpful: tuple[Influential, ...]
    harmful: tuple[Influential, ...]
    gram: GramExplanation | None = None

    @property
    def is_gram(self) -> bool:
        """Whether its own scores are those of gram, as for models trained without masks."""
        return any(one.standard_error is not None for one in (*self.helpful, *self.harmful))

    @property
    def instances(self) -> tuple[Instance, ...]:
        """All training instances listed."""
        by_gram = () if self.gram is None else (*self.gram.helpful, *self.gram.harmful)
        return (*self.helpful, *self.harmful, *by_gram)

    def to_dict(self) -> dict[str, Any]:
        """The explanation as JSON values."""
        return asdict(self)


def rows_by_id(train_ids: NDArray[np.int64], train: Data) -> list[int]:
    """Find the first training row of every id of a result; refuse ids of other training data."""
    first = {value: row for row, value in reversed(list(enumerate(train.ids.tolist())))}
    missing = [one for one in train_ids.tolist() if one not in first]
    if missing:
        raise InputError(f"the result has training ids that the run does not: {missing[:5]}")
    return [first[one] for one in train_ids.tolist()]


def influential(
    result: Result,
    target: int | None,
    train: Data,
    rows: list[int],
    columns: list[int],
) -> tuple[Influential, ...]:
    """List the training instances of some columns of a result, for a target (or of a (train,) result)."""
    at = (slice(None),) if target is None else (target,)
    numbers = (values[at][columns].tolist() for values in (result.scores, result.z, result.q))
    errors: list[float | None] = [None] * len(columns)
    if result.method == "gram" and result.standard_error is not None:
        errors = result.standard_error[at][columns].tolist()
    return tuple(
        Influential(*represented(train, rows[column]), *measured, standard_error=error)
        for column, error, *measured in zip(columns, errors, *numbers, strict=True)
    )


def described(data: Data, row: int) -> tuple[str, str, str]:
    """Key, label and text of a row."""
    return data.keys[row], data.classes[data.labels[row]], data.shown(row)


def represented(train: Data, row: int) -> tuple[str, str, str]:
    """Name of a row's group, or its key, and label and text of the row, which stands for the group."""
    return train.groups[row], *described(train, row)[1:]


def explain_errors(run: Run, *, top: int = 5, among: str | None = None) -> list[Explanation]:
    """Explain every misclassified test row of a scored run.

    ``top`` and ``among`` are as in :func:`explain`.
    """
    rows, predicted, confidence = read_targets(run)
    if not len(rows):
        return []
    return explain(
        run.read_result("errors"),
        run.train,
        run.test,
        rows.tolist(),
        predicted.tolist(),
        confidence.tolist(),
        top=top,
        among=among,
        gram=run.read_result("gram") if run.has_result("gram") else None,
    )


def explain(
    result: Result,
    train: Data,
    targets: Data,
    target_rows: list[int],
    predicted: list[int],
    confidence: list[float],
    *,
    top: int = 5,
    among: str | None = None,
    gram: Result | None = None,
) -> list[Explanation]:
    """Explain targets by a pairwise result.

    Args:
        result: scores (targets, train) on the true label's objective.
        train: the training data.
        targets: data of the targets.
        target_rows: row of each target of the result in ``targets``.
        predicted: predicted class of each target of the result.
        confidence: its probability.
        top: how many instances on each side.
        among: list only training instances of the ``"predicted"`` class, as Kobayashi et al. do, or
            of the ``"true"`` one; q-values are still adjusted over all instances.
        gram: the extremes of the same targets by gram, with row numbers of ``train`` as ids.

    Raises:
        InputError: results of other targets or training instances, or another ``among``.
    """
    if among is not None and among not in AMONG:
        raise InputError(f"unknown class {among!r} to list; choose {' or '.join(AMONG)}")
    if gram is not None and len(gram.scores) != len(target_rows):
        raise InputError(
            f"the result of gram has {len(gram.scores)} targets, the other one {len(target_rows)}: "
            f"estimate both again"
        )
    rows = rows_by_id(result.train_ids, train)
    labels = np.array([train.labels[row] for row in rows])
    explanations = []
    for index, row in enumerate(target_rows):
        order = np.argsort(result.scores[index], kind="stable")
        wanted = {"predicted": predicted[index], "true": targets.labels[row], None: None}[among]
        if wanted is not None:
            order = order[labels[order] == wanted]
        helpful = [c for c in order[::-1][:top].tolist() if result.scores[index, c] > 0]
        harmful = [c for c in order[:top].tolist() if result.scores[index, c] < 0]
        explanations.append(
            Explanation(
                targets.keys[row],
                targets.shown(row),
                targets.classes[targets.labels[row]],
                targets.classes[predicted[index]],
                confidence[index],
                float(result.noise_floor[index]),
                int((result.q[index] <= SIGNIFICANT_Q).sum()),
                influential(result, index, train, rows, helpful),
                influential(result, index, train, rows, harmful),
                None if gram is None else _by_gram(gram, index, train, top, wanted),
            )
        )
    return explanations


def _by_gram(
    gram: Result, target: int, train: Data, top: int, wanted: int | None
) -> GramExplanation:
    rows, scores, errors = gram.train_ids[target], gram.scores[target], gram.standard_error
    assert errors is not None
    if len(rows) and not 0 <= rows.min() <= rows.max() < len(train):
        raise InputError("the result of gram has training rows that the run does not")

    def listed(ranks: Iterable[int]) -> tuple[GramInfluential, ...]:
        return tuple(
            GramInfluential(
                *described(train, rows[rank]), float(scores[rank]), float(errors[target, rank])
            )
            for rank in ranks
        )

    # Of a class, what is among the extremes that were kept.
    ranks = [r for r in range(len(rows)) if wanted is None or train.labels[rows[r]] == wanted]
    return GramExplanation(
        listed(rank for rank in ranks[:top] if scores[rank] > 0),
        listed(rank for rank in ranks[::-1][:top] if scores[rank] < 0),
    )
