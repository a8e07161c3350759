"""Commands that judge and write the data: ``predict``, ``review``, ``cleanse``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from turnover.cli.config import config_option
from turnover.cli.engines import connecting
from turnover.cli.options import ImageColumn, Json, LabelColumn, RunFolder, Split, TextColumn
from turnover.cli.output import Output, check_folder, in_results
from turnover.cli.reading import reading, say_rows
from turnover.errors import InputError

if TYPE_CHECKING:
    from turnover.tasks.cleanse import Cleansing


def predict(
    run: RunFolder,
    hidden: Annotated[
        bool,
        typer.Option(
            "--hidden",
            help="Predict the training rows, each by the network that never learned it, in place of "
            "the test rows.",
        ),
    ] = False,
    without: Annotated[
        str | None,
        typer.Option(
            help="Predict the test rows without this training instance or group (its key)."
        ),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option(help="Calibrate --hidden on the test rows and their labels.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(help="CSV file to write; default: in the run's results.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write predictions as CSV: of the test rows, or out of sample of the training rows."""
    from turnover.runs.run import Run
    from turnover.tasks.predict import predict_test, predict_training, write_predictions

    if hidden and without is not None:
        raise InputError(
            "--hidden predicts training rows, --without test rows: give one of the two"
        )
    name = "hidden_predictions.csv" if hidden else "predictions.csv"
    check_folder(out)
    output = Output(as_json=as_json)
    loaded = Run.load(run)
    mixture: dict[str, float] = {}
    if hidden:
        found = predict_training(loaded, calibrate=calibrate)
        data, probabilities = loaded.train, found.probabilities
        mixture = {"exposed_share": found.exposed_share, "temperature": found.temperature}
        output.say(
            f"share of the exposed network {found.exposed_share:.2f}, temperature "
            f"{found.temperature:.2f}"
        )
    else:
        data, probabilities = loaded.test, predict_test(loaded, without=without)
    path = out or in_results(run, name)
    write_predictions(data, probabilities, path)
    right = probabilities.argmax(axis=1) == data.labels
    accuracy = float(right.mean())
    output.say(f"accuracy {accuracy:.3f}; {len(data)} rows: {path}")
    output.document({"file": str(path), "rows": len(data), "accuracy": accuracy, **mixture})


def review(
    run: RunFolder,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The list to review (CSV); with --decisions the data set after them. Default: in the "
            "run's results."
        ),
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="At most so many rows to review.")] = 100,
    decisions: Annotated[
        Path | None,
        typer.Option(help="The list with its column decision filled in: keep, remove or a class."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List training rows with doubtful labels, or write the data set after the decisions on them."""
    from turnover.data.base import check_writable
    from turnover.runs.run import Run
    from turnover.tasks.review import apply_decisions, review, write_review

    name = "review.csv" if decisions is None else "decided.csv"
    if out is not None:
        check_writable(out, ".npz")
        if decisions is None and out.suffix != ".csv":
            raise InputError(f"{out}: the list to review is a CSV file")
    output = Output(as_json=as_json)
    loaded = Run.load(run)
    if decisions is not None:
        path = out or in_results(run, name)
        counts = apply_decisions(loaded, decisions, path)
        said = ", ".join(f"{count} {name}" for name, count in counts.items())
        output.say(f"{said}: {path}")
        output.document({"file": str(path), **counts})
        return
    flagged = review(loaded, budget=budget)
    path = out or in_results(run, name)
    write_review(flagged, path)
    output.say(
        f"{len(flagged)} training rows whose label the network that never learned them does not share: "
        f"{path}\nfill in the column decision (keep, remove or a class), then: turnover review "
        f"{run} --decisions {path} --out cleaned.csv",
        highlight=False,
    )
    output.document({"file": str(path), "rows": [asdict(one) for one in flagged]})


def cleanse(
    run: RunFolder,
    validation: Annotated[
        str,
        typer.Option(
            help="Rows to predict better: a file (of images also a folder), or Hugging Face data set."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="File to write: the data set without the rows taken out.")
    ],
    ranking: Annotated[
        Literal["gram", "turn-over", "self"] | None,
        typer.Option(
            help="Influence on the validation rows by gram (the default) or turn-over, or self: what "
            "was learned by heart."
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Your own ranking: CSV with key and score, positive = helpful."),
    ] = None,
    fraction: Annotated[
        list[float] | None,
        typer.Option(
            help="Share to take out, between 0 and 1 (repeatable); default: 0.01 0.02 0.05 0.1 0.2."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Heads trained without each share.")] = 3,
    engine: Annotated[
        Literal["process", "ray"],
        typer.Option(
            help="What trains the heads: this process, or the workers of a Ray cluster, in the same bits."
        ),
    ] = "process",
    address: Annotated[
        str | None,
        typer.Option(
            help="Host and port of the Ray cluster, host:port; without it RAY_ADDRESS, or this machine."
        ),
    ] = None,
    text_column: TextColumn = "text",
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
    split: Split = "validation",
    config: Annotated[Path | None, config_option()] = None,  # noqa: ARG001 - its callback reads it
    as_json: Json = False,
) -> None:
    """Take training rows out for a validation set's sake, and measure what that is worth.

    New heads on the pretrained encoder's features are trained without them; the run stays as it is.
    """
    from turnover.data.base import Columns, Data, check_writable
    from turnover.data.images import read_images
    from turnover.data.text import read
    from turnover.io.parsing import write_json
    from turnover.models.image import ImagePipeline
    from turnover.runs.run import Run
    from turnover.tasks.cleanse import FRACTIONS, cleanse, read_scores, write_cleansed

    if ranking is not None and scores is not None:
        raise InputError("--ranking and --scores are two rankings: give one of them")
    check_writable(out, ".npz")
    connection = connecting(engine, address)
    output = Output(as_json=as_json)
    loaded = Run.load(run)
    given = None if scores is None else read_scores(loaded, scores)
    classes = loaded.train.classes
    held: Data
    with reading(output):
        if isinstance(loaded.pipeline, ImagePipeline):
            columns, pipeline = Columns(image_column, label_column), loaded.pipeline
            size, ranges = pipeline.config.size, pipeline.ranges
            held = read_images(
                validation, size, columns, classes=classes, split=split, ranges=ranges
            )
        else:
            columns = Columns(text_column, label_column)
            held = read(validation, columns, classes=classes, split=split)
    say_rows(output, validation=held)
    with connection:
        found = cleanse(
            loaded,
            held,
            ranking=ranking or "gram",
            scores=given,
            fractions=fraction or FRACTIONS,
            seeds=seeds,
            engine=engine,
        )
    removed = in_results(run, "removed.csv")
    write_cleansed(loaded, found, out, removed)
    write_json(in_results(run, "cleanse.json"), found.to_dict())
    _print_cleansing(output, found)
    output.say(f"{len(found.removed)} rows taken out: {removed}; the others: {out}")
    output.document({**found.to_dict(), "file": str(out), "removed_file": str(removed)})


def _print_cleansing(output: Output, found: Cleansing) -> None:
    for title, points in (("validation", found.curve), ("test", found.test)):
        table = Table(
            "taken out by",
            "share",
            "rows",
            "accuracy",
            "loss, nats",
            title=title,
            title_justify="left",
        )
        for one in points:
            figures = (_over_seeds(values) for values in (one.accuracy, one.loss))
            table.add_row(one.removal, f"{100 * one.fraction:g}%", str(one.removed), *figures)
        output.say(table)
    seeds = len(found.curve[0].loss)
    several = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    output.say(
        f"heads on the pretrained encoder's features, {several}; on the test rows at the share with the "
        f"ranking's lowest loss on the validation rows"
    )


def _over_seeds(values: Sequence[float]) -> str:
    """One seed says nothing of the spread."""
    spread = f" ± {pstdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"
