"""The command for models that were trained elsewhere: ``attribute``."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from turnover.cli.config import config_option
from turnover.cli.options import DATA, MODEL, Device, Objective, folder_or_url
from turnover.cli.output import Output, command_line
from turnover.cli.parameters import RUN, Fields, build, command
from turnover.cli.reading import Source, say_rows
from turnover.cli.scores import explain_errors, next_commands, print_influence
from turnover.errors import InputError
from turnover.io.parsing import read_json
from turnover.models.classifiers import load_classifier
from turnover.runs.run import Run, check_new_run
from turnover.tasks import attribute as attribute_task
from turnover.tasks.attribute import AttributeConfig
from turnover.tasks.score import ScoreConfig, score

_SHOWN = 3
_LONG = 600
"""Seconds from which on a quicker choice is named."""
_CLASS = typer.Option(
    help="Class of the model's first output, second output, ... (repeatable); default: as its config names "
    "them.",
)


@command(
    Fields(
        Source,
        DATA,
        (
            *("text_column", "image_column", "label_column"),
            *("id_column", "group_column", "split", "test_split", "encoding"),
        ),
    ),
    Fields(
        AttributeConfig,
        MODEL,
        types={"classes": Annotated[list[str] | None, _CLASS], "objective": Objective},
    ),
    config=config_option(),
)
def attribute(
    model: Annotated[str, typer.Option(rich_help_panel=MODEL)],
    train: Annotated[str, typer.Option(rich_help_panel=DATA)],
    out: Annotated[Path, typer.Option(parser=folder_or_url, metavar="PATH", rich_help_panel=RUN)],
    output: Output,
    test: Annotated[str | None, typer.Option(rich_help_panel=DATA)] = None,
    text: Annotated[str | None, typer.Option(rich_help_panel=DATA)] = None,
    image: Annotated[Path | None, typer.Option(rich_help_panel=DATA)] = None,
    label: Annotated[str | None, typer.Option(rich_help_panel=DATA)] = None,
    second_column: Annotated[str | None, typer.Option(rich_help_panel=DATA)] = None,
    plan: Annotated[bool, typer.Option(rich_help_panel=RUN)] = False,
    overwrite: Annotated[bool, typer.Option(rich_help_panel=RUN)] = False,
    device: Device = "auto",
    **options: Any,
) -> None:
    """Explain a classifier that is trained already: nothing is trained, and it is not changed.

    Scores are by gram, with standard errors. The run it writes is one for explain, report, view, review,
    groups and cleanse. If the scores are interrupted, turnover influence RUN computes them.

    Args:
        model: Hugging Face name or folder of a classifier of texts or images, or of a PEFT adapter of one.
        train: the data it was trained on, as for fit.
        out: folder of the run to write, or its URL on a store (s3://...).
        test: rows to explain, in the same formats; or give --text or --image.
        text: explain this text.
        image: explain this image file.
        label: class to explain --text or --image for; default: the predicted one.
        second_column: column of the second texts, for a classifier of pairs.
        plan: print estimated time and memory, and stop.
        overwrite: replace an existing run.
    """
    given = [one for one in (test, text, image) if one is not None]
    if len(given) != 1:
        raise InputError("give one of --test, --text and --image: what is to be explained")
    if label is not None and test is not None:
        raise InputError("--label is of --text or --image: the rows of --test have their own")
    config = build(AttributeConfig, options)
    if test is None and config.targets != attribute_task.ERRORS:
        raise InputError("--targets chooses among the rows of --test: leave it out")
    check_new_run(out, overwrite=overwrite)
    classifier = load_classifier(model)
    columns = build(Source, options).columns(classifier.takes)
    columns = replace(columns, second=second_column)
    made = attribute_task.prepare(
        model,
        train,
        test,
        config,
        columns,
        split=options["split"],
        test_split=options["test_split"],
        one=text if text is not None else image,
        label=label,
        classifier=classifier,
    )
    say_rows(output, training=made.train, test=made.test)
    for note in made.notes:
        output.warn(note)
    expected = made.forecast(device)
    layers = made.pipeline.config.layers
    trained = sum(one.numel() for one in made.classifier.model.parameters() if one.requires_grad)
    written = sum(one.numel() * 4 for one in made.classifier.model.state_dict().values())
    output.say(
        f"gradients of {trained:,} parameters in {len(layers)} tensors ({layers[0]}, ...); expected: "
        f"{expected}; the run holds a copy of the model, {written / 2**30:.2f} GiB",
        highlight=False,
    )
    if expected.seconds > _LONG and config.layers != "head":
        output.say(
            "quicker, and further from retraining: --layers head, or a pattern of fewer layers"
        )
    if plan:
        output.document({"plan": expected.to_dict() | {"written": written}, "device": device})
        return
    run = attribute_task.write(made, out, overwrite=overwrite, device=device)
    _say_accuracy(output, run)
    try:
        metrics = score(run, ScoreConfig(objective=config.objective))
    except KeyboardInterrupt:
        output.say(f"the run is written: {command_line('influence', out)} computes its scores")
        raise
    print_influence(output, metrics)
    shown = explain_errors(output, run, show=_SHOWN, top=5, among=None)
    output.say(f"run: {out}; next: {next_commands(run.train, out, 'view', 'report')}")
    document = {"run": str(out), "metrics": metrics, "plan": expected.to_dict()}
    output.document(document | {"explanations": [one.to_dict() for one in shown]})


def _say_accuracy(output: Output, run: Run) -> None:
    """Print the accuracies, and warn of a model that does not know its own training data."""
    accuracy = read_json(run.folder / "metrics.json")["accuracy"]
    output.say(
        f"accuracy: {accuracy['train']:.3f} of training rows, {accuracy['model']:.3f} of test rows"
    )
    counts = Counter(run.train.labels)
    share = max(counts.values()) / len(run.train)
    if accuracy["train"] <= share:
        output.warn(
            f"the model gets no more of its training rows right than always the most frequent class would "
            f"({share:.3f}): are these its training data, and --class-name or id2label in the order of its "
            f"outputs?"
        )
