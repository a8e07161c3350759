"""Predictions of a run: training rows by their hidden networks, test rows with or without a group."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.data.base import Data
from turnover.data.encoded import batches
from turnover.dropout.hidden import HiddenPredictions, hidden_predictions
from turnover.errors import InputError
from turnover.io.files import write_csv
from turnover.runs.run import Run
from turnover.tasks.training import logits_of_rows


def predict_training(run: Run, *, calibrate: bool = True) -> HiddenPredictions:
    """Predict a run's training rows, in their order, by their hidden networks, calibrated on test rows.

    Args:
        run: the run.
        calibrate: calibrate on the test rows and their labels.
    """
    training, test = run.encode(run.train), run.encode(run.test)
    chunks = training.chunks(range(len(training)))
    held_out = batches(test, range(len(test)))
    found = hidden_predictions(
        run.network,
        [training.batch(chunk) for chunk in chunks],
        held_out if calibrate else None,
        progress=True,
    )
    order = np.argsort(np.concatenate([np.array(chunk) for chunk in chunks]))
    ids = found.train_ids[order]
    return replace(found, probabilities=found.probabilities[order], train_ids=ids)


def predict_test(run: Run, *, without: str | None = None) -> NDArray[np.float32]:
    """Predict probabilities (rows, classes) of a run's test rows.

    Args:
        run: the run.
        without: key of a training instance or group: predict by the network that never learned it;
            ``None``: by the whole network.

    Raises:
        InputError: no training row has that key.
    """
    train_id = None if without is None else id_of(run.train, without)

    def bind(_: Sequence[int]) -> AbstractContextManager[Any]:
        return run.whole() if train_id is None else run.network.without(train_id)

    encoded = run.encode(run.test)
    logits = logits_of_rows(run.model, encoded, range(len(encoded)), bind)
    return np.asarray(logits.softmax(dim=1).numpy())


def id_of(train: Data, key: str) -> int:
    """Find the id under which the rows with a key were trained; refuse an unknown key."""
    if key not in train.keys:
        close = difflib.get_close_matches(key, dict.fromkeys(train.keys), n=3, cutoff=0.4)
        hint = f"; closest: {', '.join(close)}" if close else ""
        raise InputError(f"no training row has the key {key!r}{hint}")
    return int(train.ids[train.keys.index(key)])


def write_predictions(data: Data, probabilities: NDArray[np.float32], out: Path) -> None:
    """Write probabilities (rows, classes) as CSV, atomically, beside keys, labels and predictions."""
    columns = [f"p({name})" for name in data.classes]
    lines = []
    for row, given in enumerate(probabilities):
        label = data.labels[row]
        numbers = [f"{p:.6f}" for p in (given[label], *given)]
        predicted = data.classes[int(given.argmax())]
        lines.append([data.keys[row], data.classes[label], predicted, *numbers])
    write_csv(out, ["key", "label", "predicted", "probability_of_label", *columns], lines)
