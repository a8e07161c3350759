"""What relabeling and removing doubtful labels does to the accuracy on clean rows.

``python -m benchmarks.fidelity.relabel`` writes ``benchmarks/results/relabel.json``: of each problem 1,000
training instances get noise as in :mod:`.mislabels`, the problem's standard network is trained after each
change, and predicts the problem's other instances, whose labels nobody changed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.paper.networks import predictions
from turnover import evaluation
from turnover.labels import label_errors

from .board import machine
from .mislabels import KINDS, noisy
from .problems import Problem, Split, load

RESULTS = Path(__file__).parent.parent / "results" / "relabel.json"
RATES = (0.1, 0.2, 0.4)
SEEDS = 5
SURE, LIKELY = 0.9, 0.5
_TITLES = {"C": "MNIST", "D": "sentences"}
Json = dict[str, Any]


def cell(problem: Problem, kind: str, rate: float, seed: int) -> dict[str, float]:
    """Accuracy after each change, and how many rows it changes."""
    given = noisy(problem, kind, rate, seed).train
    test = _others(problem, seed)
    found = label_errors(given.x.flatten(1), given.y, classes=problem.classes, seed=seed)
    sets = {"nothing": (given.x, given.y)}
    for name, least in (("sure", SURE), ("likely", LIKELY)):
        chosen = torch.from_numpy(found.probability >= least)
        labels = torch.where(chosen, torch.from_numpy(found.suggested), given.y)
        sets[f"{name}: remove"] = (given.x[~chosen], given.y[~chosen])
        sets[f"{name}: relabel"] = (given.x, labels)
    sets["what is wrong (oracle): remove"] = (given.x[~given.wrong], given.y[~given.wrong])
    # Another seed than that of the noise and of the random features.
    accuracy = {name: _accuracy(problem, *rows, test, SEEDS + seed) for name, rows in sets.items()}
    sure = found.probability >= SURE
    wrong = given.wrong.numpy()
    return accuracy | {
        "sure": float(sure.sum()),
        "sure and wrong": float((sure & wrong).sum()),
        "expected": found.expected,
        "wrong": float(wrong.sum()),
    }


def _others(problem: Problem, seed: int) -> Split:
    """The instances that :func:`.mislabels.noisy` did not draw, and the targets."""
    marked = replace(problem.train, x=torch.arange(len(problem.train))[:, None].float())
    drawn = noisy(replace(problem, train=marked), "uniform", RATES[0], seed).train.x[:, 0].long()
    left = ~problem.train.wrong
    left[drawn] = False
    x = torch.cat([problem.train.x[left], problem.test.x])
    y = torch.cat([problem.train.y[left], problem.test.y])
    return Split(x, y, torch.zeros(len(y), dtype=torch.bool))


def _accuracy(problem: Problem, x: Tensor, y: Tensor, test: Split, seed: int) -> float:
    trained = evaluation.train(problem.standard, x, y, problem.recipe, [seed])
    (model,) = trained.models()
    return float((predictions(model, test.x).argmax(dim=1) == test.y).float().mean())


def table(runs: dict[str, dict[str, float]]) -> Json:
    """Means and deviations over seeds by cell, and each change's gain over nothing, paired by seed."""
    gathered: dict[str, list[dict[str, float]]] = {}
    for key, found in runs.items():
        gathered.setdefault(key.rpartition("/")[0], []).append(found)
    return {
        cell: {
            name: [
                round(mean(one[name] for one in found), 4),
                round(float(np.std([one[name] - one["nothing"] for one in found], ddof=1)), 4)
                if len(found) > 1
                else 0.0,
            ]
            for name in found[0]
        }
        for cell, found in gathered.items()
    }


def page_table(found: Json) -> str:
    """Accuracy in percent after each change, by cell."""
    changes = [
        "nothing",
        *(f"{name}: {way}" for name in ("sure", "likely") for way in ("remove", "relabel")),
        "what is wrong (oracle): remove",
    ]
    lines = [
        f"| noise | {' | '.join(changes)} | sure rows, of them wrong | expected, wrong |",
        "|---" * (len(changes) + 3) + "|",
    ]
    for cell, figures in sorted(found.items()):
        problem, kind, rate = cell.split("/")
        cells = [
            f"{100 * figures[name][0]:.1f}"
            + ("" if name == "nothing" else f" ± {100 * figures[name][1]:.1f}")
            for name in changes
        ]
        counts = [f"{figures[name][0]:.0f}" for name in ("sure", "sure and wrong")]
        expected = [f"{figures[name][0]:.0f}" for name in ("expected", "wrong")]
        lines.append(
            f"| {_TITLES[problem]}, {kind} {float(rate):.0%} | {' | '.join(cells)} "
            f"| {', '.join(counts)} | {', '.join(expected)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", default="C,D", help="comma-separated")
    parser.add_argument("--folder", type=Path, default=Path("runs/fidelity"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept: Json = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    runs: dict[str, dict[str, float]] = kept.get("runs", {})
    problems = {name: load(name, cache=options.folder) for name in options.problems.split(",")}
    wanted = [
        (name, kind, rate, seed)
        for seed in range(SEEDS)
        for name in problems
        for kind in KINDS
        for rate in RATES
    ]
    for name, kind, rate, seed in tqdm(wanted, unit=" cells"):
        key = f"{name}/{kind}/{rate}/{seed}"
        if key not in runs:
            runs[key] = cell(problems[name], kind, rate, seed)
            made = {"machine": machine(), "accuracy": table(runs), "runs": runs}
            RESULTS.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
