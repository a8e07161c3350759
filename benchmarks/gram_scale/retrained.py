"""Agreement with retraining: linear datamodeling scores of exact gram and of what stands for it.

The networks, the random halves and the seeds are those of the board (docs/fidelity.md), and so is the
truth: retraining of the standard network. What is lost is told by the ratio to exact gram's score.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.fidelity import board, trivial
from benchmarks.fidelity.methods import Scored, attempt
from benchmarks.fidelity.peers import dattri_
from benchmarks.fidelity.registry import METHODS
from turnover import evaluation
from turnover.evaluation import Correlation

from . import Json
from .networks import WAYS, Network

EXACT = "exact gram"
BOUNDS = {"exact cross products": (0.93, 0.98), "landmarks": (0.85, 0.94)}
"""Least ratios that were hoped for, at the two numbers of landmarks."""


def judged(network: Network, folder: Path) -> Json:
    """Scores against retraining, of every way.

    Args:
        network: of a problem.
        folder: keeps what was retrained; that of the board has it already.
    """
    problem = network.problem
    subsets = evaluation.draw_subsets(len(problem.train), problem.subsets)
    cache = folder / problem.name / "cache"
    truth = board.truth_of(problem, subsets, cache, masked=False, seeds=problem.seeds)
    labels = problem.train.y.numpy()
    rows: Json = {}
    whole: evaluation.Lds | None = None
    for name, scored in _scored(network):
        row: Json = {"stored_bytes": scored.stored_bytes}
        if scored.note:
            row["note"] = scored.note
        if scored.scores is not None:
            found = evaluation.lds(scored.scores, subsets, truth.outputs, labels=labels)
            whole = whole or found
            row["raw"] = _interval(found.raw)
            row["class_removed"] = _interval(found.class_removed)
            row["ratio"] = _ratio(found.class_removed, whole.class_removed)
        rows[name] = row
    assert whole is not None
    return {
        "instances": len(problem.train),
        "targets": len(problem.test),
        "subsets": {"count": len(subsets), "fraction": 0.5, "sha256": subsets.sha256},
        "truth_seeds": problem.seeds,
        "landmarks": list(network.counts),
        "ceiling": {
            "raw": round(whole.raw.ceiling, 4),
            "class_removed": round(whole.class_removed.ceiling, 4),
        },
        "rows": rows,
    }


def _scored(network: Network) -> Iterator[tuple[str, Scored]]:
    """Names and scores of all ways; exact gram comes first."""
    rows = len(network.problem.train)
    pairs = 2 * 4 * (rows * network.directions) ** 2  # inner products of all, and their factor
    yield EXACT, Scored(network.scores, None, 0.0, 0.0, pairs)
    for count in network.counts:
        stored = network.stored_bytes(count)
        for way in WAYS:
            _, scores = network.by_landmarks(way, count)
            yield f"{way}, {count}", Scored(scores, None, 0.0, 0.0, stored)
        yield (
            f"random projection, {count}",
            Scored(network.projected(count), None, 0.0, 0.0, stored),
        )
        width = stored // (4 * rows) - 1  # it keeps a residual besides
        yield f"TRAK, {count}", attempt(dattri_.trak(1, width), network.task)
    yield "TRAK, the board's", attempt(dattri_.trak(1), network.task)
    for name, find in (("same class", trivial.same_class), ("random", trivial.anything)):
        yield name, trivial.timed(find)(network.task)


def peer() -> str:
    """The package of TRAK, and its version."""
    (described,) = (one.described() for one in METHODS if one.name == "TRAK-1 (dattri)")
    return str(described["package"])


def _interval(found: Correlation) -> list[float]:
    return [round(value, 4) for value in (found.mean, found.low, found.high)]


def _ratio(found: Correlation, exact: Correlation) -> list[float]:
    """Ratio of two scores, and its 95% interval over the same resamples of targets and subsets."""
    low, high = np.quantile(found.resamples / exact.resamples, [0.025, 0.975])
    return [round(float(value), 4) for value in (found.mean / exact.mean, low, high)]


def beside_bounds(found: Json) -> list[tuple[str, float, float]]:
    """Rows that have a bound: their name, ratio and bound."""
    return [
        (f"{way}, {count}", found["rows"][f"{way}, {count}"]["ratio"][0], bound)
        for way, bounds in BOUNDS.items()
        for count, bound in zip(found["landmarks"], bounds, strict=True)
    ]


def show(name: str, found: Json) -> None:
    """Print the rows of a problem, and what is above and below its bound."""
    for row, values in found["rows"].items():
        parts = [
            f"{key} {values[key][0]:.3f} ({values[key][1]:.3f} to {values[key][2]:.3f})"
            for key in ("raw", "class_removed", "ratio")
            if key in values
        ]
        print(f"{name} {row}: {', '.join(parts)} {values.get('note', '')}", flush=True)
    for row, ratio, bound in beside_bounds(found):
        said = "at least" if ratio >= bound else "BELOW"
        print(f"{name} {row}: {ratio:.3f} of exact gram, {said} {bound}", flush=True)
