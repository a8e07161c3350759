"""Results by a Ray cluster of two nodes on this machine: writes ``benchmarks/results/scale.json``.

Each node is a raylet with one CPU, in a network namespace of its own where root may make one, and each task
runs on one thread. Every store is compared, file by file, with that of one process on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.fidelity.board import machine
from benchmarks.memory import peak_gib
from benchmarks.scale import model, table
from benchmarks.scale.cluster import Cluster

RESULTS = Path(__file__).parents[1] / "results" / "scale.json"
Json = dict[str, Any]

EXACT: Json = {"method": "exact", "ids": 8192, "targets": 64}
LINEAR: Json = {"method": "linear", "ids": 65_536, "targets": 4096}
RERANK: Json = {"method": "rerank", "ids": 20_000, "targets": 128}
TOP: Json = {"method": "linear", "ids": 200_000, "targets": 2048, "top": 100}
ROUNDS = 3
MEMORY: list[Json] = [
    {"method": "linear", "ids": ids, "targets": targets, "top": 100}
    for ids, targets in ((50_000, 1024), (200_000, 1024), (800_000, 1024), (200_000, 4096))
] + [
    {"method": "linear", "ids": 50_000, "targets": 1024},
    {"method": "linear", "ids": 200_000, "targets": 1024},
    {"method": "exact", "ids": 2048, "targets": 64},
    {"method": "exact", "ids": 16_384, "targets": 16},
]


class Driver:
    """A process on the head node that estimates what it is told."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._folder = folder
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = cluster.driver("-m", "benchmarks.scale.driver", cluster.address, **pipes)
        self._heard()

    def estimate(self, asked: Json, name: str, *, engine: str = "ray") -> Json:
        """What is asked, written to a new place."""
        self.begin(asked, name, engine=engine)
        return self._heard()

    def begin(self, asked: Json, name: str, *, engine: str = "ray") -> Path:
        """As :meth:`estimate`, without waiting for its end."""
        out = self._folder / name
        shutil.rmtree(out, ignore_errors=True)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({**asked, "out": str(out), "engine": engine}) + "\n")
        self.process.stdin.flush()
        return out

    def end(self) -> Json:
        """Wait for what was begun."""
        return self._heard()

    def close(self) -> None:
        """End the process; its workers end with it."""
        self.process.kill()
        self.process.communicate()

    def _heard(self) -> Json:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the driver ended; what it said is above")
        heard: Json = json.loads(line)
        return heard


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    files = [sorted(p.relative_to(f) for p in f.rglob("*") if p.is_file()) for f in (one, other)]
    return (
        files[0] == files[1]
        and len(files[0]) > 0
        and all((one / path).read_bytes() == (other / path).read_bytes() for path in files[0])
    )


def bits(driver: Driver, folder: Path) -> Json:
    """Stores of two nodes against those of one process, for every method."""
    found = {}
    named = {"exact": EXACT, "linear": LINEAR, "rerank": RERANK, "linear, top 100": TOP}
    for name, asked in named.items():
        driver.estimate(asked, f"process {name}", engine="process")
        driver.estimate(asked, "ray")
        found[name] = same(folder / "ray", folder / f"process {name}")
    return found


def scaling(cluster: Cluster, driver: Driver) -> Json:
    """Seconds of one process, of one worker and of two, taken in turns."""
    seconds: dict[str, dict[str, list[float]]] = {}
    for turn in range(ROUNDS):
        if turn:
            cluster.other.kill()
            wait_for(cluster, 1)
        for workers in (0, 1, 2):
            if workers == 2:
                cluster.join()
            for name, asked in (("exact", EXACT), ("linear", LINEAR)):
                engine = "ray" if workers else "process"
                if workers:  # imports, and the networks
                    driver.estimate({**asked, "targets": asked["targets"] // 2}, "warm")
                taken = driver.estimate(asked, f"{name} {workers}", engine=engine)["seconds"]
                seconds.setdefault(name, {}).setdefault(str(workers), []).append(taken)
    found: Json = {"seconds": seconds}
    for name, by in seconds.items():
        found[name] = statistics.median(a / b for a, b in zip(by["1"], by["2"], strict=True))
        found[f"{name}_overhead"] = statistics.median(
            a / b for a, b in zip(by["1"], by["0"], strict=True)
        )
    return found


def failure(cluster: Cluster, driver: Driver, folder: Path, fail: Callable[[], None]) -> Json:
    """A node that fails when a third of the chunks is written."""
    chunks = EXACT["targets"] // 16 * (EXACT["ids"] // 1024)
    out = driver.begin(EXACT, "failed")
    while len(list(out.glob("score/c/*/*"))) < chunks // 3:
        time.sleep(0.02)
    working = len(cluster.other.workers())
    written = len(list(out.glob("score/c/*/*")))
    fail()
    taken = driver.end()
    return {
        "written_before": written,
        "chunks": chunks,
        "workers_lost": working,
        "seconds": taken["seconds"],
        "identical": same(out, folder / "process exact"),
    }


def memory(cluster: Cluster, folder: Path) -> list[Json]:
    """Peak memory of the workers of a fresh driver, for growing numbers of ids and targets."""
    rows = []
    for asked in MEMORY:
        driver = Driver(cluster, folder)
        try:
            driven = driver.estimate(asked, "memory")
            workers = [w for node in (cluster.head, cluster.other) for w in node.workers()]
            peaks = [peak_gib(worker.pid) for worker in workers]
        finally:
            driver.close()
        rows.append({**asked, "worker_peak_gib": max(peaks), "driver_peak_gib": driven["peak_gib"]})
        print(rows[-1])
    return rows


def modelled(cluster: Cluster, folder: Path) -> Json:
    """Rates from small runs of one process, and what the model says of larger ones by more."""
    driver = Driver(cluster, folder)

    def measured(asked: Json, workers: int) -> Json:
        engine = "ray" if workers else "process"
        return {**asked, "workers": workers, **driver.estimate(asked, "modelled", engine=engine)}

    measured(model.FITTED[-1], 0)
    # In turns, so that a busy moment does not fall on one of them.
    runs = [measured(asked, 0) for _ in range(3) for asked in model.FITTED]
    rates = model.fitted(runs)
    validated = [measured(asked, 0) for asked in model.HELD_OUT]
    for workers in (2, 1):
        if workers == 1:
            cluster.other.kill()
            wait_for(cluster, 1)
        for asked in model.HELD_OUT:
            measured({**asked, "ids": asked["ids"] // 8}, workers)
            validated.append(measured(asked, workers))
    many = math.prod(model.blocks(model.MANY_TASKS))
    alone, by_ray = (measured(model.MANY_TASKS, workers) for workers in (0, 1))
    driver.close()
    rates = replace(
        rates,
        task=by_ray["cpu_seconds"] / many,
        joined=max(0.0, by_ray["seconds"] - alone["seconds"]) / many,
    )
    for one in validated:
        one["predicted"] = model.predicted(one, rates, one["workers"])
    flops = core_flops()
    rows, crowd = model.far(rates, flops)
    return {
        "rates": asdict(rates),
        "core_gflops": flops / 1e9,
        "validated": sorted(validated, key=lambda one: (one["method"], one["ids"], one["workers"])),
        "far": rows,
        "crowd": crowd,
    }


def core_flops() -> float:
    """Floating-point operations a second of one core, in a matrix product."""
    torch.set_num_threads(1)
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def wait_for(cluster: Cluster, nodes: int) -> None:
    """Until the head has noticed how many nodes are left."""
    script = (
        f"import ray, time; ray.init({cluster.address!r}, log_to_driver=False, configure_logging=False)\n"
        f"while sum(node['Alive'] for node in ray.nodes()) != {nodes}: time.sleep(0.1)"
    )
    if cluster.driver("-c", script).wait(timeout=120):
        raise RuntimeError("the cluster did not notice that a node has left")


def main() -> None:
    """Everything, in some ten minutes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, default=RESULTS)
    parser.add_argument(
        "--only", nargs="*", default=["bits", "scaling", "failures", "memory", "model"]
    )
    options = parser.parse_args()
    found: Json = json.loads(options.write.read_text()) if options.write.exists() else {}
    with tempfile.TemporaryDirectory(prefix="scale-") as name, Cluster() as cluster:
        folder = Path(name)
        driver = Driver(cluster, folder)
        if "scaling" in options.only:
            found["machine"] = {**machine(), "load": os.getloadavg()}  # of what is timed
            found["scaling"] = scaling(cluster, driver)
            found["scaling_2"] = found["scaling"]["exact"]
            print(found["scaling"])
        else:
            cluster.join()
        if {"bits", "failures"} & set(options.only):
            found["same_bits"] = bits(driver, folder)
            print(found["same_bits"])
        if "failures" in options.only:
            found["node_killed"] = failure(cluster, driver, folder, cluster.other.kill)
            print(found["node_killed"])
            if cluster.namespaces:
                cluster.join()
                driver.estimate({**EXACT, "targets": 32}, "warm")
                found["node_cut_off"] = failure(cluster, driver, folder, cluster.cut)
                print(found["node_cut_off"])
                cluster.other.kill()
                cluster.mend()
            wait_for(cluster, 1)
            cluster.join()
            found["node_kill_identical"] = found["node_killed"]["identical"]
        driver.close()
        if "memory" in options.only:
            found["memory"] = memory(cluster, folder)
            found["worker_peak_gib"] = max(row["worker_peak_gib"] for row in found["memory"])
        if "model" in options.only:
            found["model"] = modelled(cluster, folder)
        found["namespaces"] = cluster.namespaces
    options.write.write_text(json.dumps(found, indent=2) + "\n")
    table.write(found)


if __name__ == "__main__":
    main()
