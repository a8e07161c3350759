"""Review of labels: what to look at, what its label may be, and the data set after the decisions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from turnover import objectives
from turnover.data.base import Data
from turnover.data.delimited import read_table
from turnover.errors import InputError
from turnover.influence.estimator import Influence
from turnover.io.files import write_csv
from turnover.runs.run import Run
from turnover.runs.targets import check_scored
from turnover.tasks.explain import rows_by_id
from turnover.tasks.predict import predict_training

KEEP, REMOVE = "keep", "remove"
_INFLUENCERS = 10
_BATCH = 32
_COLUMNS = (
    *("key", "label", "suggested", "probability_of_label", "probability_of_suggested"),
    *("self_influence_z", "self_influence_q", "influencers", "decision", "text"),
)
_BEGINNING = r"[=+\-@\t\r\n]"
_FORMULA = re.compile(rf"'*{_BEGINNING}(?![0-9.]+$)")
_CHANGED = re.compile(r"'*(?!(?:0|-?[1-9]\d{0,14})\Z)[=+\-]?\.?\d[\d.,:/+\- eE%]*", re.ASCII)
"""Codes that a spreadsheet takes for a number or a date, and writes in another way: 0007, 1e5, 1-2, +7."""
_TEXT = re.compile(rf"'+(?:{_BEGINNING}|\.?\d)")
_AS_NUMBER = re.compile(r"(-?\d+)[.,]0{1,2}", re.ASCII)
"""An integer as a spreadsheet may write it; three zeros would be of a separator of thousands."""
_NAMES = {"key", "label", "suggested", "decision"}


@dataclass(frozen=True)
class Flagged:
    """A training row whose label the network that never learned it does not share.

    Attributes:
        key: of the row.
        text: of the row.
        label: as it is.
        suggested: what the hidden network predicts.
        probability_of_label: by the hidden network, calibrated.
        probability_of_suggested: likewise.
        self_influence_z: how much of the row was learned by heart, in units of the noise floor;
            ``None`` where the run has no self-influence.
        self_influence_q: adjusted p-value of that, over all training rows.
        influencers: labels of the ten other training rows with the strongest influence on this one,
            in either direction, and how many have them.
    """

    key: str
    text: str
    label: str
    suggested: str
    probability_of_label: float
    probability_of_suggested: float
    self_influence_z: float | None
    self_influence_q: float | None
    influencers: dict[str, int]


def review(run: Run, *, budget: int = 100) -> list[Flagged]:
    """The training rows whose labels are worth a look, the most doubtful first.

    Args:
        budget: at most so many.

    Raises:
        InputError: rows share ids (groups), or a budget below 1.
    """
    if budget < 1:
        raise InputError(f"the budget must be at least 1 row, got {budget}")
    check_rows(run)
    predictions = predict_training(run)
    probabilities, labels = predictions.probabilities, np.array(run.train.labels)
    rows = np.arange(len(labels))
    of_label, predicted = probabilities[rows, labels], probabilities.argmax(axis=1)
    doubtful = np.flatnonzero(predicted != labels)
    chosen = doubtful[np.argsort(of_label[doubtful], kind="stable")][:budget].tolist()
    if not chosen:
        return []
    own = _self_influence(run)
    votes = _influencers(run, chosen)
    classes = run.train.classes
    flagged = []
    for index, row in enumerate(chosen):
        z, q = own.get(int(run.train.ids[row]), (None, None))
        flagged.append(
            Flagged(
                run.train.keys[row],
                run.train.shown(row),
                classes[labels[row]],
                classes[predicted[row]],
                float(of_label[row]),
                float(probabilities[row, predicted[row]]),
                z,
                q,
                votes[index],
            )
        )
    return flagged


def write_review(flagged: list[Flagged], out: Path) -> None:
    """Write the list as CSV, atomically, with an empty column ``decision``."""
    lines = []
    for one in flagged:
        said = ", ".join(f"{count} {label}" for label, count in one.influencers.items())
        z, q = one.self_influence_z, one.self_influence_q
        numbers = [f"{one.probability_of_label:.4f}", f"{one.probability_of_suggested:.4f}"]
        numbers += ["" if z is None else f"{z:.2f}", "" if q is None else f"{q:.3g}"]
        lines.append([one.key, one.label, one.suggested, *numbers, said, "", one.text])
    _write_list(out, lines)


def write_decisions(
    train: Data,
    decisions: Mapping[int, str],
    out: Path,
    self_influence: Mapping[int, tuple[float, float]],
) -> None:
    """Write decisions on training rows in the columns of the list, atomically.

    Args:
        train: the training data.
        decisions: by row; see :func:`read_decisions`.
        self_influence: z and q by instance id, of those that have them. What else the list holds of a
            row takes another pass over the data, and is left empty.
    """
    lines = []
    for row, decision in sorted(decisions.items()):
        own = self_influence.get(int(train.ids[row]))
        numbers = ["", ""] if own is None else [f"{own[0]:.2f}", f"{own[1]:.3g}"]
        label = train.classes[train.labels[row]]
        lines.append([train.keys[row], label, "", "", "", *numbers, "", decision, train.shown(row)])
    _write_list(out, lines)


def _write_list(out: Path, lines: list[list[str]]) -> None:
    """Write a list that is filled in by people, in a spreadsheet that would run a text for a formula."""
    write_csv(out, _COLUMNS, (list(map(_as_text, _COLUMNS, line)) for line in lines))


def _as_text(column: str, cell: str) -> str:
    """A cell that a spreadsheet leaves as it is: before a formula or a code an apostrophe."""
    changed = _FORMULA.match(cell) or (column in _NAMES and _CHANGED.fullmatch(cell))
    return f"'{cell}" if changed else cell


def _meant(cell: str, known: Container[str]) -> str:
    """What was written as a cell, or stands in one that was written by hand or by a spreadsheet."""
    bare = cell[1:] if _TEXT.match(cell) else cell
    number = _AS_NUMBER.fullmatch(cell.strip())
    written = (bare, cell, bare.strip(), cell.strip(), number[1] if number else bare)
    return next((one for one in written if one in known), cell)


def check_decision(written: str, classes: Sequence[str]) -> str:
    """The decision meant by a text: ``keep``, ``remove``, or a class, in upper or lower case.

    Raises:
        InputError: another one, or one that several have the name of.
    """
    known = (KEEP, REMOVE, *classes)
    found = _meant(written, known)
    exact = [one for one in known if one == found]
    meant = exact or [one for one in known if one.casefold() == found.strip().casefold()]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise InputError(
            f"decision {written!r} is the name of several: {KEEP}, {REMOVE} and the classes "
            f"{', '.join(classes)}; rename the class in the data, or change its rows there"
        )
    raise InputError(
        f"unknown decision {written.strip()!r}; use {KEEP}, {REMOVE} or a class: {', '.join(classes)}"
    )


def read_decisions(run: Run, path: Path) -> dict[int, str]:
    """Decisions by training row: ``keep``, ``remove``, or the name of the right class.

    Rows without a decision are not in it.

    Raises:
        InputError: no such file, a missing column, an unknown or repeated key, or another decision.
    """
    decisions: dict[int, str] = {}
    for number, row, written in read_column(run, path, "decision"):
        if not written.strip():
            continue
        try:
            decisions[row] = check_decision(written, run.train.classes)
        except InputError as error:
            raise InputError(f"{path}: line {number}: {error}") from error
    return decisions


def read_column(run: Run, path: Path, column: str) -> Iterator[tuple[int, int, str]]:
    """Line number, training row and value, of a CSV file with the columns key and this one.

    Raises:
        InputError: no such file, a missing column, an unknown or repeated key, or a run with groups.
    """
    check_rows(run)
    row_of = {key: row for row, key in enumerate(run.train.keys)}
    seen: set[int] = set()
    for number, line in read_table(path, ("key", column)):
        key, value = line.get("key"), line.get(column)
        if key is None or value is None:
            raise InputError(f"{path}: line {number} lacks a column: key and {column} are needed")
        row = row_of.get(_meant(key, row_of))
        if row is None:
            close = next((one for one in row_of if one.lstrip("0") == key.strip()), None)
            hint = "" if close is None else f"; {close!r} is one: import the column as text"
            raise InputError(f"{path}: line {number}: no training row has the key {key!r}{hint}")
        if row in seen:
            raise InputError(f"{path}: line {number}: a second {column} of {run.train.keys[row]!r}")
        seen.add(row)
        yield number, row, value


def decided(train: Data, decisions: dict[int, str]) -> Data:
    """The training data after decisions by row."""
    kept = [row for row in range(len(train)) if decisions.get(row) != REMOVE]
    labels = []
    for row in kept:
        decision = decisions.get(row, KEEP)
        labels.append(train.labels[row] if decision == KEEP else train.classes.index(decision))
    return train.take(kept).relabeled(labels)


def apply_decisions(run: Run, decisions: Path, out: Path) -> Counter[str]:
    """Write the training data after the decisions of a file; the ending tells the format.

    Returns:
        How many rows were kept, removed and relabelled.

    Raises:
        InputError: as :func:`read_decisions`, or a format that cannot be written.
    """
    made = read_decisions(run, decisions)
    run.pipeline.export(decided(run.train, made), out)
    own = [run.train.classes[label] for label in run.train.labels]
    counts = Counter({"kept": len(run.train) - len(made), "removed": 0, "relabelled": 0})
    for row, decision in made.items():
        if decision == REMOVE:
            counts["removed"] += 1
        else:
            counts["kept" if decision in (KEEP, own[row]) else "relabelled"] += 1
    return counts


def check_rows(run: Run) -> None:
    """Whether training rows have ids and keys of their own.

    Raises:
        InputError: they share them (groups).
    """
    if len(torch.unique(run.train.ids)) < len(run.train) or len(set(run.train.keys)) < len(
        run.train
    ):
        raise InputError(
            f"{run.folder} has groups, and rows are judged one by one: train with an id column in "
            f"place of the group column"
        )


def _self_influence(run: Run) -> dict[int, tuple[float, float]]:
    if not run.has_result("self"):
        return {}
    check_scored(run)
    result = run.read_result("self")
    return {
        int(one): (float(z), float(q))
        for one, z, q in zip(result.train_ids, result.z, result.q, strict=True)
    }


def _influencers(run: Run, rows: list[int]) -> list[dict[str, int]]:
    """Labels of the strongest influencers of each row, the row itself left out."""
    encoded = run.encode(run.train)
    sites = run.scored_sites()
    influence = Influence(run.network, objectives.margin, "linear", sites=sites, progress=True)
    batches = [encoded.batch(rows[at : at + _BATCH]) for at in range(0, len(rows), _BATCH)]
    result = influence.estimate(batches, run.train.ids)
    first = rows_by_id(result.train_ids, run.train)
    votes = []
    for scores, row in zip(result.scores, rows, strict=True):
        order = np.argsort(-np.abs(scores), kind="stable")
        others = [first[column] for column in order[: _INFLUENCERS + 1] if first[column] != row]
        labels = (run.train.classes[run.train.labels[one]] for one in others[:_INFLUENCERS])
        votes.append(dict(Counter(labels).most_common()))
    return votes
