"""Which labels of a run are wrong, by the out-of-sample predictions that explain them best."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.io.parsing import read_json
from turnover.labels import LabelErrors, label_errors, label_errors_of
from turnover.runs.run import Run
from turnover.runs.targets import check_scored
from turnover.tasks.linear_probe import frozen
from turnover.tasks.stored_hidden import open_hidden
from turnover.tasks.training import logits_of_rows

_SMALLEST = 1e-12
_SOURCES = {
    "features": "left-out predictions from the pretrained encoder's features",
    "hidden": "predictions of the networks that never learned them",
    "itself": "the model's predictions less what each row itself added, by gram",
}


@dataclass(frozen=True)
class Doubts:
    """Doubts about the labels of a run's training rows, and which predictions they are by.

    Attributes:
        errors: of all training rows, in their order.
        source: ``"features"``, ``"hidden"`` or ``"itself"``.
    """

    errors: LabelErrors
    source: str

    def described(self) -> str:
        """Say by which predictions."""
        return _SOURCES[self.source]


def doubts(run: Run) -> Doubts:
    """Estimate which labels are wrong.

    The predictions are those of a ridge regression on the pretrained encoder's features, where it is
    there, and of the hidden networks of a model with masks, whichever give the labels more likelihood. A
    model that was trained without masks, and itself on its encoder, has neither: there it is the model's
    own prediction less the self-influence of the row by gram.

    Raises:
        InputError: rows share ids (groups), labels that cannot be told apart, or a run that needs to be
            scored first.
    """
    check_rows(run)
    labels, classes = np.array(run.train.labels), len(run.train.classes)
    found = []
    if run.pipeline.keeps_pretrained:
        features = frozen(run, run.train).features
        found.append(Doubts(label_errors(features, labels, classes=classes), "features"))
    if run.masks is not None:
        found.append(_by(open_hidden(run).probabilities, labels, "hidden"))
    if not found:
        found.append(_by(without_themselves(run), labels, "itself"))
    return max(found, key=lambda one: one.errors.likelihood)


def _by(probabilities: NDArray[np.floating], labels: NDArray[np.int64], source: str) -> Doubts:
    logarithms = np.log(np.maximum(probabilities, _SMALLEST))
    return Doubts(label_errors_of(logarithms, labels), source)


def check_rows(run: Run) -> None:
    """Refuse training rows that share keys."""
    twice = [key for key, count in Counter(run.train.keys).items() if count > 1]
    if twice:
        raise InputError(
            f"{run.folder}: training rows share the key {twice[0]!r}, and rows are judged one by one: fit "
            f"again, which numbers rows, or give their column with --id-column"
        )


def without_themselves(run: Run) -> NDArray[np.float64]:
    """Estimate what a model would predict for its training rows without each of them: (rows, classes).

    The probability of a row's label falls by the row's self-influence.
    """
    if run.train.grouped:
        raise InputError(
            f"{run.folder} has groups, and a model that was trained without masks, itself on its encoder, "
            f"is judged by the self-influence of single rows: make a run without the group column"
        )
    check_scored(run)
    objective = read_json(run.folder / "metrics.json").get("influence", {}).get("objective")
    result = run.read_result("self")
    at = {train_id: column for column, train_id in enumerate(result.train_ids.tolist())}
    own = result.scores[[at[one] for one in run.train.ids.tolist()]].astype(np.float64)
    encoded, rows = run.encode(run.train), torch.arange(len(run.train))
    logits = logits_of_rows(run.model, encoded, range(len(encoded)), lambda _: run.whole()).double()
    label, fall = torch.tensor(run.train.labels), torch.from_numpy(own)
    whole, labeled = logits.logsumexp(dim=1), logits[rows, label].clone()
    logits[rows, label] = -torch.inf
    if objective == "cross_entropy":
        after = (labeled - whole - fall).exp().clamp(max=1)
    else:  # minus the log-odds
        after = (labeled - logits.logsumexp(dim=1) - fall).sigmoid()
    probabilities = logits.softmax(dim=1) * (1 - after)[:, None]
    probabilities[rows, label] = after
    found: NDArray[np.float64] = probabilities.numpy()
    return found
