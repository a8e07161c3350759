"""The hidden predictions of a run, and their file."""

from __future__ import annotations

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from turnover.hidden import HiddenPredictions, hidden_predictions
from turnover.run import Run


def predict_run(run: Run, *, calibrate: bool = True) -> HiddenPredictions:
    """The hidden predictions of a run's training rows, in their order, calibrated on its test rows."""
    training, test = run.encode(run.train), run.encode(run.test)
    chunks = training.by_length(range(len(training)))
    held_out = [test.batch(chunk) for chunk in test.by_length(range(len(test)))]
    found = hidden_predictions(
        run.network,
        [training.batch(chunk) for chunk in chunks],
        held_out if calibrate else None,
        progress=True,
    )
    order = np.argsort(np.concatenate([np.array(chunk) for chunk in chunks]))
    return replace(
        found, probabilities=found.probabilities[order], train_ids=found.train_ids[order]
    )


def write_predictions(run: Run, found: HiddenPredictions, out: Path) -> None:
    """Write a CSV, atomically: key, label, predicted, the label's probability, then every class's."""
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    classes = run.train.classes
    with draft.open("w", newline="") as file:
        writer = csv.writer(file)
        columns = [f"p({name})" for name in classes]
        writer.writerow(["key", "label", "predicted", "probability_of_label", *columns])
        for row, probabilities in enumerate(found.probabilities):
            label = run.train.labels[row]
            numbers = [f"{p:.6f}" for p in (probabilities[label], *probabilities)]
            predicted = classes[int(probabilities.argmax())]
            writer.writerow([run.train.keys[row], classes[label], predicted, *numbers])
    draft.replace(out)
