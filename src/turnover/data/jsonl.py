"""Rows of a run's data in JSON lines: key, id, label, and the text or the name of the image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from turnover.data.base import Data
from turnover.errors import InputError
from turnover.io.parsing import field, read_objects


def write_rows(path: Path, data: Data, what: str) -> None:
    """Write JSON lines.

    Args:
        what: name of what each row is: ``"text"``, or ``"image"`` for the name of one.
    """
    with path.open("w") as file:
        for row, key in enumerate(data.keys):
            label = data.classes[data.labels[row]]
            line = {"key": key, "id": int(data.ids[row]), "label": label, what: data.shown(row)}
            file.write(json.dumps(line) + "\n")


def read_rows(
    path: Path, classes: Sequence[str], what: str
) -> tuple[list[int], torch.Tensor, list[str], list[str]]:
    """Labels, ids, keys, and texts or names.

    Args:
        classes: of the run.
        what: as it was written.

    Raises:
        InputError: a missing or damaged file; the line is named.
    """
    index = {name: position for position, name in enumerate(classes)}
    labels, ids, keys, held = [], [], [], []
    for number, row in enumerate(read_objects(path, own=True), start=1):
        where = f"{path}: line {number}"
        label, one = field(row, "label", str, where), field(row, "id", int, where)
        if label not in index:
            raise InputError(f"{where}: damaged, {label!r} is no class of the run")
        if not 0 <= one < 2**63:
            raise InputError(f"{where}: damaged, the id {one} is no number of 63 bits")
        labels.append(index[label])
        ids.append(one)
        keys.append(field(row, "key", str, where))
        held.append(field(row, what, str, where))
    if not labels:
        raise InputError(f"{path}: missing or damaged (no rows)")
    return labels, torch.tensor(ids, dtype=torch.int64), keys, held
