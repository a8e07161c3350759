"""Labelled data: what training and tasks need of it, and texts from files or Hugging Face data sets.

Reading and checking only; nothing is repaired or dropped in silence.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from turnover.errors import InputError
from turnover.files import replacing
from turnover.masks import MaskSpec, content_ids, string_ids
from turnover.tables import column_of, load_table, table_of

_WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("to_csv", {"index": False}),
    ".tsv": ("to_csv", {"index": False, "sep": "\t"}),
    ".jsonl": ("to_json", {"force_ascii": False}),
    ".parquet": ("to_parquet", {}),
}
_MISSING = (None, "")
_LARGEST_ID = 2**63 - 1


class Data(Protocol):
    """Labelled instances, texts or images."""

    @property
    def labels(self) -> list[int]:
        """Class index of each, into ``classes``."""

    @property
    def ids(self) -> Tensor:
        """int64 (instances,); equal ids form a group."""

    @property
    def keys(self) -> list[str]:
        """What the user calls each instance."""

    @property
    def classes(self) -> list[str]:
        """Class names, sorted."""

    def __len__(self) -> int: ...

    def take(self, rows: Sequence[int]) -> Self:
        """The rows, in that order."""

    def relabelled(self, labels: list[int]) -> Self:
        """The same instances, and ids, with other labels."""

    def shown(self, row: int) -> str:
        """What a list shows for a row."""

    def table(self) -> dict[str, list[Any]]:
        """Columns for a file: key, label, and what the instances are."""

    def contents(self) -> list[str]:
        """What each instance is, labels apart: equal where two are the same."""


_Data = TypeVar("_Data", bound=Data)


@dataclass(frozen=True)
class TextData:
    """Labelled texts.

    Attributes:
        texts: one string per instance.
        labels: class index of each, into ``classes``.
        ids: int64 (instances,); equal ids form a group.
        keys: what the user calls each instance: its id or group column, or a row number.
        classes: class names, sorted.
    """

    texts: list[str]
    labels: list[int]
    ids: Tensor
    keys: list[str]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Sequence[int]) -> TextData:
        """The rows, in that order."""
        return TextData(
            [self.texts[row] for row in rows],
            [self.labels[row] for row in rows],
            self.ids[list(rows)],
            [self.keys[row] for row in rows],
            self.classes,
        )

    def relabelled(self, labels: list[int]) -> TextData:
        """The same texts with other labels."""
        return replace(self, labels=labels)

    def shown(self, row: int) -> str:
        """What a list shows for a row: its text."""
        return self.texts[row]

    def contents(self) -> list[str]:
        """The texts."""
        return self.texts

    def table(self) -> dict[str, list[Any]]:
        """Key, text and label."""
        labels = [self.classes[label] for label in self.labels]
        return {"key": self.keys, "text": self.texts, "label": labels}


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold the text or image, the label, and (optionally) ids or groups."""

    input: str = "text"
    label: str = "label"
    id: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if self.id is not None and self.group is not None:
            raise InputError("give an id column or a group column, not both: each row has one mask")


def read(
    source: str,
    columns: Columns,
    *,
    classes: Sequence[str] | None = None,
    split: str = "train",
    ids_needed: bool = True,
) -> TextData:
    """Read labelled texts.

    Args:
        source: a CSV, TSV, JSON, JSONL or Parquet file, or the name of a Hugging Face data set.
        columns: which columns to read.
        classes: the classes of the training data, for data that must not have others; ``None`` takes
            them from the labels.
        split: split of a Hugging Face data set.
        ids_needed: whether the id or group column must be there; test data, which are not trained on,
            are numbered without it.

    Raises:
        InputError: no such file, another format, no rows, a missing column (with those there are), a
            missing value, duplicate ids, an unknown label, fewer than two classes, or a label column
            that is a regression or multi-label target.
    """
    table = load_table(source, split)
    columns = present(table.column_names, columns, source, ids_needed=ids_needed)
    if not len(table):
        raise InputError(f"{source}: the file has no rows")
    texts = column_of(table, columns.input, source)
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{source}: row {row + 1} has no text in column {columns.input!r}")
    names = label_names(table, columns.label, source)
    labels, known = indexed(names, classes, source, f"column {columns.label!r}")
    keys, ids = keys_and_ids(table, columns, source) or (
        [str(row + 1) for row in range(len(texts))],
        content_ids(f"{text}\0{name}" for text, name in zip(texts, names, strict=True)),
    )
    return TextData(texts, labels, ids, keys, known)


def present(names: Sequence[str], columns: Columns, source: str, *, ids_needed: bool) -> Columns:
    """The columns that are read: an id or group column that is absent and not needed is not.

    Raises:
        InputError: a missing column (with those there are).
    """
    if not ids_needed and {columns.id, columns.group}.isdisjoint(names):
        columns = Columns(columns.input, columns.label)
    for column in (columns.input, columns.label, columns.id, columns.group):
        if column is not None and column not in names:
            close = difflib.get_close_matches(column, names, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise InputError(f"{source}: no column {column!r}; it has {', '.join(names)}{hint}")
    return columns


def indexed(
    names: Sequence[str], classes: Sequence[str] | None, source: str, where: str
) -> tuple[list[int], list[str]]:
    """Class index of each label, and the classes.

    Args:
        names: the labels.
        classes: those there may be; ``None`` takes them from the labels.
        source: what the labels are of, for messages.
        where: where in it they stand, likewise.

    Raises:
        InputError: an unknown label, or fewer than two classes.
    """
    known = list(classes) if classes is not None else _sorted_classes(names)
    index = {name: position for position, name in enumerate(known)}
    for row, name in enumerate(names):
        if name not in index:
            raise InputError(
                f"{source}: unknown label {name!r} in row {row + 1}; the classes are "
                f"{', '.join(known)}"
            )
    if len(known) < 2:
        raise InputError(
            f"{source}: {where} holds the one class {known[0]!r}; a classifier needs two or more"
        )
    return [index[name] for name in names], known


def write(data: Data, out: Path) -> None:
    """Write key, text (or image file) and label of every row as CSV, TSV, JSON lines or Parquet, atomically.

    Raises:
        InputError: another ending, or a folder that does not exist.
    """
    check_writable(out)
    table = table_of(data.table())
    method, options = _WRITERS[out.suffix]
    with replacing(out) as draft:
        getattr(table, method)(str(draft), **options)


def check_writable(out: Path, *others: str) -> None:
    """Whether :func:`write` can write there, or what writes ``others``, endings of other formats.

    Raises:
        InputError: another ending, or a folder that does not exist.
    """
    endings = (*_WRITERS, *others)
    if out.suffix not in endings:
        raise InputError(f"{out}: cannot write that format; use {', '.join(endings)}")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} does not exist: make the folder first")


def label_names(table: Any, column: str, source: str) -> list[str]:
    """The labels of a table as class names.

    Raises:
        InputError: missing ones, or a regression or multi-label target.
    """
    feature = table.features[column]
    values = column_of(table, column, source)
    if hasattr(feature, "int2str"):
        return _names_of_indexes(feature.names, values, column, source)
    if any(isinstance(value, str) for value in values):
        other = next((v for v in values if isinstance(v, bool | int | float)), None)
        if other is not None:
            raise InputError(
                f"{source}: column {column!r} mixes texts and numbers such as {other} as labels; write all "
                f"of them as texts"
            )
    names = []
    for row, value in enumerate(values):
        if isinstance(value, list | dict | tuple):
            raise InputError(
                f"{source}: column {column!r} holds lists, a multi-label target, which is not "
                f"supported: give one class per row"
            )
        if value in _MISSING or (isinstance(value, float) and math.isnan(value)):
            raise InputError(f"{source}: row {row + 1} has no label in column {column!r}")
        if isinstance(value, float) and not value.is_integer():
            raise InputError(
                f"{source}: column {column!r} holds real numbers such as {value}, a regression target, "
                f"which is not supported: give one class per row"
            )
        names.append(str(int(value)) if isinstance(value, float) else str(value))
    return names


def _names_of_indexes(
    classes: Sequence[str], values: Sequence[Any], column: str, source: str
) -> list[str]:
    for row, value in enumerate(values):
        if not isinstance(value, int) or not 0 <= value < len(classes):
            raise InputError(
                f"{source}: row {row + 1} has no label in column {column!r}: {value} is none of its "
                f"{len(classes)} classes"
            )
    return [classes[value] for value in values]


def _sorted_classes(names: Sequence[str]) -> list[str]:
    distinct = set(names)
    if all(name.lstrip("-").isdigit() for name in distinct):
        return sorted(distinct, key=int)
    return sorted(distinct)


def keys_and_ids(table: Any, columns: Columns, source: str) -> tuple[list[str], Tensor] | None:
    """What the id or group column calls each row, and int64 ids (rows,); ``None`` without one.

    Raises:
        InputError: missing, repeated, negative or mixed ids.
    """
    column = columns.id or columns.group
    if column is None:
        return None
    values = column_of(table, column, source)
    for row, value in enumerate(values):
        if value in _MISSING or isinstance(value, list | dict):
            raise InputError(f"{source}: row {row + 1} has no id in column {column!r}")
    keys = [str(value) for value in values]
    if columns.id is not None:
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            raise InputError(
                f"{source}: duplicate ids in column {column!r}: {', '.join(twice[:5])}; ids name one "
                f"row each (rows that are to share a mask belong to a group column)"
            )
    integers = [isinstance(value, int) and not isinstance(value, bool) for value in values]
    if all(integers):
        if min(values) < 0:
            raise InputError(
                f"{source}: id {min(values)} in column {column!r} is negative; ids must be >= 0, "
                f"because negative ones are ghosts, which are never trained on"
            )
        if max(values) > _LARGEST_ID:
            raise InputError(
                f"{source}: id {max(values)} in column {column!r} does not fit 64 signed bits; write ids as "
                f"texts"
            )
        return keys, torch.tensor(values, dtype=torch.int64)
    if any(integers):
        raise InputError(f"{source}: column {column!r} mixes integers and strings as ids")
    return keys, string_ids(keys)


def read_both(
    reader: Callable[..., _Data],
    data: str,
    test: str | None,
    columns: Columns,
    split: str,
    test_split: str,
) -> tuple[_Data, _Data]:
    """Training and test data; without ``test`` a part of the data is held out.

    Args:
        reader: :func:`read`, or :func:`~turnover.images.read_images` of a size.

    Raises:
        InputError: as the reader and :func:`hold_out`.
    """
    train_data = reader(data, columns=columns, split=split)
    if test is None:
        return hold_out(train_data)
    test_data = reader(
        test, columns=columns, classes=train_data.classes, split=test_split, ids_needed=False
    )
    return train_data, test_data


def hold_out(data: _Data, share: float = 0.2) -> tuple[_Data, _Data]:
    """Training and test part of data that came without test data; which is which follows the ids.

    Rows of one group stay together, and re-sorting the data changes nothing.

    Raises:
        InputError: too few rows for both parts to hold every class.
    """
    order = MaskSpec(balanced=False).exposed(data.ids, "hold-out", 64)  # nothing of its mask
    weights = 2.0 ** -torch.arange(1, 65, dtype=torch.float64)
    chosen = (order.double() @ weights < share).tolist()
    parts = []
    for wanted in (False, True):
        rows = [row for row, test in enumerate(chosen) if test == wanted]
        parts.append(data.take(rows))
    if len(set(parts[0].labels)) < len(data.classes) or not len(parts[1]):
        raise InputError(
            f"{len(data)} rows are too few to hold a fifth out for testing; pass test data (--test)"
        )
    return parts[0], parts[1]
