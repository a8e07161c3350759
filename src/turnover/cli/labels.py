"""Commands that judge and write the data: ``predict``, ``review``, ``cleanse``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean, pstdev
from typing import Annotated, Any, Literal

import numpy as np
import typer

from turnover.cli.config import config_option
from turnover.cli.options import DATA, Device, Positive, RunFolder
from turnover.cli.output import Output, check_folder, command_line, in_results
from turnover.cli.parameters import Fields, build, command
from turnover.cli.reading import Source, say_rows
from turnover.data.base import check_writable
from turnover.data.tables import file_of
from turnover.errors import InputError
from turnover.io.parsing import write_json
from turnover.runs.run import Run
from turnover.runs.source import check_spared, usual_ending
from turnover.tasks import cleanse as cleanse_task
from turnover.tasks import relabel as relabel_task
from turnover.tasks import review as review_task
from turnover.tasks.label_errors import Doubts
from turnover.tasks.predict import predict_rows, predict_training, write_predictions
from turnover.tasks.stored_doubts import open_doubts
from turnover.tasks.stored_hidden import open_hidden


@command()
def predict(
    run: RunFolder,
    output: Output,
    hidden: Annotated[bool, typer.Option("--hidden")] = False,
    train: Annotated[bool, typer.Option("--train")] = False,
    without: str | None = None,
    calibrate: bool = True,
    out: Path | None = None,
    device: Device = "auto",
) -> None:
    """Write predictions and losses as CSV: of the test rows, or of the training rows.

    Args:
        hidden: predict the training rows, each by the network that never learned it, instead of the test
            rows.
        train: predict the training rows, by the whole network, instead of the test rows.
        without: predict without this training instance or group (its key or name).
        calibrate: calibrate --hidden on the test rows and their labels.
        out: CSV file to write; default: in the run's results.
    """
    other = "--train" if train else "--without"
    if hidden and (train or without is not None):
        raise InputError(
            f"--hidden predicts each training row without it, and {other} by another network: give one of "
            f"the two"
        )
    name = f"{'hidden_' if hidden else 'training_' if train else ''}predictions.csv"
    check_folder(out)
    loaded = Run.load(run, device)
    check_spared(loaded, out)
    mixture: dict[str, float] = {}
    if hidden:
        found = open_hidden(loaded) if calibrate else predict_training(loaded, calibrate=False)
        data, probabilities = loaded.train, found.probabilities.astype(np.float64)
        mixture = {"exposed_share": found.exposed_share, "temperature": found.temperature}
        output.say(
            f"share of the exposed network {found.exposed_share:.2f}, temperature "
            f"{found.temperature:.2f}"
        )
    else:
        data = loaded.train if train else loaded.test
        probabilities = predict_rows(loaded, data, without=without)
    path = out or in_results(run, name)
    write_predictions(data, probabilities, path)
    accuracy = float((probabilities.argmax(axis=1) == data.labels).mean())
    rows = (
        "training rows, which it learned" if train else "training rows" if hidden else "test rows"
    )
    output.say(f"accuracy {accuracy:.3f} on {len(data)} {rows}: {path}")
    document = {"file": str(path), "rows": len(data), "accuracy": accuracy, **mixture}
    output.document(document | {"device": device})


@command()
def review(
    run: RunFolder,
    output: Output,
    out: Path | None = None,
    budget: Positive = 100,
    decisions: Path | None = None,
    apply: Literal["relabel", "remove"] | None = None,
    least: float | None = None,
    device: Device = "auto",
) -> None:
    """List training rows with doubtful labels, or write the data set after the decisions on them.

    Args:
        out: CSV file for the list; with --decisions or --apply the file for the decided data set. Default:
            in the run's results.
        budget: most rows to list.
        decisions: the list with its decision column filled in: keep, remove or a class.
        apply: decide by itself: relabel or remove rows whose label is probably wrong, and measure what
            either does to the predictions of new heads.
        least: of --apply: the probability of being wrong from which on it does so; default: 0.9.
    """
    if decisions is not None and apply is not None:
        raise InputError("--decisions are yours, --apply decides by itself: give one of the two")
    if least is not None and apply is None:
        raise InputError("--least is the probability from which on --apply changes rows: give both")
    sure = relabel_task.SURE if least is None else least
    relabel_task.check_least(sure)
    lists = decisions is None and apply is None
    if out is not None:
        check_writable(out, ".npz")
        if lists and out.suffix != ".csv":
            raise InputError(f"{out}: the list to review is a CSV file")
    loaded = Run.load(run, device)
    check_spared(loaded, out, decisions)
    ending = usual_ending(loaded)
    path = out or in_results(run, "review.csv" if lists else f"decided{ending}")
    if decisions is not None:
        counts = review_task.apply_decisions(loaded, decisions, path)
        output.say(f"{_counted(counts)}: {path}")
        output.document({"file": str(path), **counts})
        return
    if lists:
        review_task.check_undecided(path)
    found = open_doubts(loaded)
    if apply is not None:
        _apply(loaded, output, found, apply, sure, path, device)
        return
    reviewed = review_task.listed(loaded, found, budget)
    review_task.write_review(reviewed.rows, path)
    output.say(
        f"about {reviewed.expected:.0f} of {len(loaded.train)} labels are wrong ({reviewed.likely} more "
        f"probably than not), by {reviewed.source}\n"
        f"the {len(reviewed.rows)} most doubtful rows of {len(loaded.train)}: {path}\n"
        f"{_empty(loaded)}"
        f"fill in the column decision (keep, remove or a class), then: "
        + command_line("review", run, "--decisions", path, "--out", f"cleaned{ending}"),
        highlight=False,
    )
    output.document({"file": str(path), **asdict(reviewed), "device": device})


def _apply(
    run: Run,
    output: Output,
    found: Doubts,
    way: str,
    least: float,
    path: Path,
    device: str,
) -> None:
    applied = relabel_task.apply(run, found, way, least=least)
    counts = review_task.write_decided(run, applied.decisions, path)
    reviewed = review_task.listed(run, found, len(applied.decisions))
    said = {run.train.keys[row]: decision for row, decision in applied.decisions.items()}
    listed = in_results(run.folder, "applied.csv")
    review_task.write_review(reviewed.rows, listed, said)
    if said:
        output.table(
            ("doubtful rows", f"accuracy on {applied.test_rows} test rows"),
            ((name, _over_seeds(values)) for name, values in applied.accuracy.items()),
            title=f"heads on the encoder's features, trained after {len(said)} decisions",
        )
    else:
        output.say(
            f"no label is wrong with a probability of {least} or more: the most doubtful is at "
            f"{found.errors.probability.max():.2f}"
        )
    output.say(f"{_counted(counts)}: {path}; the decisions: {listed}")
    if said and (empty := _empty(run)):
        output.say(empty.rstrip(), highlight=False)
    document = {"file": str(path), "decisions_file": str(listed), **counts}
    output.document(document | {"accuracy": applied.accuracy, "device": device})


def _empty(run: Run) -> str:
    """Say which columns of the list are empty, and what fills them."""
    if run.has_result("self"):
        return ""
    when = f"until {command_line('influence', run.folder)} has run"
    when = "as rows of a group have no self-influence" if run.train.grouped else when
    return f"its columns self_influence_z and self_influence_q are empty, {when}\n"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in counts.items())


@command(
    Fields(Source, DATA, ("text_column", "image_column", "label_column", "encoding")),
    config=config_option(),
)
def cleanse(
    run: RunFolder,
    output: Output,
    validation: str,
    out: Path,
    ranking: Literal["gram", "turn-over", "self"] | None = None,
    scores: Path | None = None,
    fraction: list[float] | None = None,
    second_column: Annotated[str | None, typer.Option(rich_help_panel=DATA)] = None,
    seeds: Positive = 3,
    split: Annotated[str, typer.Option(rich_help_panel=DATA)] = "validation",
    device: Device = "auto",
    **options: Any,
) -> None:
    """Remove training rows to predict a validation set better, and measure the gain.

    New heads on the pretrained encoder's features are trained without these rows; the run stays as it is.

    Args:
        validation: rows to predict better: a file (for images also a folder), or a Hugging Face data set.
        out: file to write: the data set without the removed rows.
        ranking: influence on the validation rows by gram (the default) or turn-over, or self:
            memorization, by self-influence.
        scores: your own ranking: CSV with key and score, positive = helpful.
        fraction: share to remove, between 0 and 1 (repeatable); default: 0.01 0.02 0.05 0.1 0.2.
        second_column: column of the second texts, for a classifier of pairs.
        seeds: heads trained without each share.
        split: split of a Hugging Face data set.
    """
    if ranking is not None and scores is not None:
        raise InputError("--ranking and --scores are two rankings: give one of them")
    check_writable(out, ".npz")
    loaded = Run.load(run, device)
    check_spared(loaded, out, file_of(validation, split), scores)
    given = None if scores is None else cleanse_task.read_scores(loaded, scores)
    columns = build(Source, options).columns(loaded.pipeline.config.kind)
    columns = replace(columns, second=second_column)
    held = loaded.pipeline.reader()(validation, columns, classes=loaded.train.classes, split=split)
    say_rows(output, validation=held)
    found = cleanse_task.cleanse(
        loaded,
        held,
        ranking=ranking or "gram",
        scores=given,
        fractions=fraction or cleanse_task.FRACTIONS,
        seeds=seeds,
    )
    removed = in_results(run, "removed.csv")
    cleanse_task.write_cleansed(loaded, found, out, removed)
    document = found.to_dict() | {"device": device}
    write_json(in_results(run, "cleanse.json"), document)
    _print_cleansing(output, found)
    output.say(f"{len(found.removed)} rows removed: {removed}; the others: {out}")
    output.document(document | {"file": str(out), "removed_file": str(removed)})


def _print_cleansing(output: Output, found: cleanse_task.Cleansing) -> None:
    for title, points in (("validation", found.curve), ("test", found.test)):
        output.table(
            ("removed by", "share", "rows", "accuracy", "loss, nats"),
            (
                (
                    *(one.removal, f"{100 * one.fraction:g}%", str(one.removed)),
                    *(_over_seeds(one.accuracy), _over_seeds(one.loss)),
                )
                for one in points
            ),
            title=title,
        )
    seeds = len(found.curve[0].loss)
    several = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    output.say(
        f"heads on the pretrained encoder's features, {several}; on the test rows at the share with the "
        f"ranking's lowest loss on the validation rows"
    )


def _over_seeds(values: Sequence[float]) -> str:
    spread = f" ± {pstdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"
