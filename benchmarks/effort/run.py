"""What each tool needs from its user for the same job: writes ``benchmarks/results/effort.json``.

The job: with 500 digits, a tenth of whose labels are wrong, and an MLP, the influence of every training
row on 100 test rows, and the most suspicious labels. Each script is ``scripts/base.py`` (plain training)
with what the tool needs, and runs in a process of its own on one thread.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.effort import table
from benchmarks.effort.data import digits, wrong
from benchmarks.fidelity.board import machine
from benchmarks.fidelity.peers.pydvl_ import python as pydvl_python
from turnover import evaluation

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
RECIPE = evaluation.Recipe(epochs=30, learning_rate=0.05, batch_size=50, weight_decay=1e-3)
_SUBSETS, _SEEDS = 100, 3
Json = dict[str, Any]


@dataclass(frozen=True)
class Tool:
    """A row of the table.

    Attributes:
        script: name of the file in ``scripts``.
        title: of the row.
        package: whose version is told.
    """

    script: str
    title: str
    package: str


TOOLS = (
    Tool("base", "plain training", "torch"),
    Tool("gram", "turnover: gram", "turnover"),
    Tool("turn_over", "turnover: turn-over dropout", "turnover"),
    Tool("captum_tracin", "captum: TracInCP, 3 checkpoints", "captum"),
    Tool("dattri_cg", "dattri: influence function by CG", "dattri"),
    Tool("trak", "TRAK: 1 network", "traker"),
    Tool("kronfluence_ekfac", "kronfluence: EK-FAC", "kronfluence"),
    Tool("pydvl_ekfac", "pyDVL: EK-FAC", "pyDVL"),
    Tool("cleanlab_folds", "cleanlab: 5 folds", "cleanlab"),
)


def lines(script: Path) -> list[str]:
    """Lines of code as they are counted: no docstring of the file, no blank lines, no indentation."""
    text = script.read_text()
    first = ast.parse(text).body[0]
    kept = text.splitlines()
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        kept = kept[first.end_lineno :]
    return [line.strip() for line in kept if line.strip()]


def added(script: Path, base: Path) -> int:
    """Lines of a script that are new or changed against the base's."""
    matcher = difflib.SequenceMatcher(None, lines(base), lines(script), autojunk=False)
    return sum(stop - start for tag, _, _, start, stop in matcher.get_opcodes() if tag != "equal")


def functions(script: Path) -> int:
    """Functions and methods that the user writes."""
    return sum(
        isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(script.read_text()))
    )


def measured(tool: Tool, runs: int) -> tuple[Json, Json]:
    """What a script takes (one run counts passes, the others are timed), and its arrays."""
    script = SCRIPTS / f"{tool.script}.py"
    with tempfile.TemporaryDirectory() as made:
        folders = [Path(made) / str(run) for run in range(runs + 1)]
        found = [
            _run(tool, script, folder, "time" if run else "count")
            for run, folder in enumerate(folders)
        ]
        arrays = {
            name: np.load(folders[0] / f"{name}.npy")
            for name in ("scores", "suspicion")
            if (folders[0] / f"{name}.npy").exists()
        }

    def median(name: str) -> float:
        return float(statistics.median(one[name] for one in found[1:]))

    return {
        "title": tool.title,
        "package": found[0]["package"],
        "runs": runs,
        "lines": added(script, SCRIPTS / "base.py"),
        "functions": functions(script),
        "passes": found[0]["passes"],
        "stored_bytes": found[0]["stored_bytes"],
        "train_seconds": median("train_seconds"),
        "seconds": median("seconds"),
        "peak_bytes": median("peak_bytes"),
    }, arrays


def _run(tool: Tool, script: Path, folder: Path, mode: str) -> Json:
    folder.mkdir()
    python = str(pydvl_python()) if tool.package == "pyDVL" else sys.executable
    command = [
        python,
        "-m",
        "benchmarks.effort.child",
        str(script),
        mode,
        str(folder),
        tool.package,
    ]
    paths = f"{ROOT}{os.pathsep}{ROOT / 'src'}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    subprocess.run(command, check=True, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL)
    found: Json = json.loads((folder / "found.json").read_text())
    return found


def _network(seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Judge:
    """Whether what a tool gives is right: retraining on half-subsets, and the labels known as wrong."""

    def __init__(self, folder: Path) -> None:
        train, test = digits()
        x, y = train.tensors
        self._labels = y
        self._subsets = evaluation.draw_subsets(len(train), _SUBSETS)
        retraining = evaluation.Retraining(_network, x, y, RECIPE, test.tensors[0], cache=folder)
        logits = evaluation.retrain(retraining, self._subsets, range(1, _SEEDS + 1))
        self._outputs = evaluation.minus_cost(logits, test.tensors[1])

    def judged(self, arrays: Json) -> Json:
        """Mislabel AUC and linear datamodeling score (raw and class-removed), of what is there."""
        found: Json = {"mislabel_auc": None, "lds": None, "lds_class_removed": None}
        if "suspicion" in arrays:
            found["mislabel_auc"] = evaluation.mislabel(arrays["suspicion"], wrong().numpy()).auc
        if "scores" in arrays:
            by = evaluation.lds(
                arrays["scores"], self._subsets, self._outputs, labels=self._labels.numpy()
            )
            found["lds"], found["lds_class_removed"] = by.raw.mean, by.class_removed.mean
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=2, help="timed runs of each, of which the median"
    )
    parser.add_argument("--only", help="scripts, comma-separated; the other rows stay as they are")
    parser.add_argument("--folder", type=Path, default=Path("runs/effort"), help="for retrainings")
    parser.add_argument("--write", type=Path, default=table.RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: Json = {}
    wanted = [tool.script for tool in TOOLS]
    if arguments.only:
        wanted = arguments.only.split(",")
        rows = json.loads(arguments.write.read_text())["rows"]
    judge = Judge(arguments.folder)
    for tool in TOOLS:
        if tool.script in wanted:
            found, arrays = measured(tool, arguments.runs)
            rows[tool.script] = found | judge.judged(arrays)
            print(tool.title, json.dumps(rows[tool.script]), flush=True)
            write(arguments.write, rows)
    if arguments.write == table.RESULTS:
        table.main()


def write(path: Path, rows: Json) -> None:
    """Put down the rows that are there, in their order."""
    made = {
        "machine": machine(),
        "subsets": _SUBSETS,
        "seeds": _SEEDS,
        "rows": {tool.script: rows[tool.script] for tool in TOOLS if tool.script in rows},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
