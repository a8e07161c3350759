"""Estimates what it is told on stdin, a JSON object per line, and prints what each took.

Stays connected between them, so that the workers are warm from the second on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import turnover
from benchmarks.memory import peak_gib
from benchmarks.scale.model import GHOSTS
from benchmarks.speed import Perceptron
from turnover import Batch, Influence, MaskSpec
from turnover.objectives import margin

_BATCH = 64


def influence(method: str, units: int | None) -> Influence:
    """Of a network with random weights: what is computed does not depend on what it has learned.

    Args:
        method: of the estimate.
        units: of a network with one hidden layer; ``None``: of the perceptron of all benchmarks.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = Perceptron().eval()
        if units is not None:
            model = nn.Sequential(nn.Linear(784, units), nn.ReLU(), nn.Linear(units, 10)).eval()
    sites = ["act1", "act3"] if units is None else ["1"]
    network = turnover.attach(model, sites, MaskSpec(seed=0))
    return Influence(network, margin, method, ghosts=GHOSTS)


def targets(count: int) -> Iterator[Batch]:
    """Random inputs, made as they are asked for."""
    for start in range(0, count, _BATCH):
        rows = min(_BATCH, count - start)
        generator = torch.Generator().manual_seed(start)
        labels = torch.randint(0, 10, (rows,), generator=generator)
        yield Batch(torch.randn(rows, 784, generator=generator), labels)


def estimate(told: dict[str, Any]) -> dict[str, Any]:
    """One result; ``engine``, ``method``, ``ids``, ``targets``, ``top``, ``units`` and ``out`` are told."""
    ids = torch.arange(told["ids"])
    scoring = influence(told["method"], told.get("units"))
    start, busy = time.perf_counter(), time.process_time()
    scoring.estimate(
        targets(told["targets"]), ids, top=told.get("top"), out=told["out"], engine=told["engine"]
    )
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - busy,
        "peak_gib": peak_gib(),
    }


def main() -> None:
    """Connect to the cluster named on the command line, and obey."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is no answer
    import ray

    ray.init(sys.argv[1], include_dashboard=False, configure_logging=False, log_to_driver=False)
    print(json.dumps({"pid": os.getpid()}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(estimate(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
