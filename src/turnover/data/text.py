"""Labeled texts: read from files or Hugging Face data sets, checked, and encoded as tokens.

Nothing is repaired or dropped silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.data.base import Columns, Data, Row, keys_and_ids, present
from turnover.data.classes import indexed, label_names
from turnover.data.encoded import EVALUATION_ROWS, Encoded
from turnover.data.tables import column_of, load_table
from turnover.errors import InputError
from turnover.ids import content_ids

_SORTED_BATCHES = 16


@dataclass(frozen=True)
class TextData(Data):
    """Labeled texts.

    Attributes:
        texts: one string per instance.
        labels: class index of each, into ``classes``.
        ids: int64 (instances,); equal ids form a group.
        keys: the user's name for each instance: its id or group, or a row number.
        classes: class names, sorted.
    """

    kind: ClassVar[str] = "text"
    texts: list[str]
    labels: list[int]
    ids: Tensor
    keys: list[str]
    classes: list[str]

    _per_row: ClassVar[tuple[str, ...]] = ("texts", "labels", "keys")

    def shown(self, row: int) -> str:
        """Text of a row."""
        return self.texts[row]

    def contents(self) -> list[str]:
        """The texts."""
        return self.texts


@dataclass(frozen=True)
class TextRow(Row):
    """A row of a run's texts."""

    text: str


@dataclass(frozen=True)
class Tokens(Encoded):
    """Tokenized texts: token ids, class indices, int64 instance ids (rows,) and the padding token."""

    tokens: list[list[int]]
    labels: list[int]
    ids: Tensor
    padding: int

    def batch(self, rows: Sequence[int]) -> Batch:
        """Some rows, padded: int64 ``input_ids`` and ``attention_mask`` (rows, tokens)."""
        texts = [self.tokens[row] for row in rows]
        width = max(len(text) for text in texts)
        input_ids = torch.full((len(texts), width), self.padding)
        attention_mask = torch.zeros((len(texts), width), dtype=torch.int64)
        for index, text in enumerate(texts):
            input_ids[index, : len(text)] = torch.tensor(text)
            attention_mask[index, : len(text)] = 1
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return Batch(inputs, torch.tensor([self.labels[row] for row in rows]), self.ids[list(rows)])

    def chunks(self, rows: Sequence[int], size: int = EVALUATION_ROWS) -> list[list[int]]:
        """Groups of rows of similar length, so that little of a batch is padding."""
        ordered = sorted(rows, key=lambda row: len(self.tokens[row]))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def shuffled(self, size: int, generator: torch.Generator) -> list[list[int]]:
        """Random rows, of similar length within a batch, in random order."""
        order: list[int] = torch.randperm(len(self), generator=generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), size * _SORTED_BATCHES):
            batches += self.chunks(order[start : start + size * _SORTED_BATCHES], size)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def described(self) -> str:
        """Tokens, labels and ids."""
        return repr([self.tokens, self.labels, self.ids.tolist()])


def read(
    source: str,
    columns: Columns,
    *,
    classes: Sequence[str] | None = None,
    split: str = "train",
    ids_needed: bool = True,
) -> TextData:
    """Read labeled texts.

    Args:
        source: a CSV, TSV (also gzip), JSON, JSONL or Parquet file, the name of a Hugging Face data set, or
            a folder that holds one: written by ``save_to_disk``, or with a file for each split.
        columns: columns to read.
        classes: classes of the training data, to refuse others; ``None`` takes them from the labels.
        split: split of a Hugging Face data set.
        ids_needed: require the id or group column; test data, which are not trained on, are numbered
            without it.

    Raises:
        InputError: no such file, another format, no rows, a missing column (those that exist are listed), a
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
            held = ""
            if text is not None and not isinstance(text, str):
                held = f", but {str(text)[:50]!r} of the type {type(text).__name__}: write it as a text"
            raise InputError(
                f"{source}: row {row + 1} has no text in column {columns.input!r}{held}"
            )
    names = label_names(table, columns.label, source, classes)
    labels, known = indexed(names, classes, source, f"column {columns.label!r}")
    keys, ids = keys_and_ids(table, columns, source) or (
        [str(row + 1) for row in range(len(texts))],
        content_ids(f"{text}\0{name}" for text, name in zip(texts, names, strict=True)),
    )
    return TextData(texts, labels, ids, keys, known)
