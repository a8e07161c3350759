"""Labelled data: what training and tasks need of it, and texts from files or Hugging Face data sets.

Reading and checking only; nothing is repaired or dropped in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from turnover.data.base import Columns, keys_and_ids, present
from turnover.data.classes import indexed, label_names
from turnover.data.tables import column_of, load_table
from turnover.errors import InputError
from turnover.ids import content_ids


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

    kind: ClassVar[str] = "text"
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

    def picture(self, row: int) -> None:
        """No picture."""

    def contents(self) -> list[str]:
        """The texts."""
        return self.texts

    def table(self) -> dict[str, list[Any]]:
        """Key, text and label."""
        labels = [self.classes[label] for label in self.labels]
        return {"key": self.keys, "text": self.texts, "label": labels}


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
        source: a CSV, TSV (also gzip), JSON, JSONL or Parquet file, the name of a Hugging Face data set, or
            a folder that holds one: written by ``save_to_disk``, or with a file for each split.
        columns: which columns to read.
        classes: the classes of the training data, for data that must not have others; ``None`` takes
            them from the labels.
        split: split of a Hugging Face data set.
        ids_needed: whether the id or group column must be there; test data, which are not trained on,
            are numbered without it.

    Raises:
        InputError: no such file, another format, no rows, a missing column (with those there are), a
            missing value, a row that cannot be read, duplicate ids, an unknown label, fewer than two
            classes, two that differ in blanks alone, or a label column that is a regression or multi-label
            target.
    """
    needed = (columns.input, columns.label)
    wanted = [name for name in (columns.id, columns.group) if name is not None]
    table = load_table(source, split, needed, wanted)
    columns = present(table.column_names, columns, source, ids_needed=ids_needed)
    if not len(table):
        raise InputError(f"{source}: the file has no rows")
    texts = column_of(table, columns.input, source)
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            found = "" if isinstance(text, str) or text is None else f", but {str(text)[:50]!r}"
            mend = f" of the type {type(text).__name__}: write it as a text" if found else ""
            raise InputError(
                f"{source}: row {row + 1} has no text in column {columns.input!r}{found}{mend}"
            )
    names = label_names(table, columns.label, source, classes)
    labels, known = indexed(names, classes, source, f"column {columns.label!r}")
    keys, ids = keys_and_ids(table, columns, source) or (
        [str(row + 1) for row in range(len(texts))],
        content_ids(f"{text}\0{name}" for text, name in zip(texts, names, strict=True)),
    )
    return TextData(texts, labels, ids, keys, known)
