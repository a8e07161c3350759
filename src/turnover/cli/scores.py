"""Commands that say what training instances did: ``influence``, ``explain``, ``groups``, ``memorize``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from turnover.cli.config import config_option
from turnover.cli.engines import connecting
from turnover.cli.options import Json, Objective, RunFolder
from turnover.cli.output import Output, in_results
from turnover.errors import InputError

if TYPE_CHECKING:
    from turnover.runs.run import Run
    from turnover.tasks.explain import Explanation
    from turnover.tasks.groups import Groups
    from turnover.tasks.memorize import Memorization


def influence(
    run: RunFolder,
    method: Annotated[
        Literal["linear", "exact", "rerank", "auto"],
        typer.Option(
            help="Estimator of the pairs: rerank is linear, then exact for the ends; auto the most exact "
            "within --seconds. Gram stands beside them (--gram)."
        ),
    ] = "linear",
    objective: Objective = "margin",
    ghosts: Annotated[
        int, typer.Option(min=10, help="Ghosts that fit the noise floor; as many check it.")
    ] = 4000,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="Scored site or pattern (repeatable), '*' for all; default: those that carry more "
            "signal than noise."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="What --method auto may take, in seconds.")
    ] = 60.0,
    explain_plan: Annotated[
        bool,
        typer.Option(
            help="Print estimated time, memory and noise of each method, and stop.",
        ),
    ] = False,
    gram: Annotated[
        bool,
        typer.Option(help="Also estimate by gram, which takes a pass over the training data."),
    ] = True,
    engine: Annotated[
        Literal["process", "ray"],
        typer.Option(
            help="What computes the influence on the errors: this process, or the workers of a Ray cluster, "
            "in the same bits."
        ),
    ] = "process",
    address: Annotated[
        str | None,
        typer.Option(
            help="Host and port of the Ray cluster, host:port; its nodes share the run's folder. Without it "
            "RAY_ADDRESS, or this machine."
        ),
    ] = None,
    config: Annotated[Path | None, config_option()] = None,  # noqa: ARG001 - its callback reads it
    as_json: Json = False,
) -> None:
    """Estimate influence on every misclassified test row, on the whole test set, and on itself.

    Where it was interrupted, the same command goes on.
    """
    from turnover.runs.run import Run
    from turnover.tasks.score import ScoreConfig, score
    from turnover.tasks.score import explain_plan as explained

    output = Output(as_json=as_json)
    sites = tuple(site) if site else None
    task = ScoreConfig(method, objective, ghosts, sites, seconds, gram)
    connection = connecting(engine, address)
    loaded = Run.load(run)
    if explain_plan:
        plan = explained(loaded, task)
        said = str(plan or "no misclassified test rows: nothing to score")
        output.say(said, highlight=False)
        output.document({"plan": plan and plan.to_dict()})
        return
    with connection:
        metrics = score(loaded, task, engine=engine)
    print_influence(output, metrics)
    output.say(f"next: turnover explain {run}, turnover report {run}")
    output.document({"run": str(run), "metrics": metrics})


def explain(
    run: RunFolder,
    show: Annotated[int, typer.Option(min=0, help="Errors to print; all are written.")] = 3,
    top: Annotated[int, typer.Option(min=1, help="Training instances on each side.")] = 5,
    among: Annotated[
        Literal["predicted", "true"] | None,
        typer.Option(help="List training instances of this class alone. Default: of all."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Explain this text instead.")] = None,
    image: Annotated[Path | None, typer.Option(help="Explain this image file instead.")] = None,
    label: Annotated[
        str | None,
        typer.Option(help="Class to explain --text or --image for; default: as predicted."),
    ] = None,
    gram: Annotated[
        bool,
        typer.Option(
            help="Explain --text or --image by gram as well: a pass over the training data."
        ),
    ] = True,
    sheet: Annotated[
        Path | None, typer.Option(help="Also write a contact sheet of what is shown (PNG; images).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Explain misclassified test rows, or one text or image, by training instances."""
    from turnover.data.images import ImageData
    from turnover.runs.run import Run
    from turnover.tasks.score import explain_input

    if text is not None and image is not None:
        raise InputError("--text and --image are two things to explain: give one of them")
    output = Output(as_json=as_json)
    loaded = Run.load(run)
    if sheet is not None:
        from turnover.report.pictures import check_sheet

        if not isinstance(loaded.train, ImageData):
            raise InputError("--sheet is for images; texts are in the report (turnover report)")
        check_sheet(sheet)
    given = text if text is not None else image
    if given is None:
        shown = explain_errors(output, loaded, show=show, top=top, among=among)
        targets = loaded.test
    else:
        explained, targets = explain_input(loaded, given, label, top=top, among=among, gram=gram)
        shown = [explained]
        _print_explanations(output, shown)
    if sheet is not None:
        from turnover.report.pictures import write_sheet

        assert isinstance(loaded.train, ImageData)
        assert isinstance(targets, ImageData)
        write_sheet(shown, loaded.train, targets, sheet)
        output.say(f"contact sheet: {sheet}")
    output.document([one.to_dict() for one in shown])


def groups(
    run: RunFolder,
    method: Annotated[Literal["linear", "exact"], typer.Option(help="Estimator.")] = "linear",
    objective: Objective = "margin",
    show: Annotated[
        int, typer.Option(min=0, help="Groups at either end to print, and to predict without.")
    ] = 10,
    as_json: Json = False,
) -> None:
    """What each group (source, annotator) of a run with a group column did to the test rows."""
    from turnover.io.parsing import write_json
    from turnover.runs.run import Run
    from turnover.tasks.groups import groups
    from turnover.tasks.score import OBJECTIVES

    output = Output(as_json=as_json)
    found = groups(Run.load(run), OBJECTIVES[objective], method=method, predict=show)
    path = in_results(run, "groups.json")
    write_json(path, found.to_dict())
    _print_groups(output, found)
    output.say(f"all groups: {path}")
    output.document(found.to_dict())


def memorize(
    run: RunFolder,
    show: Annotated[int, typer.Option(min=0, help="Rows to print; all are written.")] = 5,
    as_json: Json = False,
) -> None:
    """What was learned by heart, and when, in a run trained with --memorization."""
    from turnover.runs.run import Run
    from turnover.tasks.memorize import memorization, write_memorization

    output = Output(as_json=as_json)
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
    from turnover.io.parsing import write_json
    from turnover.report.from_run import explain_errors as explained

    explanations = explained(run, top=top, among=among)
    path = run.folder / "results" / "explanations.json"
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


def _print_groups(output: Output, found: Groups) -> None:
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
    from turnover.tasks.explain import GRAM_MEANS, TURNOVER_MEANS

    for explanation in explanations:
        _print_explanation(output, explanation)
    if any(explanation.gram for explanation in explanations):
        for meaning in (TURNOVER_MEANS, GRAM_MEANS):
            output.say(meaning, highlight=False)


def _print_explanation(output: Output, explanation: Explanation) -> None:
    from turnover.tasks.explain import NOT_SIGNIFICANT

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
