"""Mislabelled training instances: one training of ours against one of every peer.

``python -m benchmarks.fidelity.mislabels`` writes ``benchmarks/results/mislabels.json``: AUC of every
method on problems B, C and D, with uniform and class-dependent noise, over seeds. Networks, noise and
orders differ from seed to seed; what is finished is not done again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from turnover import evaluation

from .board import machine, task_of
from .methods import attempt
from .problems import Problem, Split, load
from .registry import METHODS

RESULTS = Path(__file__).parent.parent / "results" / "mislabels.json"
KINDS = ("uniform", "class-dependent")
RATES = (0.05, 0.1, 0.2, 0.4)
_TARGETS = 10  # pairs are not looked at here
_SHOWN = 100

# What a user would run on one network; on the others the same methods read alike.
ROWS = {
    "turnover": ("turn-over", "gram"),
    "standard": (
        "gram",
        "EK-FAC (kronfluence)",
        "TRAK-1 (dattri)",
        "TracInCP (captum)",
        "Nystroem (pyDVL)",
        "EK-FAC (pyDVL)",
        "gradient product",
        "loss",
        "early loss",
        "5-fold (cleanlab)",
    ),
}


def noisy(problem: Problem, kind: str, rate: float, seed: int) -> Problem:
    """The problem with other labels.

    Args:
        problem: rows whose label is known to be wrong are left out.
        kind: ``"uniform"``: any other class; ``"class-dependent"``: the next class, or, of two
            classes, from the second to the first alone.
        rate: share of the instances (of the second class, where there are two and it alone) that get
            another label.
        seed: of the draw.
    """
    generator = np.random.default_rng(seed)
    right = ~problem.train.wrong
    x, y = problem.train.x[right], problem.train.y[right]
    able = np.arange(len(y))
    if kind == "class-dependent" and problem.classes == 2:
        able = np.flatnonzero(y.numpy() == 1)
    chosen = torch.from_numpy(generator.choice(able, round(rate * len(able)), replace=False))
    steps = np.ones(len(chosen), dtype=np.int64)
    if kind == "uniform":
        steps = generator.integers(1, problem.classes, len(chosen))
    labels, wrong = y.clone(), torch.zeros(len(y), dtype=torch.bool)
    labels[chosen] = (y[chosen] + torch.from_numpy(steps)) % problem.classes
    wrong[chosen] = True
    test = problem.test
    few = Split(test.x[:_TARGETS], test.y[:_TARGETS], test.wrong[:_TARGETS])
    return replace(problem, train=Split(x, labels, wrong), test=few)


def found_in(problem: Problem, folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """AUC and precision of every row."""
    found: dict[str, dict[str, float]] = {}
    for network, names in ROWS.items():
        task = task_of(problem, network, folder, 1, first_seed=seed)
        for method in METHODS:
            if method.name not in names:
                continue
            scored = attempt(method.run, task)
            if scored.self_scores is None:
                print(f"  {method.name}: {scored.note}", flush=True)
                continue
            wrong = problem.train.wrong.numpy()
            judged = evaluation.mislabel(scored.self_scores, wrong, at=[_SHOWN])
            found[f"{method.name}, {network}"] = {
                "auc": judged.auc,
                f"precision_at_{_SHOWN}": judged.precision_at[_SHOWN],
            }
    return found


def cells(names: list[str], seeds: int) -> Iterator[tuple[str, str, float, int]]:
    """Every cell of the grid, seed by seed, so that a part of the grid is a grid of fewer seeds."""
    for seed in range(seeds):
        for name in names:
            for kind in KINDS:
                for rate in RATES:
                    yield name, kind, rate, seed


def table(runs: dict[str, Any]) -> dict[str, Any]:
    """Mean, deviation and seeds of the AUC of every row in every cell."""
    gathered: dict[str, dict[str, list[float]]] = {}
    for key, found in runs.items():
        cell = key.rpartition("/")[0]
        for row, figures in found.items():
            gathered.setdefault(cell, {}).setdefault(row, []).append(figures["auc"])
    return {
        cell: {
            row: {
                "mean": round(mean(values), 4),
                "sd": round(stdev(values), 4) if len(values) > 1 else None,
                "seeds": len(values),
            }
            for row, values in sorted(rows.items(), key=lambda item: -mean(item[1]))
        }
        for cell, rows in gathered.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", default="B,C,D", help="comma-separated")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("runs/fidelity"))
    parser.add_argument("--write", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    names = arguments.problems.split(",")
    kept = arguments.folder / "mislabels"
    kept.mkdir(parents=True, exist_ok=True)
    problems = {name: load(name, cache=arguments.folder) for name in names}
    runs: dict[str, Any] = {}
    for name, kind, rate, seed in cells(names, arguments.seeds):
        path = kept / f"{name}-{kind}-{rate}-{seed}.json"
        if not path.exists():
            problem = noisy(problems[name], kind, rate, seed)
            found = found_in(problem, kept / "files", seed)
            begun = path.with_suffix(".begun")
            begun.write_text(json.dumps(found))
            begun.replace(path)
        runs[f"{name}/{kind}/{rate}/{seed}"] = json.loads(path.read_text())
        best = sorted(runs[f"{name}/{kind}/{rate}/{seed}"].items(), key=lambda i: -i[1]["auc"])
        line = "  ".join(f"{row} {figures['auc']:.3f}" for row, figures in best[:4])
        print(f"{name} {kind} {rate} seed {seed}: {line}", flush=True)
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        made = {"machine": machine(), "auc": table(runs), "runs": runs}
        arguments.write.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
