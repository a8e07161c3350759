"""Commands that make pages: ``report``, ``view``, and ``demo``, the whole way on real sentences."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from turnover.cli.options import RUN, HeadUnits, Json, RunFolder, Seed
from turnover.cli.output import Output, check_folder
from turnover.cli.scores import explain_errors, print_influence
from turnover.cli.training import print_fit

if TYPE_CHECKING:
    from turnover.runs.run import Run


def report(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; default: report.html in the run.")
    ] = None,
    text: Annotated[
        bool, typer.Option(help="Show texts and images; --no-text leaves them out.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Write the run's report: one HTML file that needs nothing else."""
    from turnover.runs.run import Run

    check_folder(out)
    path = out or run / "report.html"
    output = Output(as_json=as_json)
    _write_report(output, Run.load(run), path, texts=text)
    output.document({"file": str(path)})


def view(
    run: RunFolder,
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Port of this machine to listen on; 0: a free one."),
    ] = 0,
    open_page: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the page in a browser.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Serve the run's interactive view on this machine, until Ctrl-C."""
    from turnover.runs.run import Run
    from turnover.view import open_view

    output = Output(as_json=as_json)

    def show(address: str) -> None:
        output.say(f"view: {address}", highlight=False)
        output.say("Ctrl-C ends it")
        output.document({"address": address})
        sys.stdout.flush()

    open_view(Run.load(run), port=port, show=show, browser=open_page)


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder of the run to write.", rich_help_panel=RUN)
    ] = Path("runs/demo"),
    head_units: HeadUnits = 32768,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Fine-tune a real BERT on 3,000 movie-review sentences and explain its errors."""
    from turnover.cli.config import recipe
    from turnover.data.base import Columns, read_both
    from turnover.data.demo import model_folder, write_sentences
    from turnover.data.text import read
    from turnover.dropout.masks import MaskSpec
    from turnover.models.text import ClassifierConfig
    from turnover.runs.run import Run, check_new_run, data_digest
    from turnover.tasks.fit import FitConfig, fit
    from turnover.tasks.score import ScoreConfig, score
    from turnover.tasks.training import TrainingConfig

    check_new_run(out, overwrite=True)
    output = Output(as_json=as_json)
    task = FitConfig(
        ClassifierConfig(str(model_folder()), head_units),
        TrainingConfig(head_learning_rate=5e-5, seed=seed),
        MaskSpec(seed=seed),
    )
    files = write_sentences(out.parent / f"{out.name}-data")
    train, test = map(str, files)
    both = read_both(read, train, test, Columns(id="id"), "train", "test")
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
    print_fit(output, fit(task, *both, out, overwrite=True, recipe=again))
    run = Run.load(out)
    metrics = score(run, ScoreConfig())
    print_influence(output, metrics)
    shown = explain_errors(output, run, show=3, top=5, among=None)
    page = out / "report.html"
    _write_report(output, run, page, texts=True)
    explanations = [one.to_dict() for one in shown]
    output.document(
        {"run": str(out), "metrics": metrics, "explanations": explanations, "file": str(page)}
    )


def _write_report(output: Output, run: Run, out: Path, *, texts: bool) -> None:
    from turnover.io.parsing import damage
    from turnover.report.from_run import content
    from turnover.report.render import write

    commands = tuple(
        f"turnover {command} {shlex.quote(str(run.folder))}"
        for command in ("influence", "explain", "report")
    )
    title = f"{run.folder.resolve().name}: which training instances are behind its errors"
    with damage(run.folder / "metrics.json"):
        write(content(run, title=title, commands=commands), out, texts=texts)
    output.say(f"report: {out}")
