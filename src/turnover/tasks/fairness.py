"""Gaps between two groups of a run's test rows, and the training rows or groups that widen them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from turnover.data.base import Data
from turnover.data.delimited import read_table
from turnover.data.encoded import batches
from turnover.errors import InputError
from turnover.fairness import Gaps, gap_influence, gaps
from turnover.influence.estimator import Influence
from turnover.objectives import margin
from turnover.runs.run import Run
from turnover.tasks.explain import represented, rows_by_id
from turnover.tasks.review import REMOVE, matching, write_list
from turnover.tasks.score_trained import BATCH, by_ids, fitted
from turnover.tasks.training import evaluate

RELABEL = "relabel"
DECISIONS = (REMOVE, RELABEL)
METHODS = ("gram", "linear", "exact")
_FORMATS = {
    **dict.fromkeys(("key", "label"), ""),
    "score": ".8f",
    "z": ".2f",
    "q": ".3g",
    **dict.fromkeys(("decision", "text"), ""),
}
_GROUP_FORMATS = {"key": "", "rows": "", "score": ".8f", "z": ".2f", "q": ".3g"}


@dataclass(frozen=True)
class Widening:
    """A training row, or group of rows, that widens a gap.

    Attributes:
        key: of the row, or the group's name.
        rows: number of its rows.
        label: of the row; ``None`` for a group.
        text: of the row; ``None`` for a group.
        score: influence on the gap, a difference of probabilities; negative = widens it.
        z: the score in units of its noise.
        q: adjusted p-value over all training rows or groups.
    """

    key: str
    rows: int
    label: str | None
    text: str | None
    score: float
    z: float
    q: float


@dataclass(frozen=True)
class Fairness:
    """The gaps of a run on its test rows.

    Attributes:
        gaps: of the predictions.
        gap: the one that influence is on.
        positive: class whose rates are compared.
        method: estimator.
        widening: training rows or groups with negative scores, the one that widens it most first.
        count: how many widen it, listed or not.
        grouped: whether they are groups.
    """

    gaps: Gaps
    gap: str
    positive: str
    method: str
    widening: tuple[Widening, ...]
    count: int
    grouped: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def fairness(
    run: Run,
    attribute: Sequence[str],
    *,
    positive: str,
    gap: str = "demographic_parity",
    method: str = "gram",
    budget: int = 100,
) -> Fairness:
    """Measure gaps on a run's test rows, and list the training rows, or groups, that widen one most.

    Args:
        run: the run.
        attribute: of each test row, two distinct values (:func:`read_attribute`).
        positive: class whose rates are compared.
        gap: one of :data:`turnover.fairness.GAPS`.
        method: ``"gram"``, or for a network with turn-over masks ``"linear"`` or ``"exact"``.
        budget: most rows or groups to list.

    Raises:
        InputError: an unknown class or method, a budget below 1, a method that needs masks in a run without,
            or as :func:`turnover.fairness.gap_influence`.
    """
    classes = run.train.classes
    if positive not in classes:
        raise InputError(f"unknown class {positive!r}; the classes are {', '.join(classes)}")
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}; choose one of {', '.join(METHODS)}")
    if budget < 1:
        raise InputError(f"the budget must be at least 1, got {budget}")
    if method != "gram":
        run.network  # noqa: B018 - refuses a run without masks
    encoded = run.encode(run.test)
    rows = range(len(encoded))
    predicted = evaluate(run.model, encoded, rows, lambda _: run.whole()).predicted
    index = classes.index(positive)
    names = np.array(classes)
    found = gaps(names[predicted.numpy()], names[run.test.labels], attribute, positive=positive)
    # Batches have the rows in an order of their own.
    order = [row for chunk in encoded.chunks(rows, BATCH) for row in chunk]
    ids = None
    if method == "gram":
        influence = fitted(run, run.encode(run.train), margin)
    else:
        influence = Influence(run.network, margin, method, sites=run.scored_sites(), progress=True)
        ids = torch.unique(run.train.ids)
    result = gap_influence(
        influence,
        batches(encoded, rows, BATCH),
        [attribute[row] for row in order],
        ids,
        gap=gap,
        positive=index,
    )
    if method == "gram":
        result = by_ids(result, run)
    sizes = Counter(run.train.ids.tolist())
    grouped = run.train.grouped
    first = rows_by_id(result.train_ids, run.train)
    widen, listed = int((result.scores < 0).sum()), []
    for column in np.argsort(result.scores, kind="stable")[:budget].tolist():
        numbers = [float(one[column]) for one in (result.scores, result.z, result.q)]
        key, label, text = represented(run.train, first[column])
        shown = (None, None) if grouped else (label, text)
        size = sizes[int(result.train_ids[column])]
        if numbers[0] < 0:
            listed.append(Widening(key, size, *shown, *numbers))
    return Fairness(found, gap, positive, influence.method, tuple(listed), widen, grouped)


def read_attribute(test: Data, path: Path, column: str = "attribute") -> list[str]:
    """Read the attribute of every test row from a CSV file with the columns key and this one.

    Args:
        test: the rows.
        path: the file; it may have other rows and columns, too.
        column: with the attribute.

    Returns:
        One value for each test row.

    Raises:
        InputError: a missing file or column, a test row without a value, or with two.
    """
    known = set(test.keys)
    values: dict[str, str] = {}
    for number, line in read_table(path, ("key", column)):
        key = matching(line.get("key", ""), known)
        value = line.get(column, "").strip()
        if key not in known or not value:
            continue
        if values.setdefault(key, value) != value:
            raise InputError(
                f"{path}: line {number}: a second {column} of {key!r}, {value!r} and not {values[key]!r}"
            )
    missing = [key for key in test.keys if key not in values]
    if missing:
        raise InputError(
            f"{path} has no {column} of {len(missing)} of {len(test)} test rows, such as {missing[0]!r}: "
            f"their keys are those of `turnover predict`"
        )
    return [values[key] for key in test.keys]


def write_widening(run: Run, found: Fairness, out: Path, *, decision: str | None = None) -> None:
    """Write the rows or groups as CSV, atomically: for rows a list that :func:`apply_decisions` takes.

    Args:
        run: the run.
        found: on it.
        out: CSV file.
        decision: fills the column decision: ``"remove"``, or ``"relabel"`` for the other of two classes;
            ``None``: empty.

    Raises:
        InputError: as :func:`check_decision`.
    """
    check_decision(run, decision)
    rows: list[Mapping[str, Any]] = []
    for one in found.widening:
        decided = decision
        if decision == RELABEL:
            decided = next(name for name in run.train.classes if name != one.label)
        rows.append(asdict(one) | {"decision": decided})
    write_list(out, rows, _GROUP_FORMATS if found.grouped else _FORMATS)


def check_decision(run: Run, decision: str | None) -> None:
    """Refuse decisions on groups, unknown ones, and another label where there are several."""
    if decision is None:
        return
    if decision not in DECISIONS:
        raise InputError(f"unknown decision {decision!r}; choose one of {', '.join(DECISIONS)}")
    classes = run.train.classes
    if decision == RELABEL and len(classes) > 2:
        raise InputError(
            f"relabel takes the other of two classes, and the run has {len(classes)}: fill in the column "
            f"decision yourself"
        )
    if run.train.grouped:
        raise InputError(f"{run.folder} has groups, and decisions are on rows: leave them out")
