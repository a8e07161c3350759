"""The command ``fairness``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from turnover.cli.options import Count, Device, Positive, RunFolder
from turnover.cli.output import Cut, Output, check_folder, command_line, in_results
from turnover.cli.parameters import command
from turnover.errors import InputError
from turnover.fairness import Gap
from turnover.runs.run import Run
from turnover.runs.source import check_spared, usual_ending
from turnover.tasks import fairness as fairness_task
from turnover.tasks.explain import SIGNIFICANT_Q


@command()
def fairness(
    run: RunFolder,
    output: Output,
    attributes: Path,
    positive: str,
    column: str = "attribute",
    gap: Literal[
        "demographic_parity", "equal_opportunity", "equalized_odds"
    ] = "demographic_parity",
    method: Literal["gram", "linear", "exact"] = "gram",
    budget: Positive = 100,
    decision: Literal["remove", "relabel"] | None = None,
    show: Count = 10,
    out: Path | None = None,
    device: Device = "auto",
) -> None:
    """Measure gaps between two groups of test rows, and list the training rows that widen one most.

    Args:
        attributes: CSV file with the columns key and attribute of the test rows; the attribute has two
            values.
        positive: class whose rates are compared, such as approved.
        column: column of the attribute.
        gap: the gap to find training rows for; all three are printed.
        method: estimator; linear and exact need a network with turn-over masks.
        budget: most rows, or groups of a run with a group column, to list.
        decision: fill in the column decision of all listed rows; relabel is the other of two classes.
        show: rows to print.
        out: CSV file to write; default: in the run's results.
    """
    check_folder(out)
    if out is not None and out.suffix != ".csv":
        raise InputError(f"{out}: the list is a CSV file")
    loaded = Run.load(run, device)
    check_spared(loaded, out, attributes)
    fairness_task.check_decision(loaded, decision)
    values = fairness_task.read_attribute(loaded.test, attributes, column)
    found = fairness_task.fairness(
        loaded, values, positive=positive, gap=gap, method=method, budget=budget
    )
    path = out or in_results(run, "fairness.csv")
    fairness_task.write_widening(loaded, found, path, decision=decision)
    _print_gaps(output, found)
    _print_widening(output, found, show)
    output.say(f"all listed: {path}")
    if not found.grouped:
        fill = "" if decision else "fill in the column decision (keep, remove or a class), then: "
        fairer = f"fairer{usual_ending(loaded)}"
        output.say(fill + command_line("review", run, "--decisions", path, "--out", fairer))
    output.document(found.to_dict() | {"file": str(path), "device": device})


def _print_gaps(output: Output, found: fairness_task.Fairness) -> None:
    measured = {
        "demographic parity": found.gaps.demographic_parity,
        "equal opportunity": found.gaps.equal_opportunity,
        "equalized odds": found.gaps.equalized_odds,
    }
    names = list(found.gaps.demographic_parity.rates)
    output.table(
        ("gap", "difference", "95% interval", *(f"{found.positive!r}: {name}" for name in names)),
        ((name, *_cells(gap, names)) for name, gap in measured.items()),
        bold=[list(measured).index(found.gap.replace("_", " "))],
    )
    output.say(f"*: the gap to find training rows for; accuracy {found.gaps.accuracy:.3f}")


def _cells(gap: Gap | None, names: list[str]) -> list[str]:
    if gap is None:
        return ["unknown", "", *("" for _ in names)]
    rates = (f"{gap.rates[name]:.3f} of {gap.rows[name]}" for name in names)
    return [f"{gap.value:.3f}", f"{gap.low:.3f} to {gap.high:.3f}", *rates]


def _print_widening(output: Output, found: fairness_task.Fairness, show: int) -> None:
    kind = "group" if found.grouped else "training row"
    output.table(
        (f"{kind} that widens the gap", "label or rows", "score", "z", "q"),
        (
            (
                Cut(f"[{one.key}] {one.text or ''}"),
                one.label or str(one.rows),
                *(f"{one.score:+.5f}", f"{one.z:+.1f}", f"{one.q:.2g}"),
            )
            for one in found.widening[:show]
        ),
    )
    significant = sum(one.q <= SIGNIFICANT_Q for one in found.widening)
    output.say(
        f"{len(found.widening)} of {found.count} {kind}s that widen it listed, {significant} with q <= "
        f"{SIGNIFICANT_Q:g}, by {found.method}; measure the gap after retraining on other rows than "
        f"these test rows"
    )
