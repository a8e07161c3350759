"""Targets of a scored run: its misclassified test rows, in ``results/targets.json``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.io.parsing import convert, damage, read_json
from turnover.results.manifest import digest
from turnover.runs.run import Run, data_digest

FILE = "targets.json"
EXPLANATIONS = "explanations.json"
"""Written beside it by `turnover explain`."""


@dataclass(frozen=True)
class _Targets:
    rows: list[int]
    predicted: list[int]
    confidence: list[float]
    data: str | None = None


def rows_digest(run: Run) -> str:
    """Digest of the rows that results belong to: test rows, and ids and labels of training rows."""
    train = np.stack([run.train.ids.numpy(), np.asarray(run.train.labels, dtype=np.int64)])
    return data_digest(run.test) + digest(train)


def read_targets(run: Run) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Test row, predicted class and confidence of every error: (errors,) each."""
    path = run.folder / "results" / FILE
    if not path.exists():
        raise InputError(f"{path} does not exist: run `turnover influence {run.folder}` first")
    targets = convert(read_json(path), _Targets, path)
    again = f"run `turnover influence {run.folder}` again"
    if targets.data is not None and targets.data != rows_digest(run):
        raise InputError(
            f"{path}: belongs to other training or test rows than the run has now: {again}"
        )
    with damage(path, again):
        rows, predicted = (
            np.array(values, dtype=np.int64) for values in (targets.rows, targets.predicted)
        )
    confidence = np.array(targets.confidence, dtype=np.float64)
    fits = len(rows) == len(predicted) == len(confidence)
    if fits and len(rows):
        fits = 0 <= rows.min() <= rows.max() < len(run.test)
        fits = fits and 0 <= predicted.min() <= predicted.max() < len(run.test.classes)
    if not fits:
        raise InputError(f"{path}: does not fit the run: {again}")
    return rows, predicted, confidence


def check_scored(run: Run) -> None:
    """Refuse a run that has not been scored, or whose results belong to other rows."""
    read_targets(run)
