"""Commands that say what training instances did: ``influence``, ``explain``, ``groups``, ``memorize``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from turnover.cli.config import config_option
from turnover.cli.options import Address, Count, Engine, Objective, Positive, Rate, RunFolder
from turnover.cli.output import Output, in_results
from turnover.cli.parameters import Fields, build, command
from turnover.errors import InputError
from turnover.io.parsing import write_json
from turnover.report.pictures import check_sheet, write_sheet
from turnover.runs.run import Run
from turnover.runs.targets import EXPLANATIONS
from turnover.tasks import explain as explain_task
from turnover.tasks import groups as groups_task
from turnover.tasks import score as score_task
from turnover.tasks.explain import GRAM_MEANS, NOT_SIGNIFICANT, TURNOVER_MEANS, Explanation
from turnover.tasks.memorize import Memorization, memorization, write_memorization

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
            "ghosts": Annotated[int, typer.Option(min=10)],
            "sites": Annotated[list[str] | None, _SITES],
            "seconds": Rate,
        },
    ),
    config=config_option(),
)
def influence(
    run: RunFolder,
    output: Output,
    explain_plan: bool = False,
    engine: Engine = "process",
    address: Address = None,
    **options: Any,
) -> None:
    """Estimate influence on every misclassified test row, on the whole test set, and on itself.

    If it was interrupted, the same command resumes.

    Args:
        explain_plan: print estimated time, memory and noise of each method, and stop.
        engine: where the influence on the errors is computed: in this process, or on a Ray cluster's
            workers, with the same bits. Ray's nodes share the run's folder.
    """
    task = build(score_task.ScoreConfig, options)
    connection = connecting(engine, address)
    loaded = Run.load(run)
    if explain_plan:
        plan = score_task.explain_plan(loaded, task)
        said = str(plan or "no misclassified test rows: nothing to score")
        output.say(said, highlight=False)
        output.document({"plan": plan and plan.to_dict()})
        return
    with connection:
        metrics = score_task.score(loaded, task, engine=engine)
    print_influence(output, metrics)
    output.say(f"next: turnover explain {run}, turnover report {run}")
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
    loaded = Run.load(run)
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
) -> None:
    """Measure what each group (source, annotator) of a run with a group column did to the test rows.

    Args:
        method: estimator.
        objective: cost of a prediction in nats: minus the log-odds of the true class, or its loss.
        show: groups at either end to print, and to predict without.
    """
    cost = score_task.OBJECTIVES[objective]
    found = groups_task.groups(Run.load(run), cost, method=method, predict=show)
    path = in_results(run, "groups.json")
    write_json(path, found.to_dict())
    _print_groups(output, found)
    output.say(f"all groups: {path}")
    output.document(found.to_dict())


@command()
def memorize(run: RunFolder, output: Output, show: Count = 5) -> None:
    """Show what was memorized, and when, in a run trained with --memorization.

    Args:
        show: rows to print; all are written.
    """
    loaded = Run.load(run)
    found = memorization(loaded)
    path = in_results(run, "memorization.csv")
    write_memorization(loaded, found, path)
    rows = _by_heart(loaded, found, show)
    curves = {
        name: {"exposed": exposed.tolist(), "hidden": hidden.tolist()}
        for name, (exposed, hidden) in found.curves().items()
    }
    _print_memorization(output, curves, rows)
    output.say(f"all rows: {path}")
    output.document({"file": str(path), "curves": curves, "rows": rows})


def connecting(engine: str, address: str | None) -> AbstractContextManager[None]:
    """Connect to the Ray cluster, if that is the engine, while the body of a with statement runs.

    Raises:
        InputError: an address for another engine, or Ray is missing; on entry: no cluster was found.
    """
    if engine != "ray":
        if address is not None:
            raise InputError("--address is that of a Ray cluster: give --engine ray as well")
        return nullcontext()
    from turnover.parallel.ray import connected

    return connected(address)


def print_influence(output: Output, metrics: dict[str, Any]) -> None:
    """What an estimate found."""
    found = metrics["influence"]
    if not metrics["errors_explained"]:
        output.say("no misclassified test rows")
        return
    output.say(
        f"{metrics['errors_explained']} errors x {metrics['n_train']} training instances: "
        f"{metrics['significant_pairs']} pairs with q <= 0.05, on "
        f"{found['errors_with_significant_pairs']} errors; fresh ghosts at p < 0.01: "
        f"{metrics['ghost_false_positive_rate']:.4f}; {metrics['seconds']['influence']:.0f} s"
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
    output.say(f"all errors: {path}")
    return explanations[:show]


def _by_heart(run: Run, found: Memorization, show: int) -> list[dict[str, Any]]:
    return [
        {
            "key": run.train.keys[row],
            "label": run.train.classes[run.train.labels[row]],
            "by_heart": float(found.by_heart[row]),
            "text": run.train.shown(row),
        }
        for row in (-found.by_heart).argsort(kind="stable")[:show].tolist()
    ]


def _print_memorization(
    output: Output, curves: dict[str, dict[str, list[float]]], rows: list[dict[str, Any]]
) -> None:
    epochs = len(curves["all"]["exposed"])
    table = Table("mean loss, nats", "network", *(f"epoch {epoch + 1}" for epoch in range(epochs)))
    for name, sides in curves.items():
        for side, losses in sides.items():
            table.add_row(name, side, *(f"{loss:.3f}" for loss in losses))
    output.say(table)
    listed = Table("hidden - exposed", "label", "training row most learned by heart")
    for one in rows:
        listed.add_row(f"{one['by_heart']:+.3f}", one["label"], f"[{one['key']}] {one['text']}")
    if rows:
        output.say(listed)


def _print_groups(output: Output, found: groups_task.Groups) -> None:
    table = Table("group", "rows", "nats", "z", "q", "accuracy with", "without")
    for one in found.groups:
        if one.accuracy_with is None or one.accuracy_without is None:
            continue
        style = "bold" if one.significant else None
        cells = [one.key, str(one.rows), f"{one.score:+.4f}", f"{one.z:+.1f}", f"{one.q:.2g}"]
        cells += [f"{one.accuracy_with:.3f}", f"{one.accuracy_without:.3f}"]
        table.add_row(*cells, style=style)
    output.say(table)
    output.say(
        f"{sum(one.significant for one in found.groups)} of {len(found.groups)} groups have q <= 0.05 "
        f"(bold); whole network {found.accuracy:.3f}; by chance (without - with) differs by "
        f"{found.accuracy_spread:.3f}"
    )


def _print_explanations(output: Output, explanations: list[Explanation]) -> None:
    for explanation in explanations:
        _print_explanation(output, explanation)
    if any(explanation.gram for explanation in explanations):
        for meaning in (TURNOVER_MEANS, GRAM_MEANS):
            output.say(meaning, highlight=False)


def _print_explanation(output: Output, explanation: Explanation) -> None:
    table = Table(
        "",
        "label",
        "nats",
        "z",
        "q",
        "training instance",
        title=(
            f"{explanation.text}\n{explanation.true_label}, predicted {explanation.predicted_label} "
            f"({explanation.confidence:.0%})"
        ),
        title_justify="left",
    )
    for side, instances in (("helpful", explanation.helpful), ("harmful", explanation.harmful)):
        for one in instances:
            q = f"{one.q:.2g}" if one.significant else f"{one.q:.2f} {NOT_SIGNIFICANT}"
            table.add_row(
                side, one.label, f"{one.score:+.3f}", f"{one.z:+.1f}", q, f"[{one.key}] {one.text}"
            )
    output.say(table)
    if explanation.gram is None:
        return
    table = Table("gram", "label", "nats", "standard error", "training instance")
    beside = (("helpful", explanation.gram.helpful), ("harmful", explanation.gram.harmful))
    for side, listed in beside:
        for item in listed:
            error = f"{item.standard_error:.3f}"
            text = f"[{item.key}] {item.text}"
            table.add_row(side, item.label, f"{item.score:+.3f}", error, text)
    output.say(table)
