"""Commands that make pages: ``report``, ``view``, and ``demo``, all steps on real sentences."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from turnover.cli.config import recipe
from turnover.cli.options import Device, HeadUnits, RunFolder, Seed
from turnover.cli.output import Output, check_folder, command_line
from turnover.cli.parameters import RUN, command
from turnover.cli.scores import explain_errors, print_influence
from turnover.cli.training import print_fit
from turnover.data import demo as demo_data
from turnover.data.base import Columns, read_both
from turnover.dropout.masks import MaskSpec
from turnover.io.memory import freed_memory_kept
from turnover.io.parsing import damage
from turnover.models.text import ClassifierConfig
from turnover.report import write
from turnover.report.from_run import content
from turnover.runs.run import Run, check_new_run, data_digest
from turnover.tasks.fit import FitConfig, fit
from turnover.tasks.score import ScoreConfig, score
from turnover.tasks.training import TrainingConfig
from turnover.view import open_view


@command()
def report(run: RunFolder, output: Output, out: Path | None = None, text: bool = True) -> None:
    """Write the run's report: one HTML file that needs nothing else.

    Args:
        out: HTML file to write; default: report.html in the run.
        text: show texts and images; --no-text leaves them out.
    """
    check_folder(out)
    path = out or run / "report.html"
    _write_report(output, Run.load(run, "cpu"), path, texts=text)
    output.document({"file": str(path)})


@command()
def view(
    run: RunFolder,
    output: Output,
    port: Annotated[int, typer.Option(min=0, max=65535)] = 0,
    open_page: Annotated[bool, typer.Option("--open/--no-open")] = True,
) -> None:
    """Serve the run's interactive view on this machine, until Ctrl-C.

    Args:
        port: port of this machine to listen on; 0: any free one.
        open_page: open the page in a browser.
    """

    def show(address: str) -> None:
        output.say(f"view: {address}", highlight=False)
        output.say("Ctrl-C ends it")
        output.document({"address": address})
        sys.stdout.flush()

    open_view(Run.load(run, "cpu"), port=port, show=show, browser=open_page)


@command()
def demo(
    output: Output,
    out: Annotated[Path, typer.Option(rich_help_panel=RUN)] = Path("runs/demo"),
    head_units: HeadUnits = 32768,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Fine-tune a real BERT on 3,000 movie-review sentences and explain its errors.

    Args:
        out: folder of the run to write.
    """
    check_new_run(out, overwrite=True)
    task = FitConfig(
        ClassifierConfig(str(demo_data.model_folder()), head_units),
        TrainingConfig(head_learning_rate=5e-5, seed=seed),
        MaskSpec(seed=seed),
    )
    train, test = map(str, demo_data.write_sentences(out.parent / f"{out.name}-data"))
    both = read_both(task.classifier.reader(), train, test, Columns(id="id"), "train", "test")
    settings = {
        "data": train,
        "test": test,
        "id_column": "id",
        "data_digest": data_digest(*both),
        **asdict(cast(Any, task.classifier)),
        **asdict(task.training),
        "keep": task.masks.keep,
    }
    again = recipe(settings, ("data", "test", "model"))
    with freed_memory_kept():
        fitted = fit(task, *both, out, overwrite=True, recipe=again, device=device)
    print_fit(output, fitted)
    run = Run.load(out, device)
    metrics = score(run, ScoreConfig())
    print_influence(output, metrics)
    shown = explain_errors(output, run, show=3, top=5, among=None)
    page = out / "report.html"
    _write_report(output, run, page, texts=True)
    model = command_line("fit", "train.csv", "--model", task.classifier.model, "--out", "runs/mine")
    output.say(f"run: {out}; next: {command_line('view', out)}")
    output.say(f"this model on your own texts: {model}", highlight=False)
    document = {"run": str(out), "metrics": metrics, "file": str(page)}
    output.document(document | {"explanations": [one.to_dict() for one in shown]})


def _write_report(output: Output, run: Run, out: Path, *, texts: bool) -> None:
    made = ("influence", "explain", "report")
    commands = tuple(command_line(command, run.folder) for command in made)
    title = f"{run.folder.resolve().name}: which training instances are behind its errors"
    with damage(run.folder / "metrics.json"):
        write(content(run, title=title, commands=commands), out, texts=texts)
    output.say(f"report: {out}")
