"""Runs the experiments, and writes ``benchmarks/results/paper.json`` and ``docs/paper.md``.

``python -m benchmarks.paper.run`` runs them two at once, each by a process of one thread, but for those
that an earlier try finished in the same folder. ``--only name`` runs one anew, in this process; ``--full``
runs those that take hours.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity.board import machine
from turnover import InputError

from . import errors, full, groups, hidden, label_errors, random_labels, shift, table

RESULTS = Path(__file__).parent.parent / "results" / "paper.json"
Json = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What an experiment is given.

    Attributes:
        folder: keeps features and finished trainings.
        data: ``cifar10_10k_2k.npz``, its folder, or ``None``; the sentences of the other domain lie
            in the same folder.
        seeds: fine-tunings of the BERT on every set.
    """

    folder: Path
    data: Path | None
    seeds: int = 1


# Those that take the longest begin first.
EXPERIMENTS: dict[str, Callable[[Settings], Json]] = {
    "label_errors": lambda given: label_errors.run(given.data, given.folder),
    "shift": lambda given: shift.run(given.data, given.folder),
    "groups": lambda given: groups.run(given.folder),
    "errors": lambda given: errors.run(given.data, given.folder),
    "hidden": lambda given: hidden.run(given.data, given.folder),
    "random_labels": lambda given: random_labels.run(given.data, given.folder),
}

FULL: dict[str, Callable[[Settings], Json]] = {
    "full_bert": lambda given: full.bert(given.data, given.folder, given.seeds),
    "full_vgg": lambda given: full.vgg(given.data, given.folder),
}


def experiment(name: str, given: Settings) -> Json | None:
    """The figures of one experiment; ``None``, with a message, where its data are absent."""
    torch.set_num_threads(1)
    made, start = machine(), time.perf_counter()
    try:
        found = (EXPERIMENTS | FULL)[name](given)
    except InputError as error:
        print(f"{name} left out: {error}", flush=True)
        return None
    return found | {"seconds": time.perf_counter() - start, "machine": made}


def write(path: Path, name: str, found: Json) -> None:
    """Put an experiment's figures beside those of the others."""
    kept: Json = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted({**kept, name: found}.items())), indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    every = EXPERIMENTS | FULL
    parser.add_argument("--only", choices=every, help="this experiment, in this process")
    parser.add_argument(
        "--full", action="store_true", help="the real BERT and the larger VGG: hours"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="fine-tunings of the BERT on every set"
    )
    parser.add_argument("--data", type=Path, help="cifar10_10k_2k.npz, or its folder")
    parser.add_argument("--folder", type=Path, default=Path("runs/paper"))
    parser.add_argument("--write", type=Path, default=RESULTS)
    parser.add_argument("--jobs", type=int, default=2, help="experiments at once")
    arguments = parser.parse_args()
    if arguments.only:
        given = Settings(arguments.folder, arguments.data, arguments.seeds)
        found = experiment(arguments.only, given)
        if found is not None:
            write(arguments.write, arguments.only, found)
    else:
        _apart(arguments)
    if arguments.write == RESULTS and RESULTS.exists():
        table.main()


def _apart(arguments: argparse.Namespace) -> None:
    """Every experiment in a process of its own: seconds are those of one thread."""

    def run(name: str) -> tuple[str, Path]:
        path = arguments.folder / f"{name}.json"
        if path.exists():
            return name, path
        command = [sys.executable, "-m", "benchmarks.paper.run", "--only", name]
        command += ["--write", str(path), "--folder", str(arguments.folder)]
        command += ["--seeds", str(arguments.seeds)]
        command += ["--data", str(arguments.data)] if arguments.data else []
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        return name, path

    names = FULL if arguments.full else EXPERIMENTS
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for done in as_completed([pool.submit(run, name) for name in names]):
            name, path = done.result()
            if path.exists():
                write(arguments.write, name, json.loads(path.read_text())[name])


if __name__ == "__main__":
    main()
