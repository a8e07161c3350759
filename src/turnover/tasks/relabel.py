"""Training data after the most doubtful labels are changed or their rows removed, and what that gains."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from turnover.errors import InputError, check_whole
from turnover.io.bars import tqdm
from turnover.runs.run import Run
from turnover.tasks.label_errors import Doubts
from turnover.tasks.linear_probe import Frozen, frozen, logits_of, train_head
from turnover.tasks.review import KEEP, REMOVE, decided

SURE = 0.9
WAYS = ("relabel", "remove")


@dataclass(frozen=True)
class Applied:
    """What is done to the doubtful rows, and how heads that were trained on the rest predict test rows.

    Attributes:
        decisions: class, or ``"remove"``, by training row.
        accuracy: on the test rows, with the labels that they have: of heads trained on the data as they are
            (``"keep"``), with the rows relabeled and without them, one for each seed. Empty without
            decisions.
        test_rows: number of the test rows.
    """

    decisions: Mapping[int, str]
    accuracy: Mapping[str, tuple[float, ...]]
    test_rows: int


def apply(run: Run, found: Doubts, way: str, *, least: float = SURE, seeds: int = 3) -> Applied:
    """Relabel or remove the training rows whose labels are wrong with some probability or more.

    Heads on the pretrained encoder's features are trained on the data as they are, with the rows
    relabeled, and without them; the run stays as it is.

    Args:
        run: a run whose training rows have keys of their own.
        found: doubts about its labels.
        way: ``"relabel"`` or ``"remove"``: what the decisions say.
        least: probability of being wrong from which on a row is changed, above 0 and below 1.
        seeds: heads for each.

    Raises:
        InputError: another way, a probability outside of (0, 1), seeds below 1, or a class that would lose
            all rows.
    """
    if way not in WAYS:
        raise InputError(f"unknown way {way!r}: {' or '.join(WAYS)}")
    check_whole("seeds", seeds, 1)
    check_least(least)
    errors, classes = found.errors, run.train.classes
    chosen = np.flatnonzero(errors.probability >= least).tolist()
    if not chosen:
        return Applied({}, {}, len(run.test))
    suggested = {row: classes[int(errors.suggested[row])] for row in chosen}
    made = {"relabel": suggested, "remove": dict.fromkeys(chosen, REMOVE)}
    for name, decisions in made.items():
        left = set(decided(run.train, decisions).labels)
        if lost := sorted(set(run.train.labels) - left):
            of = ", ".join(classes[one] for one in lost)
            raise InputError(f"to {name} the doubtful rows would leave none of class {of}")
    if run.masks is None and not run.pipeline.keeps_pretrained:
        warnings.warn(
            f"the heads are trained on features of {run.folder}'s model as it is, which has learned the "
            f"labels: gains come out too small; train it again on the data set written to know them",
            stacklevel=2,
        )
    train, test = frozen(run, run.train), frozen(run, run.test)
    sets: dict[str, dict[int, str]] = {KEEP: {}} | made
    accuracy: dict[str, list[float]] = {name: [] for name in sets}
    with tqdm(total=len(sets) * seeds, desc="heads", unit="head") as bar:
        for seed in range(seeds):
            for name, decisions in sets.items():
                right = right_after(train, test, decisions, classes, seed)
                accuracy[name].append(float(right.float().mean()))
                bar.update()
    return Applied(made[way], {name: tuple(values) for name, values in accuracy.items()}, len(test))


def check_least(least: float) -> None:
    """Refuse what is no probability between 0 and 1."""
    if not 0 < least < 1:
        raise InputError(f"the least probability must be above 0 and below 1, got {least}")


def right_after(
    train: Frozen, test: Frozen, decisions: Mapping[int, str], classes: list[str], seed: int
) -> Tensor:
    """Whether a head trained after decisions, by row of ``train``, predicts each test row: bool (rows,).

    Raises:
        InputError: decisions that remove every row.
    """
    labels = train.labels.clone()
    kept = [row for row in range(len(train)) if decisions.get(row) != REMOVE]
    if not kept:
        raise InputError("the decisions remove every row: there is nothing to train on")
    for row, decision in decisions.items():
        if decision not in (KEEP, REMOVE):
            labels[row] = classes.index(decision)
    head = train_head(replace(train, labels=labels), kept, seed)
    return logits_of(head, test).argmax(dim=1) == test.labels
