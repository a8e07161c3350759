"""Puts the figures on agents into ``docs/reinforcement.md``, between its markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.fidelity.table import replaced

from . import learning, planted
from .run import RESULTS

DOCS = Path(__file__).parent.parent.parent / "docs" / "reinforcement.md"
Json = dict[str, Any]
Floats = NDArray[np.float64]

_KINDS = {
    "rewards": "negated rewards",
    "actions": "opposite actions stored",
    "demonstrator": "bad demonstrator, true rewards",
}
_JUDGES = {
    ("ours", "regression"): "own targets, regression",
    ("ours", "hidden minus exposed"): "own targets, hidden minus exposed",
    ("half", "regression"): "own targets, keep 0.5, regression",
    ("recipe", "regression"): "published recipe, regression",
    ("recipe", "hidden minus exposed"): "published recipe, hidden minus exposed",
}


def _lines(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _interval(
    values: list[float], by: list[int], draws: int = 10_000
) -> tuple[float, float, float]:
    """Mean and its 95% bootstrap interval over data sets."""
    random = np.random.default_rng(0)
    sets = sorted(set(by))
    means = np.array(
        [np.mean([v for v, b in zip(values, by, strict=True) if b == s]) for s in sets]
    )
    drawn = means[random.integers(0, len(sets), (draws, len(sets)))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(means.mean()), float(low), float(high)


def _said(found: tuple[float, float, float], digits: int = 0) -> str:
    mean, low, high = found
    return f"{mean:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def planted_table(results: Json) -> str:
    """Whether the harmful sources are found, and returns without what was picked."""
    rows = []
    for (method, judge), title in _JUDGES.items():
        for kind, said in _KINDS.items():
            prefix = f"planted/{method}/{kind}/"
            names = [name for name in results if name.startswith(prefix)]
            if not names:
                continue
            runs = [results[name] for name in names]
            data = [int(name.split("/")[3]) for name in names]
            aucs = [run["auc"][judge] for run in runs]
            both = [set(run["picked"][judge]) == set(run["bad"]) for run in runs]
            bad = np.concatenate([run["t_bad"] for run in runs])
            clean = np.concatenate([run["t_clean"] for run in runs])
            t = f"{np.median(bad):.1f}; {(bad <= -3).mean():.0%}" if judge == "regression" else ""
            low = f"{(clean < -2.5).mean():.1%}" if judge == "regression" else ""
            gains, of = _gains(runs, data, judge)
            rows.append(
                [
                    title,
                    said,
                    f"{np.mean(aucs):.2f}",
                    f"{sum(both)} of {len(both)}",
                    t,
                    low,
                    _said(_interval([run["return"]["whole"] for run in runs], data)),
                    _said(_interval(gains, of)) if gains else "",
                ]
            )
    header = [
        "method",
        "harm",
        "AUC",
        "both picked",
        "t of the harmful: median; share ≤ -3",
        "clean t < -2.5",
        "return of the whole agent",
        "return without the two picked, minus without two ghosts",
    ]
    shares = [
        run["ghosts_below_0.05"] for name, run in results.items() if name.startswith("planted/ours")
    ]
    above = [
        run["loss_hidden_above_exposed"]
        for name, run in results.items()
        if name.startswith("planted/recipe")
    ]
    text = (
        f"Twelve sources recorded a pendulum with five torques in random actions, 800 transitions each; two "
        f"have 3,200 and are harmful. DQN from the recordings, {planted.UPDATES:,} updates; as many data "
        f"sets x networks as the fourth column says. Settings were chosen on network 0 of data sets 0 and 1. "
        f"Intervals (95%) are over data sets.\n\n{_lines(header, rows)}\n\n"
        f"Of 1,000 ghosts {np.mean(shares):.1%} have p < 0.05 "
        f"({min(shares):.1%} to {max(shares):.1%} in single agents). "
    )
    if above:
        text += (
            f"With the published recipe {np.mean(above):.0%} of the groups have a higher loss hidden than "
            f"exposed, harmful or not: it learned them. "
        )
    if "left out/0" in results:
        text += _left_out(results["left out/0"])
    return text


def _gains(runs: list[Json], data: list[int], judge: str) -> tuple[list[float], list[int]]:
    gains, of = [], []
    for run, one in zip(runs, data, strict=True):
        amended, ghosts = run["return"][judge], run["return"]["ghosts"]
        if amended is not None and ghosts:
            gains.append(amended - float(np.mean(ghosts)))
            of.append(one)
    return gains, of


def _left_out(found: Json) -> str:
    """Correlation with leaving out and training again."""
    single = ", ".join(f"{one:.2f}" for one in found["correlation"])
    apart = ", ".join(f"{one:.2f}" for one in found["correlation of hidden minus exposed"])
    mean = found["correlation of the mean"]
    return (
        f"\n\nLeaving each source out and training again, {len(found['whole'])} times each (data set 0, "
        f"negated rewards): the effects correlate with the regression's by {single} in three agents "
        f"({mean:.2f} for their mean; hidden minus exposed {apart}). The trainings' halves agree so that all "
        f"together have a reliability of {found['reliability']:.2f}."
    )


def learning_table(results: Json) -> str:
    """Final returns and seconds of plain agents and of blocks."""
    rows = []
    for task, (_, steps) in learning.TASKS.items():
        sides = {}
        for kind in ("plain", "blocks"):
            names = [name for name in results if name.startswith(f"learning/{task}/{kind}/")]
            sides[kind] = [results[name] for name in names]
        if not sides["plain"] or not sides["blocks"]:
            continue
        cells = [f"{task}, {steps:,} steps"]
        for runs in sides.values():
            for values in (
                [run["returns"][-1] for run in runs],
                [np.mean(run["returns"]) for run in runs],
            ):
                error = ""
                if len(values) > 1:
                    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.0f}"
                cells.append(f"{np.mean(values):.0f}{error}")
        seconds = {kind: np.mean([run["seconds"] for run in runs]) for kind, runs in sides.items()}
        ratio = seconds["blocks"] / seconds["plain"]
        cells += [f"{len(sides['plain'])}, {len(sides['blocks'])}"]
        cells += [f"{seconds['plain']:.0f}, {seconds['blocks']:.0f} ({ratio:.2f} x)"]
        rows.append(cells)
    header = [
        "task",
        "plain: return at the end",
        "over all of learning",
        "blocks: return at the end",
        "over all of learning",
        "seeds: plain, blocks",
        "processor seconds: plain, blocks",
    ]
    return (
        "Return ± standard error over seeds, of ten episodes at the end, and of the mean over ten such "
        f"evaluations along the learning; defaults of `attach`.\n\n{_lines(header, rows)}"
    )


def main() -> None:
    results = json.loads(RESULTS.read_text())["results"]
    text = replaced(DOCS.read_text(), "planted", planted_table(results))
    DOCS.write_text(replaced(text, "learning", learning_table(results)))


if __name__ == "__main__":
    main()
