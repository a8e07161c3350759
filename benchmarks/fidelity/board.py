"""The fidelity board: every method on every problem, judged by retraining.

``python -m benchmarks.fidelity.board`` writes ``benchmarks/results/fidelity.json``: problem -> method
-> network -> figures. The scores of a method on a network are judged by both truths: retraining of
the standard network, and masked retraining of the turn-over network.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from turnover import InputError, evaluation
from turnover.evaluation import Correlation, Masked

from . import calibration, wide_head
from .methods import Attribution, Scored, attempt
from .problems import Problem, load
from .registry import METHODS, Method

RESULTS = Path(__file__).parent.parent / "results" / "fidelity.json"
NETWORKS = ("standard", "wide", "turnover", "head")
TRUTHS = ("standard", "turnover")
_MODELS = {"standard": 10, "wide": 10, "turnover": 20, "head": 1}
_TRUTH_SEED = 1000  # networks that are attributed have the seeds from 0 on
_KEEP = 0.5

Json = dict[str, Any]


@dataclass(frozen=True)
class Truth:
    """What retraining on subsets gave, and how long it took."""

    outputs: NDArray[np.float32]  # (subsets, seeds, targets), log-odds of the target's class
    seconds: float


def truth_of(
    problem: Problem, subsets: evaluation.Subsets, cache: Path, *, masked: bool, seeds: int
) -> Truth:
    """Retrain the standard network, or the turn-over network under masks, on every subset."""
    start = time.perf_counter()
    retraining = evaluation.Retraining(
        problem.wide if masked else problem.standard,
        problem.train.x,
        problem.train.y,
        problem.recipe,
        problem.test.x,
        masked=Masked(problem.sites, _KEEP) if masked else None,
        cache=cache,
        progress=True,
    )
    logits = evaluation.retrain(retraining, subsets, range(_TRUTH_SEED, _TRUTH_SEED + seeds))
    outputs = evaluation.minus_cost(logits, problem.test.y)
    return Truth(outputs, time.perf_counter() - start)


def task_of(
    problem: Problem, network: str, folder: Path, count: int, *, first_seed: int = 0
) -> Attribution:
    """Train the networks of one kind, with seeds from the first on; the first is timed alone."""
    if network == "head":
        return _with_wide_head(problem, folder, count, first_seed)
    masked = Masked(problem.sites, _KEEP) if network == "turnover" else None
    build = problem.standard if network == "standard" else problem.wide
    epochs = problem.recipe.epochs
    kept = sorted({max(1, round(epochs * share)) for share in (1 / 6, 0.4, 0.7, 1.0)})

    def train(seeds: range, checkpoints: list[int]) -> evaluation.Trained:
        x, y = problem.train.x, problem.train.y
        return evaluation.train(
            build, x, y, problem.recipe, seeds, masked=masked, checkpoints=checkpoints
        )

    seeds = range(first_seed, first_seed + count)
    first = train(seeds[:1], kept)
    more = train(seeds[1:], []).models() if count > 1 else []
    return Attribution(
        problem=problem,
        network=network,
        models=first.models() + more,
        seeds=tuple(seeds),
        sites=problem.sites if masked else (),
        keep=_KEEP,
        checkpoints=[states[0] for _, states in sorted(first.checkpoints.items())],
        train_seconds=first.seconds,
        workdir=folder / network,
    )


def _with_wide_head(problem: Problem, folder: Path, count: int, first_seed: int) -> Attribution:
    seeds = tuple(range(first_seed, first_seed + count))
    trained = [wide_head.train(problem, seed, _KEEP) for seed in seeds]
    return Attribution(
        problem=problem,
        network="head",
        models=[model for model, _ in trained],
        seeds=seeds,
        sites=("head",),
        keep=_KEEP,
        checkpoints=[],
        train_seconds=trained[0][1],
        workdir=folder / "head",
    )


def accuracy(task: Attribution) -> float:
    """Share of the targets that the first network gets right."""
    with torch.no_grad():
        predicted = task.models[0](task.problem.test.x).argmax(dim=1)
    return float((predicted == task.problem.test.y).float().mean())


def figures(
    scored: Scored, task: Attribution, subsets: evaluation.Subsets, truths: dict[str, Truth]
) -> Json:
    """One row of the board."""
    row: Json = {
        "trainings": scored.networks,
        "train_s": scored.networks * task.train_seconds,
        "prepare_s": scored.prepare_seconds,
        "score_s": scored.score_seconds,
        "stored_bytes": scored.stored_bytes,
    }
    row["total_s"] = row["train_s"] + row["prepare_s"] + row["score_s"]
    if scored.note:
        row["note"] = scored.note
    labels = task.problem.train.y.numpy()
    if scored.scores is not None:
        for name, truth in truths.items():
            found = evaluation.lds(scored.scores, subsets, truth.outputs, labels=labels)
            row[f"{name}_truth"] = {
                "raw": _interval(found.raw),
                "class_removed": _interval(found.class_removed),
            }
    wrong = task.problem.train.wrong.numpy()
    if scored.self_scores is not None and wrong.any():
        row["mislabel_auc"] = evaluation.mislabel(scored.self_scores, wrong).auc
    return row


def _interval(found: Correlation) -> list[float]:
    return [round(value, 4) for value in (found.mean, found.low, found.high)]


def problem_board(problem: Problem, folder: Path, *, quick: bool, only: list[str] | None) -> Json:
    """All methods on all networks of one problem."""
    start = time.perf_counter()
    folder = folder / problem.name
    count = min(problem.subsets, 40) if quick else problem.subsets
    seeds = min(problem.seeds, 2) if quick else problem.seeds
    subsets = evaluation.draw_subsets(len(problem.train), count)
    folder.mkdir(parents=True, exist_ok=True)
    subsets.write(folder / "subsets.json")
    truths = {
        name: truth_of(problem, subsets, folder / "cache", masked=masked, seeds=seeds)
        for name, masked in (("standard", False), ("turnover", True))
    }
    labels = problem.train.y.numpy()
    board: Json = {
        "title": problem.title,
        "train": len(problem.train),
        "targets": len(problem.test),
        "subsets": {"count": count, "fraction": 0.5, "seed": 0, "sha256": subsets.sha256},
        "truth_seeds": seeds,
        "truth": {},
        "networks": {},
        "methods": {},
    }
    anything = np.random.default_rng(0).standard_normal((len(problem.test), len(problem.train)))
    for name, truth in truths.items():
        found = evaluation.lds(anything, subsets, truth.outputs, labels=labels)
        board["truth"][name] = {
            "seconds": truth.seconds,
            "accuracy": float((truth.outputs > 0).mean()),
            "ceiling": {
                "raw": round(found.raw.ceiling, 4),
                "class_removed": round(found.class_removed.ceiling, 4),
            },
        }
    for network in NETWORKS:
        task = task_of(problem, network, folder, _MODELS[network])
        board["networks"][network] = {
            "train_s": task.train_seconds,
            "accuracy": accuracy(task),
            "parameters": sum(p.numel() for p in task.models[0].parameters()),
        }
        for method in METHODS:
            if method.runs_on(problem, network) and (only is None or method.name in only):
                scored = attempt(method.run, task)
                row = figures(scored, task, subsets, truths)
                entry = board["methods"].setdefault(method.name, method.described())
                entry[network] = row
                print(_line(problem, network, method, row), flush=True)
        if network == "turnover":
            board["ghosts"] = calibration.fresh_ghosts(task)
            print(f"{problem.name} ghosts {board['ghosts']}", flush=True)
    board["seconds"] = time.perf_counter() - start
    return board


def _line(problem: Problem, network: str, method: Method, row: Json) -> str:
    parts = [f"{problem.name} {network:9} {method.name:28}"]
    for truth in ("standard", "turnover"):
        found = row.get(f"{truth}_truth")
        if found:
            parts.append(f"{truth} {found['raw'][0]:.3f} / {found['class_removed'][0]:.3f}")
    if "mislabel_auc" in row:
        parts.append(f"AUC {row['mislabel_auc']:.3f}")
    parts.append(f"{row['total_s']:.1f} s {row.get('note', '')}")
    return "  ".join(parts)


def machine() -> Json:
    """Where and on what the figures were made."""

    def git(*arguments: str) -> str:
        said = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
        return said.stdout.strip()

    # Results that were written meanwhile change nothing of what is run.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!*/results/*.json")
    return {
        "date": date.today().isoformat(),
        "commit": git("describe", "--always") + ("-dirty" if changed else ""),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", default="A,B,C,D,E", help="comma-separated")
    parser.add_argument("--methods", help="comma-separated names; all without it")
    parser.add_argument("--quick", action="store_true", help="40 subsets, 2 seeds, no TRAK-10")
    parser.add_argument("--data", type=Path, help="cifar10_10k_2k.npz, or its folder")
    parser.add_argument("--folder", type=Path, default=Path("runs/fidelity"))
    parser.add_argument("--write", type=Path, default=RESULTS)
    parser.add_argument(
        "--jobs", type=int, default=2, help="problems at once, each by one process of one thread"
    )
    arguments = parser.parse_args()
    names = arguments.problems.split(",")
    made = _apart(names, arguments) if len(names) > 1 else _here(names[0], arguments)
    kept: Json = json.loads(arguments.write.read_text()) if arguments.write.exists() else {}
    boards: Json = kept.get("problems", {})
    for name, found in made:
        boards[name] = found
        arguments.write.parent.mkdir(parents=True, exist_ok=True)
        whole = {"problems": dict(sorted(boards.items()))}
        arguments.write.write_text(json.dumps(whole, indent=1) + "\n")


def _here(name: str, arguments: argparse.Namespace) -> Iterator[tuple[str, Json]]:
    only = arguments.methods.split(",") if arguments.methods else None
    try:
        problem = load(name, arguments.data, arguments.folder)
    except InputError as error:
        print(f"{name} left out: {error}")
        return
    torch.set_num_threads(1)  # as where two problems share the cores
    found = problem_board(problem, arguments.folder, quick=arguments.quick, only=only)
    yield name, found | {"machine": machine()}


def _apart(names: list[str], arguments: argparse.Namespace) -> Iterator[tuple[str, Json]]:
    """Every problem in a process of its own: seconds are those of one thread."""

    def run(name: str) -> tuple[str, Json | None]:
        write = arguments.folder / name / "board.json"
        write.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.fidelity.board", "--problems", name]
        command += ["--write", str(write), "--folder", str(arguments.folder)]
        command += ["--quick"] if arguments.quick else []
        command += ["--methods", arguments.methods] if arguments.methods else []
        command += ["--data", str(arguments.data)] if arguments.data else []
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found = json.loads(write.read_text())["problems"][name] if write.exists() else None
        return name, found

    with ThreadPoolExecutor(arguments.jobs) as pool:
        # Those that take the longest begin first.
        ordered = sorted(names, key="CEDBA".find)
        for done in as_completed([pool.submit(run, name) for name in ordered]):
            name, found = done.result()
            if found is not None:
                yield name, found


if __name__ == "__main__":
    main()
