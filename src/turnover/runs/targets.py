"""Which test rows of a scored run are its targets: the errors, in ``results/targets.json``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.io.parsing import read_json
from turnover.results.manifest import digest
from turnover.runs.run import Run, data_digest

FILE = "targets.json"
EXPLANATIONS = "explanations.json"
"""What `turnover explain` writes beside it."""


def rows_digest(run: Run) -> str:
    """What results are of: the test rows, and the ids and labels of the training rows in their order."""
    train = np.stack([run.train.ids.numpy(), np.asarray(run.train.labels, dtype=np.int64)])
    return data_digest(run.test) + digest(train)


def read_targets(run: Run) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Test row, predicted class and confidence of every error: (errors,) each.

    Raises:
        InputError: the run has not been scored, or the file is damaged, or of another run or other data.
    """
    path, targets = run.folder / "results" / FILE, _of_rows(run)
    try:
        rows, predicted = (
            np.array(targets[name], dtype=np.int64) for name in ("rows", "predicted")
        )
        confidence = np.array(targets["confidence"], dtype=np.float64)
        whole = rows.shape == predicted.shape == confidence.shape and rows.ndim == 1
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: damaged ({error!r})") from error
    if whole and not len(rows):
        return rows, predicted, confidence
    within = whole and 0 <= rows.min() <= rows.max() < len(run.test)
    if not within or not 0 <= predicted.min() <= predicted.max() < len(run.test.classes):
        raise InputError(
            f"{path}: does not fit the run: run `turnover influence {run.folder}` again"
        )
    return rows, predicted, confidence


def check_scored(run: Run) -> None:
    """Refuse results of rows that the run no longer has.

    Raises:
        InputError: the run has not been scored, or not with these rows.
    """
    _of_rows(run)


def _of_rows(run: Run) -> dict[str, Any]:
    path = run.folder / "results" / FILE
    if not path.exists():
        raise InputError(f"{path} does not exist: run `turnover influence {run.folder}` first")
    targets = read_json(path)
    # Older ones do not have it.
    if targets.get("data", known := rows_digest(run)) != known:
        raise InputError(
            f"{path}: is of other training or test rows than the run has now: run `turnover influence "
            f"{run.folder}` again"
        )
    return targets
