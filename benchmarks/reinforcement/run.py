"""Runs the experiments on agents, each once, and writes ``benchmarks/results/reinforcement.json``.

What has finished is kept in ``runs/reinforcement``, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.fidelity.board import machine

from . import learning, planted

KEPT = Path("runs/reinforcement")
RESULTS = Path(__file__).parent.parent / "results" / "reinforcement.json"
SEEDS, DATA, NETWORKS = 5, 6, 3
PARTS = ("planted", "left out", "learning", "more", "long")
Json = dict[str, Any]


def jobs(parts: Sequence[str], seeds: int) -> dict[str, Callable[[], Json]]:
    """The computations of some parts by name."""
    found: dict[str, Callable[[], Json]] = {}
    for part, judged in planted.JUDGED.items():
        if part not in parts:
            continue
        for method, kind in judged:
            for data, network in product(range(DATA), range(NETWORKS)):
                name = f"planted/{method}/{kind}/{data}/{network}"
                found[name] = partial(planted.judge, method, kind, data, network)
    if "left out" in parts:
        found["left out/0"] = partial(planted.left_out, 0)
    for seed in range(seeds):
        for task in learning.TASKS:
            part = "long" if task.startswith("HalfCheetah") else "learning"
            if part in parts and (part == "learning" or seed < NETWORKS):
                for blocks in (False, True):
                    name = f"learning/{task}/{'blocks' if blocks else 'plain'}/{seed}"
                    found[name] = partial(learning.learn, task, blocks, seed)
    return found


def _path(name: str) -> Path:
    return KEPT / f"{name.replace('/', '-').replace(' ', '_')}.json"


def _run(name: str, job: Callable[[], Json]) -> None:
    torch.set_num_threads(1)
    start = time.process_time()
    found = job()
    found["cpu_seconds"] = time.process_time() - start
    _path(name).write_text(json.dumps(found, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="*", default=PARTS[:3], choices=PARTS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    wanted = jobs(options.parts, options.seeds)
    missing = {name: job for name, job in wanted.items() if not _path(name).is_file()}
    with ProcessPoolExecutor(options.processes) as pool:
        running = [pool.submit(_run, name, job) for name, job in missing.items()]
        for one in tqdm(as_completed(running), total=len(running), unit=" experiments"):
            one.result()
    every = jobs(PARTS, SEEDS)
    results = {name: json.loads(_path(name).read_text()) for name in every if _path(name).is_file()}
    found = {"machine": machine(), "results": results}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
