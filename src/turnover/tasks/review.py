"""Review of labels: a list of doubtful rows, and the data set after the decisions on them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from turnover import objectives
from turnover.data.base import Data
from turnover.data.delimited import read_table
from turnover.errors import InputError
from turnover.influence.estimator import Influence
from turnover.io.files import write_csv
from turnover.runs.run import Run
from turnover.runs.source import write_changed
from turnover.runs.targets import check_scored
from turnover.tasks.explain import described, rows_by_id
from turnover.tasks.label_errors import Doubts, check_rows, doubts
from turnover.tasks.score_trained import fitted

KEEP, REMOVE = "keep", "remove"
_INFLUENCERS = 10
_BATCH = 32
_FORMATS = {
    **dict.fromkeys(("key", "label", "suggested"), ""),
    **dict.fromkeys(("probability_wrong", "probability_of_suggested"), ".4f"),
    "self_influence_z": ".2f",
    "self_influence_q": ".3g",
    **dict.fromkeys(("influencers", "decision", "text"), ""),
}
"""Columns of the list, and the format of each."""
_BEGINNING = r"[=+\-@\t\r\n]"
_FORMULA = re.compile(rf"'*{_BEGINNING}(?![0-9.]+$)")
_CODE = re.compile(r"'*(?!(?:0|-?[1-9]\d{0,14})\Z)[=+\-]?\.?\d[\d.,:/+\- eE%]*", re.ASCII)
"""Codes that a spreadsheet reads as a number or a date, and writes differently: 0007, 1e5, 1-2, +7."""
_ESCAPED = re.compile(rf"'+(?:{_BEGINNING}|\.?\d)")
_INTEGER = re.compile(r"(-?\d+)[.,]0{1,2}", re.ASCII)
"""An integer as a spreadsheet may write it; three zeros would follow a thousands separator."""
_UNKNOWN = (None, None)
_NAMES = {"key", "label", "suggested", "decision"}


@dataclass(frozen=True)
class Flagged:
    """A training row whose label is doubtful.

    Attributes:
        key: of the row.
        text: of the row.
        label: of the row.
        suggested: the most probable other class.
        probability_wrong: that the label is wrong.
        probability_of_suggested: that this class is the right one.
        self_influence_z: memorization of the row, in units of the noise floor; ``None`` where the run has
            no self-influence.
        self_influence_q: adjusted p-value of that, over all training rows.
        influencers: labels of the ten other training rows with the strongest influence on this one, in
            either direction, with their counts.
    """

    key: str
    text: str
    label: str
    suggested: str
    probability_wrong: float
    probability_of_suggested: float
    self_influence_z: float | None
    self_influence_q: float | None
    influencers: dict[str, int]


@dataclass(frozen=True)
class Review:
    """The most doubtful rows first, and what is thought of all.

    Attributes:
        rows: as many as asked for.
        expected: expected number of wrong labels among all training rows.
        likely: number of rows whose labels are more probably wrong than right.
        source: predictions that this is by (:class:`~turnover.tasks.label_errors.Doubts`).
    """

    rows: list[Flagged]
    expected: float
    likely: int
    source: str


def review(run: Run, *, budget: int = 100) -> Review:
    """Rank all training rows by the probability that their label is wrong, and list the first.

    Args:
        run: a run whose training rows have keys of their own.
        budget: most rows to list.

    Raises:
        InputError: a budget below 1, or as :func:`~turnover.tasks.label_errors.doubts`.
    """
    if budget < 1:
        raise InputError(f"the budget must be at least 1 row, got {budget}")
    return listed(run, doubts(run), budget)


def listed(run: Run, found: Doubts, budget: int) -> Review:
    """List the most doubtful rows, at most ``budget``."""
    train, errors = run.train, found.errors
    chosen = errors.order()[:budget].tolist()
    own = _self_influence(run)
    numbers = [own.get(int(train.ids[row]), _UNKNOWN) for row in chosen]
    suggested, wrong = errors.suggested, errors.probability
    rows = [
        Flagged(
            train.keys[row],
            train.shown(row),
            train.classes[train.labels[row]],
            train.classes[suggested[row]],
            float(wrong[row]),
            float(errors.posterior[row, suggested[row]]),
            z,
            q,
            influencers,
        )
        for row, (z, q), influencers in zip(chosen, numbers, _influencers(run, chosen), strict=True)
    ]
    return Review(rows, errors.expected, errors.likely, found.described())


def write_review(
    flagged: list[Flagged], out: Path, decisions: Mapping[str, str] | None = None
) -> None:
    """Write the list as CSV, atomically, with a column ``decision``: those by key, or empty."""
    rows = []
    for one in flagged:
        said = ", ".join(f"{count} {label}" for label, count in one.influencers.items())
        decision = (decisions or {}).get(one.key)
        rows.append({**asdict(one), "influencers": said, "decision": decision})
    write_list(out, rows, _FORMATS)


def check_undecided(path: Path) -> None:
    """Refuse to overwrite a list with decisions."""
    if not path.exists():
        return
    try:
        decided = [one for _, one in read_table(path, ("key", "decision")) if one.get("decision")]
    except InputError as error:
        if _is_another(path):  # which is replaced
            return
        raise InputError(
            f"{path} may hold decisions, and cannot be read ({error}): move it, or name another file with "
            f"--out"
        ) from error
    if decided:
        raise InputError(
            f"{path} has decisions on {len(decided)} rows, and a new list would overwrite them: apply them "
            f"with --decisions, or name another file with --out"
        )


def _is_another(path: Path) -> bool:
    """Whether a file is a table without decisions."""
    try:
        names = {name for _, line in read_table(path) for name in line}
    except InputError:
        return False
    return not any("decision" in name for name in names)


def write_decisions(
    train: Data,
    decisions: Mapping[int, str],
    out: Path,
    self_influence: Mapping[int, tuple[float, float]],
) -> None:
    """Write decisions by row in the columns of the list, atomically, with z and q by instance id.

    The other numbers of the list would take another pass over the data; their columns are empty.
    """
    rows = []
    for row, decision in sorted(decisions.items()):
        key, label, text = described(train, row)
        z, q = self_influence.get(int(train.ids[row]), _UNKNOWN)
        rows.append(
            {"key": key, "label": label, "decision": decision, "text": text}
            | {"self_influence_z": z, "self_influence_q": q}
        )
    write_list(out, rows, _FORMATS)


def write_list(out: Path, rows: Iterable[Mapping[str, Any]], formats: Mapping[str, str]) -> None:
    """Write a list that people fill in, in a spreadsheet that would run a text as a formula.

    Args:
        out: CSV file.
        rows: values by column; ``None`` and missing ones are empty cells.
        formats: the columns, and the format of each.
    """

    def cell(name: str, value: Any) -> str:
        return "" if value is None else _as_text(name, format(value, formats[name]))

    lines = ([cell(name, row.get(name)) for name in formats] for row in rows)
    write_csv(out, list(formats), lines)


def _as_text(column: str, cell: str) -> str:
    """Put an apostrophe before a formula or a code, so that a spreadsheet does not change it."""
    changed = _FORMULA.match(cell) or (column in _NAMES and _CODE.fullmatch(cell))
    return f"'{cell}" if changed else cell


def matching(cell: str, known: Container[str]) -> str:
    """Undo :func:`_as_text`, or the changes of a spreadsheet or of writing by hand."""
    bare = cell[1:] if _ESCAPED.match(cell) else cell
    number = _INTEGER.fullmatch(cell.strip())
    written = (bare, cell, bare.strip(), cell.strip(), number[1] if number else bare)
    return next((one for one in written if one in known), cell)


def check_decision(written: str, classes: Sequence[str]) -> str:
    """Find the decision that a text means: ``keep``, ``remove``, or a class, in upper or lower case."""
    known = (KEEP, REMOVE, *classes)
    found = matching(written, known)
    exact = [one for one in known if one == found]
    meant = exact or [one for one in known if one.casefold() == found.strip().casefold()]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise InputError(
            f"decision {written!r} is ambiguous among {KEEP}, {REMOVE} and the classes "
            f"{', '.join(classes)}; rename the class in the data, or change its rows there"
        )
    raise InputError(
        f"unknown decision {written.strip()!r}; use {KEEP}, {REMOVE} or a class: {', '.join(classes)}"
    )


def read_decisions(run: Run, path: Path) -> dict[int, str]:
    """Read decisions by training row: ``keep``, ``remove``, or the name of the right class.

    Rows without a decision are left out.
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
    """Read line numbers, training rows and values from a CSV file with the columns key and this one."""
    check_rows(run)
    row_of = {key: row for row, key in enumerate(run.train.keys)}
    seen: set[int] = set()
    for number, line in read_table(path, ("key", column)):
        key, value = line.get("key"), line.get(column)
        if key is None or value is None:
            raise InputError(f"{path}: line {number} lacks a column: key and {column} are needed")
        row = row_of.get(matching(key, row_of))
        if row is None:
            close = next((one for one in row_of if one.lstrip("0") == key.strip()), None)
            hint = "" if close is None else f"; did you mean {close!r}? Import the column as text"
            raise InputError(f"{path}: line {number}: no training row has the key {key!r}{hint}")
        if row in seen:
            raise InputError(f"{path}: line {number}: a second {column} of {run.train.keys[row]!r}")
        seen.add(row)
        yield number, row, value


def decided(train: Data, decisions: Mapping[int, str]) -> Data:
    """Apply decisions by row to the training data."""
    kept = [row for row in range(len(train)) if decisions.get(row) != REMOVE]
    made = ((row, decisions.get(row, KEEP)) for row in kept)
    labels = [train.labels[row] if one == KEEP else train.classes.index(one) for row, one in made]
    return train.take(kept).relabeled(labels)


def apply_decisions(run: Run, decisions: Path, out: Path) -> Counter[str]:
    """Write the training file after the decisions of another; the ending sets the format.

    As :func:`~turnover.runs.source.write_changed`: all else in the file stays as it was.

    Args:
        run: a run whose training rows have keys of their own.
        decisions: CSV file with the columns key and decision.
        out: file to write.

    Returns:
        Numbers of rows kept, removed and relabelled, and of any ``unchanged_test_rows`` in the file.

    Raises:
        InputError: as :func:`read_decisions`, or a format that cannot be written.
    """
    return write_decided(run, read_decisions(run, decisions), out)


def write_decided(run: Run, made: Mapping[int, str], out: Path) -> Counter[str]:
    """Write the training file after decisions by row, and count rows as :func:`apply_decisions` does."""
    train = run.train
    removed = [row for row, decision in made.items() if decision == REMOVE]
    labels = {
        row: train.classes.index(decision)
        for row, decision in made.items()
        if decision not in (KEEP, REMOVE, train.classes[train.labels[row]])
    }
    unchanged = write_changed(run, labels, removed, out)
    kept = len(train) - len(removed) - len(labels)
    counts = Counter({"kept": kept, "removed": len(removed), "relabelled": len(labels)})
    if unchanged:
        counts["unchanged_test_rows"] = unchanged
    return counts


def _self_influence(run: Run) -> dict[int, tuple[float, float]]:
    if not run.has_result("self"):
        return {}
    check_scored(run)
    result = run.read_result("self")
    numbers = zip(result.z.tolist(), result.q.tolist(), strict=True)
    return dict(zip(result.train_ids.tolist(), numbers, strict=True))


def _influencers(run: Run, rows: list[int]) -> list[dict[str, int]]:
    """Count the labels of the strongest influencers of each row, without the row itself.

    By gram where masks are not those of single rows.
    """
    if not rows:
        return []
    encoded = run.encode(run.train)
    batches = [encoded.batch(rows[at : at + _BATCH]) for at in range(0, len(rows), _BATCH)]
    if run.masks is None or run.train.grouped:
        result = fitted(run, encoded, objectives.margin).estimate(batches)
        of = result.train_ids.tolist()  # row numbers
    else:
        sites = run.scored_sites()
        influence = Influence(run.masks, objectives.margin, "linear", sites=sites, progress=True)
        result = influence.estimate(batches, run.train.ids)
        of = rows_by_id(result.train_ids, run.train)
    votes = []
    for scores, row in zip(result.scores, rows, strict=True):
        order = np.argsort(-np.abs(scores), kind="stable")
        others = [of[column] for column in order[: _INFLUENCERS + 1] if of[column] != row]
        labels = (run.train.classes[run.train.labels[one]] for one in others[:_INFLUENCERS])
        votes.append(dict(Counter(labels).most_common()))
    return votes
