"""Mislabelled training instances: one training of ours against one of every peer.

``python -m benchmarks.fidelity.mislabels`` writes ``benchmarks/results/mislabels.json``: AUC of every
method on problems B, C and D, with uniform and class-dependent noise, over seeds. Networks, noise and
orders differ from seed to seed; what is finished is not done again. Methods that attribute (``pairs``)
take most of the time, those that follow a training or need features alone (``followed``) little.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from turnover import evaluation

from . import followed
from .board import machine, task_of
from .methods import attempt
from .problems import Problem, Split, load
from .registry import METHODS

RESULTS = Path(__file__).parent.parent / "results" / "mislabels.json"
KINDS = ("uniform", "class-dependent")
RATES = (0.05, 0.1, 0.2, 0.4)
_INSTANCES = 1000  # of each problem, drawn anew for every seed
_TARGETS = 10  # pairs are not looked at here
_SHOWN = 100
_PARTS = {"pairs": "turn-over, turnover", "followed": "AUM, standard"}
"""Parts of a cell, and a row that each of them has."""

# What a user would run on one network; on the others the same methods read alike, and so do the two
# packages' EK-FAC.
ROWS = {
    "turnover": ("turn-over", "gram", "loss", "early loss"),
    "standard": (
        "gram",
        "EK-FAC (kronfluence)",
        "TRAK-1 (dattri)",
        "TracInCP (captum)",
        "Nystroem (pyDVL)",
        "gradient product",
        "loss",
        "early loss",
        "5-fold (cleanlab)",
    ),
}


def noisy(problem: Problem, kind: str, rate: float, seed: int) -> Problem:
    """At most 1,000 instances of the problem with other labels.

    Args:
        problem: rows whose label is known to be wrong are left out.
        kind: ``"uniform"``: any other class; ``"class-dependent"``: the next class, or, of two
            classes, from the second to the first alone.
        rate: share of the instances (of the second class, where there are two and it alone) that get
            another label.
        seed: of the draw.
    """
    generator = np.random.default_rng(seed)
    right = np.flatnonzero(~problem.train.wrong.numpy())
    drawn = torch.from_numpy(generator.permutation(right)[:_INSTANCES])
    x, y = problem.train.x[drawn], problem.train.y[drawn]
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
    parser.add_argument("--jobs", type=int, default=2, help="cells at once, each by one thread")
    parser.add_argument("--folder", type=Path, default=Path("runs/fidelity"))
    parser.add_argument("--write", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=list(_PARTS), help="methods; default: all, part by part")
    parser.add_argument("--cell", help="problem/noise/rate/seed: this one alone, to the folder")
    arguments = parser.parse_args()
    if arguments.cell:
        torch.set_num_threads(1)
        one_cell(arguments.cell, arguments.part or "pairs", arguments.folder)
        return
    kept = json.loads(arguments.write.read_text()) if arguments.write.exists() else {}
    runs: dict[str, Any] = kept.get("runs", {})
    keys = [
        "/".join(map(str, one)) for one in cells(arguments.problems.split(","), arguments.seeds)
    ]

    def run(key: str, part: str) -> tuple[str, Any]:
        path = cell_file(key, part, arguments.folder)
        if not path.exists():
            command = [sys.executable, "-m", "benchmarks.fidelity.mislabels", "--cell", key]
            command += ["--part", part, "--folder", str(arguments.folder)]
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return key, json.loads(path.read_text())

    for part in [arguments.part] if arguments.part else list(_PARTS):
        missing = [key for key in keys if _PARTS[part] not in runs.get(key, {})]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            waiting = [pool.submit(run, key, part) for key in missing]
            for count, done in enumerate(as_completed(waiting), 1):
                key, found = done.result()
                runs[key] = runs.get(key, {}) | found
                best = sorted(found.items(), key=lambda item: -item[1]["auc"])
                said = "  ".join(f"{row} {figures['auc']:.3f}" for row, figures in best[:4])
                print(f"{part}, {count} of {len(missing)} {key}: {said}", flush=True)
                _write(arguments.write, runs)


def _write(path: Path, runs: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"machine": machine(), "auc": table(runs), "runs": runs}
    path.write_text(json.dumps(made, indent=1) + "\n")


def cell_file(key: str, part: str, folder: Path) -> Path:
    """Where the figures of a part of a cell are kept."""
    return folder / "mislabels" / f"{key.replace('/', '-')}-{part}.json"


def one_cell(key: str, part: str, folder: Path) -> None:
    """Find the figures of a part of a cell, and keep them."""
    name, kind, rate, seed = key.split("/")
    problem = noisy(load(name, cache=folder), kind, float(rate), int(seed))
    path = cell_file(key, part, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    if part == "followed":
        found = followed.found_in(problem, int(seed))
    else:
        found = found_in(problem, path.with_suffix(".files"), int(seed))
    shutil.rmtree(path.with_suffix(".files"), ignore_errors=True)
    begun = path.with_suffix(".begun")
    begun.write_text(json.dumps(found))
    begun.replace(path)


if __name__ == "__main__":
    main()
