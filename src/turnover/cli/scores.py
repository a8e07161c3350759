"""Commands that say what training instances did: ``influence``, ``explain``, ``groups``, ``memorize``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from turnover.cli.config import config_option
from turnover.cli.options import Count, Device, Objective, Positive, RunFolder
from turnover.cli.output import Cut, Output, command_line, in_results
from turnover.cli.parameters import Fields, build, command
from turnover.data.base import Data
from turnover.errors import InputError
from turnover.io.parsing import write_json
from turnover.report.pictures import check_sheet, write_sheet
from turnover.runs.run import Run
from turnover.runs.targets import EXPLANATIONS
from turnover.tasks import explain as explain_task
from turnover.tasks import groups as groups_task
from turnover.tasks import score as score_task
from turnover.tasks.explain import Explanation, GramExplanation, Influential
from turnover.tasks.memorize import memorization, write_memorization
from turnover.tasks.score_plan import explain_plan as plan_of_scores

_METHOD = typer.Option(
    help="Estimator of the pairs: rerank is linear, then exact for the extremes; auto is the most exact "
    "within --seconds. Gram is estimated beside them (--gram)."
)
_SITES = typer.Option(
    help="Scored site or pattern (repeatable), '*' for all; default: those that carry more signal than "
    "noise."
)


@command(
    Fields(
        score_task.ScoreConfig,
        types={
            "method": Annotated[Literal["linear", "exact", "rerank", "auto"], _METHOD],
            "objective": Objective,
            "sites": Annotated[list[str] | None, _SITES],
        },
    ),
    config=config_option(),
)
def influence(
    run: RunFolder,
    output: Output,
    explain_plan: bool = False,
    engine: Literal["process", "ray"] = "process",
    address: str | None = None,
    device: Device = "auto",
    **options: Any,
) -> None:
    """Estimate influence on every misclassified test row, on the whole test set, and on itself.

    If it was interrupted, the same command resumes.

    Args:
        explain_plan: print estimated time and memory of all steps, and noise of each method, and stop.
        engine: where the influence on the errors is computed: in this process, or on a Ray cluster's
            workers, with the same bits. Ray's nodes share the run's folder.
        address: address of the Ray cluster, host:port; default: RAY_ADDRESS, or a cluster on this machine.
    """
    task = build(score_task.ScoreConfig, options)
    if address is not None and engine != "ray":
        raise InputError("--address is that of a Ray cluster: give --engine ray as well")
    connection = _connected(address) if engine == "ray" else nullcontext()
    loaded = Run.load(run, device)
    if explain_plan:
        plan = plan_of_scores(loaded, task)
        said = str(plan or "no misclassified test rows: nothing to score")
        output.say(said, highlight=False)
        output.document({"plan": plan and plan.to_dict(), "device": device})
        return
    with connection:
        metrics = score_task.score(loaded, task, engine=engine)
    print_influence(output, metrics)
    output.say(f"next: {next_commands(loaded.train, run, 'explain', 'report')}")
    output.document({"run": str(run), "metrics": metrics})


@command()
def explain(
    run: RunFolder,
    output: Output,
    show: Count = 3,
    top: Positive = 5,
    among: Literal["predicted", "true"] | None = None,
    text: str | None = None,
    image: Path | None = None,
    label: str | None = None,
    gram: bool = True,
    sheet: Path | None = None,
    device: Device = "auto",
) -> None:
    """Explain misclassified test rows, or one text or image, by training instances.

    Args:
        show: errors to print; all are written.
        top: training instances on each side.
        among: list training instances of this class only. Default: of all.
        text: explain this text instead.
        image: explain this image file instead.
        label: class to explain --text or --image for; default: the predicted one.
        gram: also explain --text or --image by gram, which takes a pass over the training data.
        sheet: also write a contact sheet of what is shown (PNG; images).
    """
    if text is not None and image is not None:
        raise InputError("--text and --image are two things to explain: give one of them")
    loaded = Run.load(run, device)
    if sheet is not None:
        check_sheet(sheet, loaded.train)
    given = text if text is not None else image
    if given is None:
        shown = explain_errors(output, loaded, show=show, top=top, among=among)
        targets = loaded.test
    else:
        explained, targets = score_task.explain_input(
            loaded, given, label, top=top, among=among, gram=gram
        )
        shown = [explained]
        _print_explanations(output, shown)
    if sheet is not None:
        write_sheet(shown, loaded.train, targets, sheet)
        output.say(f"contact sheet: {sheet}")
    output.document([one.to_dict() for one in shown])


@command()
def groups(
    run: RunFolder,
    output: Output,
    method: Literal["linear", "exact"] = "linear",
    objective: Objective = "margin",
    show: Count = 10,
    device: Device = "auto",
) -> None:
    """Measure what each group (source, annotator) of a run with a group column did to the test rows.

    Args:
        method: estimator.
        objective: cost of a prediction in nats: minus the log-odds of the true class, or its loss.
        show: groups at either end to print, and to predict without.
    """
    cost = score_task.OBJECTIVES[objective]
    found = groups_task.groups(Run.load(run, device), cost, method=method, predict=show)
    path = in_results(run, "groups.json")
    document = found.to_dict() | {"device": device}
    write_json(path, document)
    _print_groups(output, found, show)
    count = len(found.groups)
    output.say(f"{min(2 * show, count)} of {count} groups; all: {path}")
    output.document(document)


@command()
def memorize(run: RunFolder, output: Output, show: Count = 5) -> None:
    """Show what was memorized, and when, in a run trained with --memorization.

    Args:
        show: rows to print; all are written.
    """
    loaded = Run.load(run, "cpu")  # nothing is computed
    train, found = loaded.train, memorization(loaded)
    path = in_results(run, "memorization.csv")
    write_memorization(loaded, found, path)
    rows = [
        {
            "key": train.keys[row],
            "label": train.classes[train.labels[row]],
            "memorization": float(found.memorization[row]),
            "text": train.shown(row),
        }
        for row in found.order()[:show].tolist()
    ]
    curves = {
        name: {"exposed": exposed.tolist(), "hidden": hidden.tolist()}
        for name, (exposed, hidden) in found.curves().items()
    }
    epochs = [f"epoch {epoch + 1}" for epoch in range(len(found.exposed))]
    losses = [
        [name, side, *(f"{loss:.3f}" for loss in values)]
        for name, sides in curves.items()
        for side, values in sides.items()
    ]
    output.table(["mean loss, nats", "network", *epochs], losses)
    if rows:
        columns = ("hidden - exposed", "label", "most memorized training row")
        texts = [Cut(f"[{one['key']}] {one['text']}") for one in rows]
        listed = zip(rows, texts, strict=True)
        output.table(
            columns, ([f"{one['memorization']:+.3f}", one["label"], text] for one, text in listed)
        )
    output.say(f"{len(rows)} of {len(train)} rows; all: {path}")
    output.document({"file": str(path), "curves": curves, "rows": rows})


def _connected(address: str | None) -> AbstractContextManager[None]:
    from turnover.parallel.ray import connected

    return connected(address)


def next_commands(train: Data, run: Path, *commands: str) -> str:
    """List commands to go on with, that of groups first where the training rows have them."""
    names = ("groups", *commands) if train.grouped else commands
    return ", ".join(command_line(name, run) for name in names)


def print_influence(output: Output, metrics: dict[str, Any]) -> None:
    """Print a summary of an estimate."""
    found = metrics["influence"]
    if not metrics["errors_explained"]:
        output.say("no misclassified test rows")
        return
    seconds = f"{metrics['seconds']['influence']:.0f} s"
    groups = metrics.get("n_groups")
    trained = f"{metrics['n_train']} training " + ("instances" if groups is None else "rows")
    columns = trained if groups is None else f"{groups} groups of {trained}"
    if found["method"] == "gram":
        output.say(
            f"{metrics['errors_explained']} targets x {columns} by gram: "
            f"median standard error {found['median_standard_error']:.2g} nats; {seconds}"
        )
        return
    output.say(
        f"{metrics['errors_explained']} errors x {columns}: "
        f"{metrics['significant_pairs']} pairs with q <= 0.05, on "
        f"{found['errors_with_significant_pairs']} errors; fresh ghosts at p < 0.01: "
        f"{metrics['ghost_false_positive_rate']:.4f}; {seconds}"
    )


def explain_errors(
    output: Output, run: Run, *, show: int, top: int, among: str | None
) -> list[Explanation]:
    """Explain all errors of a run, write them, and print those with the most significant instances."""
    explanations = explain_task.explain_errors(run, top=top, among=among)
    path = run.folder / "results" / EXPLANATIONS
    write_json(path, {"errors": [explanation.to_dict() for explanation in explanations]})
    explanations.sort(key=lambda explanation: -explanation.n_significant)
    _print_explanations(output, explanations[:show])
    output.say(f"{len(explanations[:show])} of {len(explanations)} errors; all: {path}")
    return explanations[:show]


def _print_groups(output: Output, found: groups_task.Groups, show: int) -> None:
    if found.accuracy_spread is None:
        ends = found.groups
        if len(ends) > 2 * show:
            ends = (*ends[:show], *ends[len(ends) - show :])
        output.table(
            ("group", "rows", "nats", "standard error"),
            (
                (one.key, str(one.rows), f"{one.score:+.4f}", f"{one.standard_error:.2g}")
                for one in ends
            ),
        )
        output.say(
            f"by gram: sums over the rows of each group; accuracies with and without a group need "
            f"turn-over training (turnover fit); accuracy of the model {found.accuracy:.3f}"
        )
        return
    listed = [
        (one, f"{one.accuracy_with:.3f}", f"{one.accuracy_without:.3f}")
        for one in found.groups
        if one.accuracy_with is not None and one.accuracy_without is not None
    ]
    output.table(
        ("group", "rows", "nats", "z", "q", "accuracy with", "without"),
        (
            (one.key, str(one.rows), f"{one.score:+.4f}", f"{one.z:+.1f}", f"{one.q:.2g}", *both)
            for one, *both in listed
        ),
        bold=[number for number, (one, *_) in enumerate(listed) if one.significant],
    )
    output.say(
        f"{sum(one.significant for one in found.groups)} of {len(found.groups)} groups have q <= 0.05 "
        f"(*); accuracy of the whole network {found.accuracy:.3f}; by chance (without - with) differs "
        f"by {found.accuracy_spread:.3f}"
    )


def _print_explanations(output: Output, explanations: list[Explanation]) -> None:
    for one in explanations:
        title = f"{one.true_label}, predicted {one.predicted_label} ({one.confidence:.0%})"
        output.say(Cut(one.text))
        if one.is_gram:
            _print_gram(output, one, title=title)
            continue
        output.table(
            ("", "label", "nats", "z", "q", "training instance"),
            _rows(one, lambda item: (f"{item.z:+.1f}", _q(item))),
            title=title,
        )
        if one.gram is not None:
            _print_gram(output, one.gram)
    if any(one.gram for one in explanations):
        output.say(f"{explain_task.TURNOVER_MEANS}\n{explain_task.GRAM_MEANS}", highlight=False)
    elif any(one.is_gram for one in explanations):
        output.say(explain_task.GRAM_MEANS, highlight=False)


def _print_gram(
    output: Output, sides: Explanation | GramExplanation, *, title: str | None = None
) -> None:
    output.table(
        ("gram", "label", "nats", "standard error", "training instance"),
        _rows(sides, lambda item: (f"{item.standard_error:.2g}",)),
        title=title,
    )


def _rows(
    sides: Explanation | GramExplanation, figures: Callable[[Any], Iterable[str]]
) -> Iterator[list[str | Cut]]:
    for side, items in (("helpful", sides.helpful), ("harmful", sides.harmful)):
        for one in items:
            text = Cut(f"[{one.key}] {one.text}")
            yield [side, one.label, f"{one.score:+.3f}", *figures(one), text]


def _q(item: Influential) -> str:
    return f"{item.q:.2g}" if item.significant else f"{item.q:.2f} {explain_task.NOT_SIGNIFICANT}"
