"""Columns, ids, splits and output tables, for every kind of labeled data."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover.data.classes import check_alike, closest, is_missing
from turnover.data.delimited import TABS, Texts, write_texts
from turnover.data.tables import column_of, table_of
from turnover.dropout.masks import MaskSpec
from turnover.errors import InputError
from turnover.ids import string_ids
from turnover.io.files import replacing
from turnover.io.parsing import UTF8, convert, finite_or_none, read_objects

ENDINGS = (".csv", ".tsv", ".tab", ".json", ".jsonl", ".parquet")
_LARGEST_ID = 2**63 - 1
_INTEGER = re.compile(r"0|-?[1-9]\d{0,18}", re.ASCII)


class Data:
    """Labeled instances of one kind.

    Attributes:
        kind: kind of the instances, and the name of their column: ``"text"``, ``"image"``.
        labels: class index of each instance, into ``classes``.
        ids: int64 (instances,); equal ids form a group.
        keys: the user's name for each instance.
        classes: class names, sorted.
        groups: name of each instance's group; its key where instances have masks of their own.
        provenance: where the instances were read from; ``None``: made in memory, or read from a run.
    """

    kind: ClassVar[str]
    labels: list[int]
    ids: Tensor
    keys: list[str]
    classes: list[str]
    groups: list[str]
    provenance: Provenance | None
    _per_row: ClassVar[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def grouped(self) -> bool:
        """Whether instances share ids."""
        return self.count_groups() is not None

    def count_groups(self) -> int | None:
        """Count groups; ``None`` where every instance has an id of its own."""
        count = len(torch.unique(self.ids))
        return count if count < len(self) else None

    def take(self, rows: Sequence[int]) -> Self:
        """Select rows, in that order."""
        lists = {name: [getattr(self, name)[row] for row in rows] for name in self._per_row}
        taken: Self = replace(self, ids=self.ids[list(rows)], **lists)  # type: ignore[type-var]
        return taken

    def relabeled(self, labels: list[int]) -> Self:
        """Replace the labels; instances and ids stay."""
        relabeled: Self = replace(self, labels=labels)  # type: ignore[type-var]
        return relabeled

    def shown(self, row: int) -> str:
        """Text that represents a row in lists."""
        raise NotImplementedError

    def image(self, row: int) -> NDArray[np.uint8] | None:  # noqa: ARG002
        """Pixels of a row, uint8 (size, size, 3); ``None`` for data that are not images."""
        return None

    def contents(self) -> list[str]:
        """Content of each instance without its label: equal for equal instances."""
        raise NotImplementedError

    def table(self) -> dict[str, list[Any]]:
        """Columns for a file: key, any group, content as :meth:`shown`, and label."""
        shown = [self.shown(row) for row in range(len(self))]
        return self._named({self.kind: shown})

    def _named(self, contents: dict[str, list[Any]]) -> dict[str, list[Any]]:
        groups = {} if self.groups == self.keys else {"group": self.groups}
        labels = [self.classes[label] for label in self.labels]
        return {"key": self.keys, **groups, **contents, "label": labels}

    def export(self, out: Path) -> None:
        """Write the table for the user as CSV, TSV, JSON, JSON lines or Parquet, atomically."""
        check_writable(out)
        with replacing(out) as draft:
            write_columns(draft, out.suffix, self.table())

    def save(self, folder: Path, name: str) -> None:
        """Write the rows into a run's folder as JSON lines with key, id, any group, label and content."""
        with (folder / f"{name}.jsonl").open("w") as file:
            for row, (key, group) in enumerate(zip(self.keys, self.groups, strict=True)):
                label = self.classes[self.labels[row]]
                line = {"key": key, "id": int(self.ids[row]), "label": label}
                line |= {} if group == key else {"group": group}
                file.write(json.dumps(line | self.content(row)) + "\n")

    def content(self, row: int) -> dict[str, str]:
        """Content of a row, as a run's file has it."""
        return {self.kind: self.shown(row)}


@dataclass(frozen=True)
class Row:
    """Row of a run's data as JSON; each kind adds a field for its content."""

    key: str
    id: int
    label: str
    group: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.id <= _LARGEST_ID:
            raise InputError(f"id {self.id} does not fit 63 bits")


_Data = TypeVar("_Data", bound=Data)
_Row = TypeVar("_Row", bound=Row)
Reader = Callable[..., Data]
"""Reads labeled data: ``reader(source, columns, *, classes=None, split="train", ids_needed=True)``."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold the text or image, the label, and any ids, groups or second texts.

    With a group column the rows of a group share one mask, and ids merely name the rows.
    ``encoding`` is that of a CSV, TSV or JSON file.
    """

    input: str = "text"
    label: str = "label"
    id: str | None = None
    group: str | None = None
    second: str | None = None
    encoding: str = UTF8


@dataclass(frozen=True)
class Provenance:
    """Where data were read from: a path, absolute, or the name of a data set; columns and split."""

    source: str
    columns: Columns
    split: str

    @classmethod
    def of(cls, source: str, columns: Columns, split: str) -> Provenance:
        """Note what a reader is given."""
        path = Path(source)
        return cls(str(path.resolve()) if path.exists() else source, columns, split)


def present(names: Sequence[str], columns: Columns, source: str, *, ids_needed: bool) -> Columns:
    """Refuse a table without the columns; an absent id or group column is dropped if not needed."""
    if not ids_needed:
        own = columns.id if columns.id in names else None
        columns = replace(columns, id=own, group=columns.group if columns.group in names else None)
    for column in (columns.input, columns.second, columns.label, columns.id, columns.group):
        if column is not None and column not in names:
            raise InputError(
                f"{source}: no column {column!r}; it has {', '.join(names)}{closest(column, names)}"
            )
    return columns


def check_writable(out: Path, *others: str) -> None:
    """Refuse a path without a folder, or with an ending other than those of tables and ``others``."""
    endings = (*ENDINGS, *others)
    if out.suffix not in endings:
        raise InputError(f"{out}: cannot write that format; use {', '.join(endings)}")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} does not exist: make the folder first")


def write_columns(
    path: Path, ending: str, columns: dict[str, list[Any]], encoding: str = UTF8
) -> None:
    """Write columns in the format of an ending (:func:`check_writable`).

    Raises:
        InputError: values that the format or the encoding does not take.
    """
    try:
        if ending == ".parquet":
            table_of(columns).to_parquet(str(path))
        elif ending in (".json", ".jsonl"):
            how: dict[str, Any] = {"ensure_ascii": encoding != UTF8, "default": str}
            plain = [
                [finite_or_none(one) if isinstance(one, float) else one for one in values]
                for values in columns.values()
            ]
            rows = [dict(zip(columns, row, strict=True)) for row in zip(*plain, strict=True)]
            lines = (f"{json.dumps(row, **how)}\n" for row in rows)
            text = "".join(lines) if ending == ".jsonl" else json.dumps(rows, **how, indent=2)
            path.write_text(text, encoding)
        else:
            write_texts(path, columns, tabs=ending in TABS, encoding=encoding)
    except (ValueError, TypeError) as error:
        raise InputError(
            f"the columns cannot be written as {ending} ({error}); write the format they were read from"
        ) from error


@dataclass(frozen=True)
class Names:
    """What a table calls its rows.

    Attributes:
        keys: of the rows; ``None`` without an id column.
        groups: of the rows; ``None`` without a group column.
        ids: int64 (rows,), of the groups, or else of the rows; ``None`` without either column.
    """

    keys: list[str] | None = None
    groups: list[str] | None = None
    ids: Tensor | None = None


def names_of(table: Any, columns: Columns, source: str) -> Names:
    """Read the id and the group column."""
    keys = groups = ids = None
    if columns.id is not None:
        keys, ids = _named(table, columns.id, source, unique=True)
    if columns.group is not None:
        groups, ids = _named(table, columns.group, source, unique=False)
    return Names(keys, groups, ids)


def _named(table: Any, column: str, source: str, *, unique: bool) -> tuple[list[str], Tensor]:
    """Read names (rows,) of rows, or of groups, and their ids, int64 (rows,)."""
    values = column_of(table, column, source)
    for row, value in enumerate(values):
        if is_missing(value) or isinstance(value, list | dict):
            raise InputError(f"{source}: row {row + 1} has no id in column {column!r}")
    if isinstance(table, Texts):
        values = _integers(values) or values
    keys = [str(value) for value in values]
    if unique:
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            raise InputError(
                f"{source}: duplicate ids in column {column!r}: {', '.join(twice[:5])}; ids name one "
                f"row each (rows that share a mask belong to a group column)"
            )
    _check_spelling(keys, column, source, unique=unique)
    integers = [isinstance(value, int) and not isinstance(value, bool) for value in values]
    if not any(integers):
        return keys, string_ids(keys)
    if not all(integers):
        raise InputError(f"{source}: column {column!r} mixes integers and strings as ids")
    if min(values) < 0:
        raise InputError(
            f"{source}: id {min(values)} in column {column!r} is negative; ids must be >= 0: negative "
            f"ones are ghosts, which are never trained on"
        )
    if max(values) > _LARGEST_ID:
        raise InputError(
            f"{source}: id {max(values)} in column {column!r} does not fit 64 signed bits; write ids as "
            f"texts"
        )
    return keys, torch.tensor(values, dtype=torch.int64)


def _integers(cells: Sequence[str]) -> list[int] | None:
    """Parse a CSV file's ids if each is an integer as Python writes it, and fits an id."""
    if not all(_INTEGER.fullmatch(cell) for cell in cells):
        return None
    values = [int(cell) for cell in cells]
    return values if max(values) <= _LARGEST_ID else None


def _check_spelling(keys: Sequence[str], column: str, source: str, *, unique: bool) -> None:
    """Refuse ids or groups that look like two spellings of one."""
    known = set(keys)
    if not unique:
        check_alike(known, source, f"groups of column {column!r}")
        return
    for key in known:
        bare = key.strip()
        if bare != key and bare in known:
            raise InputError(
                f"{source}: the ids {bare!r} and {key!r} in column {column!r} differ in blanks alone; "
                f"ids name one row each"
            )


def read_both(
    reader: Callable[..., _Data],
    data: str,
    test: str | None,
    columns: Columns,
    split: str,
    test_split: str,
) -> tuple[_Data, _Data]:
    """Read training and test data; without ``test`` a part of the data is held out."""
    train_data = reader(data, columns=columns, split=split)
    if test is None:
        return hold_out(train_data)
    test_data = reader(
        test, columns=columns, classes=train_data.classes, split=test_split, ids_needed=False
    )
    return train_data, test_data


def hold_out(data: _Data, share: float = 0.2) -> tuple[_Data, _Data]:
    """Split data into a training and a test part by hashes of the ids; refuse too few rows.

    Rows of one group stay together, and re-sorting the data changes nothing.
    """
    bits = MaskSpec(balanced=False).exposed(data.ids, "hold-out", 64)  # independent of its masks
    weights = 2.0 ** -torch.arange(1, 65, dtype=torch.float64)
    held = (bits.double() @ weights < share).tolist()
    train_data, test_data = (
        data.take([row for row, test in enumerate(held) if test == wanted])
        for wanted in (False, True)
    )
    if len(set(train_data.labels)) < len(data.classes) or not len(test_data):
        groups = data.count_groups()
        few = f"{len(data)} rows" + ("" if groups is None else f" in {groups} groups")
        raise InputError(
            f"{few} are too few to hold a fifth out for testing, with every class in the rest; pass test "
            f"data (--test)"
        )
    return train_data, test_data


def read_rows(
    path: Path, classes: Sequence[str], kind: type[_Row]
) -> tuple[list[_Row], list[int], torch.Tensor, list[str], list[str]]:
    """Read rows, their labels (indices into the run's classes), ids, keys and groups."""
    index = {name: position for position, name in enumerate(classes)}
    rows = []
    for number, values in enumerate(read_objects(path, own=True), start=1):
        rows.append(convert(values, kind, where := f"{path}: line {number}"))
        if rows[-1].label not in index:
            raise InputError(f"{where}: damaged, {rows[-1].label!r} is not a class of the run")
    if not rows:
        raise InputError(f"{path}: missing or damaged (no rows)")
    ids = torch.tensor([row.id for row in rows], dtype=torch.int64)
    groups = [row.key if row.group is None else row.group for row in rows]
    return rows, [index[row.label] for row in rows], ids, [row.key for row in rows], groups
