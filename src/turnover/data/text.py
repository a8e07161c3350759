"""Labeled texts: read from files or Hugging Face data sets, checked, and encoded as tokens.

Nothing is repaired or dropped silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.data.base import Columns, Data, Provenance, Row, names_of, present
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
        keys: the user's name for each instance: its id, or a row number.
        classes: class names, sorted.
        groups: name of each instance's group; by default its key.
        provenance: where the texts were read from; ``None``: made in memory, or read from a run.
    """

    kind: ClassVar[str] = "text"
    texts: list[str]
    labels: list[int]
    ids: Tensor
    keys: list[str]
    classes: list[str]
    groups: list[str] = field(default_factory=list, kw_only=True)
    provenance: Provenance | None = field(default=None, kw_only=True)

    _per_row: ClassVar[tuple[str, ...]] = ("texts", "labels", "keys", "groups")

    def __post_init__(self) -> None:
        # The only way to set a field of a frozen dataclass.
        object.__setattr__(self, "groups", self.groups or self.keys)

    def shown(self, row: int) -> str:
        """Text of a row."""
        return self.texts[row]

    def contents(self) -> list[str]:
        """The texts."""
        return self.texts


@dataclass(frozen=True)
class PairData(TextData):
    """Labeled pairs of texts.

    Attributes:
        seconds: the second text of each instance.
    """

    seconds: list[str]

    _per_row: ClassVar[tuple[str, ...]] = ("texts", "seconds", "labels", "keys", "groups")

    def shown(self, row: int) -> str:
        """Both texts of a row."""
        return f"{self.texts[row]} | {self.seconds[row]}"

    def contents(self) -> list[str]:
        """Both texts of each row."""
        return [f"{one}\0{two}" for one, two in zip(self.texts, self.seconds, strict=True)]

    def table(self) -> dict[str, list[Any]]:
        """Columns for a file: key, any group, both texts, and label."""
        return self._named({"text": self.texts, "second": self.seconds})

    def content(self, row: int) -> dict[str, str]:
        """Both texts of a row, as a run's file has them."""
        return {"text": self.texts[row], "second": self.seconds[row]}


@dataclass(frozen=True)
class TextRow(Row):
    """A row of a run's texts."""

    text: str


@dataclass(frozen=True)
class PairRow(TextRow):
    """A row of a run's pairs of texts."""

    second: str


@dataclass(frozen=True)
class Tokens(Encoded):
    """Tokenized texts: token ids, class indices, int64 instance ids (rows,) and the padding token.

    Attributes:
        more: other inputs by name, one number for each token: their values, and their padding.
        left: whether the padding comes before the tokens.
    """

    tokens: list[list[int]]
    labels: list[int]
    ids: Tensor
    padding: int
    more: dict[str, tuple[list[list[int]], int]] = field(default_factory=dict)
    left: bool = False

    def batch(self, rows: Sequence[int]) -> Batch:
        """Some rows, padded: int64 ``input_ids``, ``attention_mask`` and others, (rows, tokens) each."""
        width = max(len(self.tokens[row]) for row in rows)

        def padded(values: Sequence[list[int]], padding: int) -> Tensor:
            filled = torch.full((len(values), width), padding)
            for line, one in zip(filled, values, strict=True):
                place = slice(width - len(one), None) if self.left else slice(len(one))
                line[place] = torch.tensor(one)
            return filled

        texts = [self.tokens[row] for row in rows]
        inputs = {
            "input_ids": padded(texts, self.padding),
            "attention_mask": padded([[1] * len(text) for text in texts], 0),
        }
        for name, (values, padding) in self.more.items():
            inputs[name] = padded([values[row] for row in rows], padding)
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
    origin = Provenance.of(source, columns, split)
    needed = [name for name in (columns.input, columns.second, columns.label) if name is not None]
    wanted = [name for name in (columns.id, columns.group) if name is not None]
    table = load_table(source, split, needed, wanted, columns.encoding)
    columns = present(table.column_names, columns, source, ids_needed=ids_needed)
    if not len(table):
        raise InputError(f"{source}: the file has no rows")
    texts = _texts(table, columns.input, source)
    seconds = None if columns.second is None else _texts(table, columns.second, source)
    names = label_names(table, columns.label, source, classes)
    labels, known = indexed(names, classes, source, f"column {columns.label!r}")
    whole = texts if seconds is None else map("\0".join, zip(texts, seconds, strict=True))
    given = names_of(table, columns, source)
    keys = given.keys or [str(row + 1) for row in range(len(texts))]
    ids, groups = given.ids, given.groups or keys
    if ids is None:
        ids = content_ids(f"{text}\0{name}" for text, name in zip(whole, names, strict=True))
    if seconds is not None:
        return PairData(texts, labels, ids, keys, known, seconds, groups=groups, provenance=origin)
    return TextData(texts, labels, ids, keys, known, groups=groups, provenance=origin)


def _texts(table: Any, column: str, source: str) -> list[str]:
    texts: list[str] = column_of(table, column, source)
    for row, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            held = ""
            if text is not None and not isinstance(text, str):
                held = f", but {str(text)[:50]!r} of the type {type(text).__name__}: write it as a text"
            raise InputError(f"{source}: row {row + 1} has no text in column {column!r}{held}")
    return texts
