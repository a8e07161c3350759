"""Rows of a run's data as JSON lines: key, id, label, and the text or the name of the image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from turnover.data.base import Data
from turnover.errors import InputError
from turnover.io.parsing import convert, read_objects


@dataclass(frozen=True)
class Row:
    """A row of any kind; each kind adds a field for its content."""

    key: str
    id: int
    label: str

    def __post_init__(self) -> None:
        if not 0 <= self.id < 2**63:
            raise InputError(f"id {self.id} does not fit 63 bits")


_Row = TypeVar("_Row", bound=Row)


def write_rows(path: Path, data: Data) -> None:
    """Write rows as JSON lines; the content of a row is what lists show."""
    with path.open("w") as file:
        for row, key in enumerate(data.keys):
            label = data.classes[data.labels[row]]
            line = {
                "key": key,
                "id": int(data.ids[row]),
                "label": label,
                data.kind: data.shown(row),
            }
            file.write(json.dumps(line) + "\n")


def read_rows(
    path: Path, classes: Sequence[str], kind: type[_Row]
) -> tuple[list[_Row], list[int], torch.Tensor, list[str]]:
    """Read rows, their labels (indices into the run's classes), ids and keys."""
    index = {name: position for position, name in enumerate(classes)}
    rows = []
    for number, values in enumerate(read_objects(path, own=True), start=1):
        rows.append(convert(values, kind, where := f"{path}: line {number}"))
        if rows[-1].label not in index:
            raise InputError(f"{where}: damaged, {rows[-1].label!r} is not a class of the run")
    if not rows:
        raise InputError(f"{path}: missing or damaged (no rows)")
    ids = torch.tensor([row.id for row in rows], dtype=torch.int64)
    return rows, [index[row.label] for row in rows], ids, [row.key for row in rows]
