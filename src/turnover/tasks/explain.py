"""Explain predictions: the most helpful and most harmful training instances, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from turnover.data.base import Data
from turnover.errors import InputError
from turnover.results.result import Result
from turnover.runs.run import Run
from turnover.runs.targets import read_targets

SIGNIFICANT_Q = 0.05
AMONG = ("predicted", "true")
NOT_SIGNIFICANT = "not distinguishable from noise"
TURNOVER_MEANS = (
    "Turn-over: what the instance itself left in this network, as its exposed sub-network differs from "
    "its hidden one; q says how surely that is more than chance."
)
GRAM_MEANS = (
    "Gram: what retraining without the instance would change, the others' making up for it included, "
    "told from gradients: read the order, as sizes come out several times too small; the standard "
    "error says how far another training set would move the score, and training anew on it moves it "
    "some 1.8 times as far."
)


@dataclass(frozen=True)
class Influential:
    """One training instance and what it did to a target, or to several taken together.

    ``score`` is its influence in the objective's units (nats), ``z`` the score in units of the noise
    floor, ``q`` the adjusted p-value (0 to 1). ``text`` is None where it was left out.
    """

    key: str
    label: str
    text: str | None
    score: float
    z: float
    q: float

    @property
    def significant(self) -> bool:
        """Whether q is at most 0.05."""
        return self.q <= SIGNIFICANT_Q


@dataclass(frozen=True)
class GramInfluential:
    """One training instance and what it did to a target by gram.

    ``score`` and ``standard_error`` are in the objective's units (nats). ``text`` is None where it was
    left out.
    """

    key: str
    label: str
    text: str | None
    score: float
    standard_error: float


@dataclass(frozen=True)
class GramExplanation:
    """The most helpful (highest first) and most harmful (lowest first) instances by gram."""

    helpful: tuple[GramInfluential, ...]
    harmful: tuple[GramInfluential, ...]


@dataclass(frozen=True)
class Explanation:
    """One target with its most helpful (highest first) and most harmful (lowest first) instances.

    They are seen from the true class: the harmful ones pushed away from it. ``confidence`` is the
    probability (0 to 1) given to ``predicted_label``, ``noise_floor`` the standard deviation of the
    ghosts' scores on this target in nats. ``n_significant`` counts all training instances with
    q <= 0.05, shown or not. ``text`` is None where it was left out, ``gram`` where it was not estimated.
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

    def to_dict(self) -> dict[str, Any]:
        """The explanation as JSON values."""
        return asdict(self)


def rows_by_id(result: Result, train: Data) -> list[int]:
    """For every id of a result, the first training row that has it.

    Raises:
        InputError: the result has ids that are not in the training data.
    """
    first: dict[int, int] = {}
    for row, value in enumerate(train.ids.tolist()):
        first.setdefault(value, row)
    missing = [int(i) for i in result.train_ids if int(i) not in first]
    if missing:
        raise InputError(f"the result has training ids that the run does not: {missing[:5]}")
    return [first[int(i)] for i in result.train_ids]


def influential(
    result: Result,
    target: int | None,
    train: Data,
    rows: list[int],
    columns: np.ndarray[Any, Any],
) -> tuple[Influential, ...]:
    """The training instances of some columns of a result, for a target (or of a (train,) result)."""
    at = (slice(None),) if target is None else (target,)
    scores, z, q = result.scores[at], result.z[at], result.q[at]
    return tuple(
        Influential(
            train.keys[rows[column]],
            train.classes[train.labels[rows[column]]],
            train.shown(rows[column]),
            float(scores[column]),
            float(z[column]),
            float(q[column]),
        )
        for column in columns
    )


def explain_errors(run: Run, *, top: int = 5, among: str | None = None) -> list[Explanation]:
    """Explain every misclassified test row of a scored run.

    Args:
        top: as in :func:`explain`.
        among: likewise.

    Raises:
        InputError: the run has not been scored, or its results belong to another model.
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
    """Explanations of targets from a pairwise result.

    Args:
        result: scores (targets, train) on the true label's objective.
        target_rows: row of each target of the result in ``targets``.
        predicted: predicted class of each target of the result.
        confidence: its probability.
        top: how many instances on each side.
        among: list only training instances of the ``"predicted"`` class, as Kobayashi et al. do, or
            of the ``"true"`` one; q-values stay those over all instances.
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
    rows = rows_by_id(result, train)
    labels = np.array([train.labels[row] for row in rows])
    explanations = []
    for index, row in enumerate(target_rows):
        order = np.argsort(result.scores[index], kind="stable")
        wanted = {"predicted": predicted[index], "true": targets.labels[row], None: None}[among]
        if wanted is not None:
            order = order[labels[order] == wanted]
        helpful = [c for c in order[::-1][:top] if result.scores[index, c] > 0]
        harmful = [c for c in order[:top] if result.scores[index, c] < 0]
        explanations.append(
            Explanation(
                targets.keys[row],
                targets.shown(row),
                targets.classes[targets.labels[row]],
                targets.classes[predicted[index]],
                confidence[index],
                float(result.noise_floor[index]),
                int((result.q[index] <= SIGNIFICANT_Q).sum()),
                influential(result, index, train, rows, np.array(helpful, dtype=int)),
                influential(result, index, train, rows, np.array(harmful, dtype=int)),
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
                train.keys[rows[rank]],
                train.classes[train.labels[rows[rank]]],
                train.shown(rows[rank]),
                float(scores[rank]),
                float(errors[target, rank]),
            )
            for rank in ranks
        )

    # Of a class, what is among the extremes that were kept.
    ranks = [r for r in range(len(rows)) if wanted is None or train.labels[rows[r]] == wanted]
    return GramExplanation(
        listed(rank for rank in ranks[:top] if scores[rank] > 0),
        listed(rank for rank in ranks[::-1][:top] if scores[rank] < 0),
    )
