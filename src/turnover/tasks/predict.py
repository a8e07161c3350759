"""Predictions of a run: rows with or without a group, training rows by their hidden networks."""

from __future__ import annotations

import difflib
import math
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

_SMALLEST = np.finfo(np.float64).tiny


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


def predict_rows(run: Run, data: Data, *, without: str | None = None) -> NDArray[np.float64]:
    """Predict probabilities (rows, classes) of rows.

    Args:
        run: the run.
        data: its test or training rows.
        without: key of a training instance, or name of a group: predict by the network that never learned
            it; ``None``: by the whole network.

    Raises:
        InputError: no training row has that key, or no group that name.
    """
    train_id = None if without is None else id_of(run.train, without)

    def bind(_: Sequence[int]) -> AbstractContextManager[Any]:
        return run.whole() if train_id is None else run.network.without(train_id)

    encoded = run.encode(data)
    logits = logits_of_rows(run.model, encoded, range(len(encoded)), bind)
    return np.asarray(logits.double().softmax(dim=1).numpy())


def id_of(train: Data, key: str) -> int:
    """Find the id of a training row's key, or of a group's name; refuse unknown ones."""
    if key in train.groups:
        return int(train.ids[train.groups.index(key)])
    if key in train.keys:
        group = train.groups[train.keys.index(key)]
        raise InputError(
            f"training row {key!r} shares its mask with its group {group!r}: give the group"
        )
    close = difflib.get_close_matches(key, dict.fromkeys(train.groups), n=3, cutoff=0.4)
    hint = f"; closest: {', '.join(close)}" if close else ""
    what = "no training rows are of the group" if train.grouped else "no training row has the key"
    raise InputError(f"{what} {key!r}{hint}")


def write_predictions(data: Data, probabilities: NDArray[np.floating], out: Path) -> None:
    """Write probabilities (rows, classes) as CSV, atomically, beside keys, groups, labels and predictions.

    The loss is that of the label, in nats.
    """
    named = {"key": data.keys} | ({} if data.groups == data.keys else {"group": data.groups})
    lines = []
    for row, (names, given) in enumerate(
        zip(zip(*named.values(), strict=True), probabilities, strict=True)
    ):
        label, predicted = data.labels[row], data.classes[int(given.argmax())]
        loss = -math.log(max(float(given[label]), _SMALLEST))
        numbers = [f"{given[label]:.6f}", f"{loss:.6g}", *(f"{p:.6f}" for p in given)]
        lines.append([*names, data.classes[label], predicted, *numbers])
    columns = [f"p({name})" for name in data.classes]
    header = [*named, "label", "predicted", "probability_of_label", "loss", *columns]
    write_csv(out, header, lines)
