"""What a result costs: a model of its parts, held against one and two nodes, then taken far beyond them."""

from __future__ import annotations

import heapq
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from turnover.influence import blockwise, protocol
from turnover.influence.exact import ExactEstimator

Json = dict[str, Any]

UNITS = 1536
"""Mask units of the driver's perceptron."""
GHOSTS = 100
_IDS_BLOCK = 8192
"""Ids in a block of 1,024 targets."""


@dataclass(frozen=True)
class Rates:
    """Seconds of one core, and of the driver.

    Attributes:
        backward: derivatives of one target.
        product: one target, one id and one mask unit, linearly.
        kept: one pair, looked through for the extremes.
        written: one pair, written.
        exact: one pair, exactly.
        task: what one task takes of the driver, whatever it computes.
        joined: what one task takes of its worker beyond its scores.
        begun: what one result takes before and after its blocks.
    """

    backward: float
    product: float
    kept: float
    written: float
    exact: float
    begun: float
    task: float = 0.0
    joined: float = 0.0


def parts(asked: Json) -> dict[str, float]:
    """How often each rate is paid, for a result of one process."""
    pairs = asked["targets"] * asked["ids"]
    scored = asked["targets"] * (asked["ids"] + GHOSTS)
    linear, top = asked["method"] == "linear", "top" in asked
    units = asked.get("units", UNITS)
    return {
        "backward": asked["targets"]
        * linear
        * (units == UNITS),  # next to nothing through a small network
        "product": scored * units * linear,
        "kept": pairs * linear * top,
        "written": pairs * (not top),
        "exact": scored * (not linear),
        "begun": 1.0,
    }


def fitted(runs: list[Json]) -> Rates:
    """Rates that explain the ``seconds`` of some runs of one process, none below zero."""
    names = list(parts(runs[0]))
    matrix = np.array([[parts(run)[name] for name in names] for run in runs], dtype=float)
    seconds = np.array([run["seconds"] for run in runs])
    # Relative errors count, and columns differ by ten orders of magnitude.
    scale = np.maximum(matrix.max(axis=0), 1e-30)
    found, _ = nnls(matrix / scale / seconds[:, None], np.ones(len(runs)))
    return Rates(**dict(zip(names, found / scale, strict=True)))


def blocks(asked: Json) -> tuple[int, int]:
    """Tasks, by blocks of targets and parts of ids."""
    if asked["method"] == "exact":
        rows, columns = ExactEstimator.block_shape
    else:
        rows, columns = protocol._MOST_TARGETS, _IDS_BLOCK
        if "top" in asked:
            columns *= max(
                blockwise._SCANNED, -(-asked["ids"] // (columns * blockwise._MOST_PARTS))
            )
    return math.ceil(asked["targets"] / rows), math.ceil(asked["ids"] / columns)


def predicted(asked: Json, rates: Rates, workers: int) -> float:
    """Seconds with so many workers; 0: in the process itself."""
    paid = {name: count * float(getattr(rates, name)) for name, count in parts(asked).items()}
    begun = paid.pop("begun")
    if not workers:
        return begun + sum(paid.values())
    rows, columns = blocks(asked)
    # Every worker that scores a block of targets takes its derivatives anew.
    backward = paid.pop("backward") * min(workers, columns)
    one = (sum(paid.values()) + backward) / (rows * columns) + rates.joined
    return begun + simulated(rows * columns, one, workers, rates.task)


def simulated(
    tasks: int,
    seconds: float,
    workers: int,
    overhead: float,
    *,
    fails_after: float = math.inf,
    back_after: float = 600.0,
    seed: int = 0,
) -> float:
    """Seconds until all tasks have ended, one driver handing them out.

    Args:
        tasks: number of tasks.
        seconds: of one task.
        workers: how many at once.
        overhead: seconds of the driver for a task.
        fails_after: mean seconds until a worker fails, exponentially distributed; its task begins anew.
        back_after: seconds until there is another in its place.
        seed: of the failures.
    """
    rng = random.Random(seed)
    free = [0.0] * min(workers, tasks)
    heapq.heapify(free)
    handed, last, left = 0.0, 0.0, tasks
    while left:
        at = heapq.heappop(free)
        handed = max(handed + overhead, at)
        lives = math.inf if math.isinf(fails_after) else rng.expovariate(1 / fails_after)
        if lives < seconds:
            heapq.heappush(free, handed + lives + back_after)
            continue
        left -= 1
        last = max(last, handed + seconds)
        heapq.heappush(free, handed + seconds)
    return last


def far(rates: Rates, flops: float) -> tuple[list[Json], list[Json]]:
    """A thousand million ids, a million targets, 7e9 parameters, 512 tokens a target.

    Args:
        rates: of one core here, measured.
        flops: floating-point operations a second of one core here, in a matrix product.

    Returns:
        What is stored and what it costs, by mask units and what is kept; and how long the last result of
        ``top`` takes with many workers, of which each fails once in a hundred hours.
    """
    ids, targets, forward = 10**9, 10**6, 2 * 7e9 * 512
    rows, crowd = [], []
    for units in (1024, 8192):
        for kept in ("all", "top 100", "top 100 of rerank"):
            asked: Json = {"method": "linear", "ids": ids, "targets": targets}
            if kept != "all":
                asked["top"] = 100
            tasks = math.prod(blocks(asked))
            stored, chunks = 4 * targets * ids, tasks
            passes, seconds = 3 * forward * targets, targets * ids * (units * rates.product)
            seconds += targets * ids * (rates.written if kept == "all" else rates.kept)
            if kept != "all":
                # Scores, ids and ghosts of a block of targets are a chunk each.
                stored, chunks = targets * (12 * 200 + 4 * 1000), 3 * blocks(asked)[0]
            if kept == "top 100 of rerank":
                passes += 300 * 2 * forward * targets
            rows.append(
                {
                    "units": units,
                    "what": kept,
                    "stored_bytes": stored,
                    "chunks": chunks,
                    "core_hours_passes": passes / flops / 3600,
                    "core_hours_scores": seconds / 3600,
                }
            )
            if kept == "top 100" and units == 1024:
                one = seconds / tasks
                for workers in (100, 1_000, 10_000, 100_000):
                    whole = simulated(tasks, one, workers, rates.task)
                    failing = simulated(tasks, one, workers, rates.task, fails_after=360_000.0)
                    crowd.append(
                        {
                            "workers": workers,
                            "tasks": tasks,
                            "task_seconds": one,
                            "hours": failing / 3600,
                            "lost_hours": (failing - whole) / 3600,
                            "busy": seconds / workers / failing,
                        }
                    )
    return rows, crowd


FITTED: list[Json] = [
    {"method": "linear", "ids": 1024, "targets": 1024},
    {"method": "linear", "ids": 65_536, "targets": 1024},
    {"method": "linear", "ids": 65_536, "targets": 2048},
    {"method": "linear", "ids": 65_536, "targets": 1024, "top": 100},
    {"method": "linear", "ids": 262_144, "targets": 1024, "top": 100},
    {"method": "linear", "ids": 131_072, "targets": 2048, "units": 256},
    {"method": "linear", "ids": 262_144, "targets": 1024, "top": 100, "units": 256},
    {"method": "exact", "ids": 1024, "targets": 16},
    {"method": "exact", "ids": 4096, "targets": 32},
]
"""Of one process, small; two numbers of mask units tell the products from what is written or kept."""
HELD_OUT: list[Json] = [
    {"method": "linear", "ids": 131_072, "targets": 3072},
    {"method": "linear", "ids": 1_000_000, "targets": 2048, "top": 100},
    {"method": "exact", "ids": 16_384, "targets": 64},
]
"""Four to sixteen times as large, by one process, one worker and two."""
MANY_TASKS: Json = {"method": "exact", "ids": 102_400, "targets": 320, "units": 8}
"""2,000 tasks of which each takes next to nothing."""
