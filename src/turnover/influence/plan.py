"""What each method would cost, told from a pilot of a few seconds before anything else runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.dropout.modules import device_of
from turnover.ids import ghost_ids
from turnover.influence.blockwise import Walk
from turnover.influence.engine import Engine, TargetBlock
from turnover.influence.rerank import calibrated
from turnover.results.calibration import noise_floor

_PILOT_ROWS = 8
_PILOT_IDS = 4096
_FEW_GHOSTS, _MORE_GHOSTS = 16, 64
_QUICK = 0.25
"""Seconds below which a timing is taken again on more."""


@dataclass(frozen=True)
class MethodCost:
    """One method's estimated cost.

    Attributes:
        method: name.
        seconds: estimated time, masks and ghosts included.
        gib: estimated memory beyond the model and the targets.
        noise_floor: median over the pilot's targets, in the objective's units.
    """

    method: str
    seconds: float
    gib: float
    noise_floor: float


@dataclass(frozen=True)
class Plan:
    """What an estimate would cost by each method.

    Attributes:
        targets: number of targets.
        ids: number of training ids.
        budget: seconds that ``auto`` may take.
        costs: one for each method, the quickest first.
        chosen: what ``auto`` takes.
        reason: why.
    """

    targets: int
    ids: int
    budget: float
    costs: tuple[MethodCost, ...]
    chosen: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.targets:,} targets x {self.ids:,} training ids, estimated"]
        lines.append(f"{'method':<8} {'time':>12} {'memory':>10} {'noise floor':>12}")
        for cost in self.costs:
            mark = " <-" if cost.method == self.chosen else ""
            lines.append(
                f"{cost.method:<8} {_duration(cost.seconds):>12} {cost.gib:>6.2f} GiB "
                f"{cost.noise_floor:>12.4g}{mark}"
            )
        lines.append(f"{self.chosen}: {self.reason}")
        return "\n".join(lines)


def plan(walk: Walk, batches: Sequence[Batch], ids: int, *, budget: float, in_memory: bool) -> Plan:
    """Estimate the cost of every method, and choose one.

    Exact is chosen where it fits the budget, else rerank, else linear.

    Args:
        walk: how targets and ids would be gone through; its method is not looked at.
        batches: all targets; the first rows are timed.
        ids: number of training ids.
        budget: seconds.
        in_memory: whether all scores would be held in memory.
    """
    targets = sum(len(batch) for batch in batches)
    first = batches[0].rows(0, min(_PILOT_ROWS, len(batches[0])))
    ghosts = ghost_ids(walk.ghosts)
    ways = {method: replace(walk, method=method) for method in ("linear", "rerank", "exact")}
    backward = timing = exact = 0.0
    units = exact_bytes = 0
    for engine in walk.engines:
        backward += _backward(engine, first)
        timing += _product(engine, first, ways["linear"].rows(targets))
        exact += _exact(engine, first)
        units += engine.units
        exact_bytes = max(exact_bytes, 8 * engine.elements * engine.rows_at_once)
    block = TargetBlock(walk.engines, [first])
    linear_ghosts = block.linear(ghosts).mean.cpu().double().numpy()
    some = ghosts[: _FEW_GHOSTS if exact > _QUICK / _MORE_GHOSTS else _MORE_GHOSTS]
    exact_ghosts = block.exact(some).mean.cpu().numpy()
    on_floor = calibrated(linear_ghosts, exact_ghosts)[3]
    floors = {
        "linear": float(np.median(noise_floor(linear_ghosts).sd)),
        "exact": float(np.median(noise_floor(on_floor).sd)),
    }
    held = targets * (min(2 * walk.top, ids) if walk.top else ids) * 4 if in_memory else 0
    linear_s = targets * (backward + timing * ways["linear"].pairs(ids))
    again = 2 if walk.top is None else 1  # a dense rerank goes through the linear scores twice
    times = {
        "linear": linear_s,
        "rerank": again * linear_s + targets * ways["rerank"].pairs(ids) * exact,
        "exact": targets * ways["exact"].pairs(ids) * exact,
    }
    costs = []
    for method, seconds in times.items():
        rows = ways[method].rows(targets)
        work = rows * ways[method].columns(rows, ids) * 4
        work += exact_bytes if method == "exact" else 3 * rows * units * 4
        if method == "rerank" and walk.top is None:
            work += rows * ids * 5
        floor = floors["linear" if method == "linear" else "exact"]
        costs.append(MethodCost(method, seconds, (held + work) / 2**30, floor))
    costs.sort(key=lambda cost: cost.seconds)
    chosen, reason = _choose(times, budget)
    return Plan(targets, ids, budget, tuple(costs), chosen, reason)


def pilot(walk: Walk, first: Batch, targets: int) -> dict[str, float]:
    """Seconds of a piece of each kind of work that comes late, when a progress bar has to know early.

    Args:
        walk: how targets are gone through.
        first: a batch of them.
        targets: how many are known to be in one block.
    """
    if walk.method == "exact":
        return {}
    rows, engines = walk.rows(targets), walk.engines
    some = first.rows(0, min(2, len(first)))
    found = {"pair": sum(_product(one, some, rows) for one in engines) / len(engines)}
    if walk.method == "rerank":
        found["exact"] = sum(_glimpse(one, some) for one in engines) / len(engines)
    return found


def _choose(times: dict[str, float], budget: float) -> tuple[str, str]:
    if times["exact"] <= budget:
        return "exact", f"all pairs exactly within {_duration(budget)}"
    if times["rerank"] <= budget:
        return "rerank", f"exact would take {_duration(times['exact'])}; its candidates fit"
    return "linear", f"even reranking would take {_duration(times['rerank'])}"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _backward(engine: Engine, batch: Batch) -> float:
    """Seconds of derivatives for one target."""
    return _seconds(engine, lambda: engine.gradients([batch])) / len(batch)


def _product(engine: Engine, batch: Batch, rows: int) -> float:
    """Seconds of one linear pair, where so many targets are multiplied at once."""
    gradients = engine.gradients([batch])
    scorer = engine.scorer(gradients.repeat(-(-rows // len(gradients)), 1)[:rows])
    ids = torch.arange(_PILOT_IDS)
    return _seconds(engine, lambda: scorer.scores(ids)) / (rows * len(ids))


def _exact(engine: Engine, batch: Batch) -> float:
    """Seconds of one exact pair."""
    target = batch.rows(0, 1)
    engine.exact([target], ghost_ids(2))  # the way is found
    count = 8
    while True:
        ids = torch.arange(count)
        seconds = _seconds(engine, partial(engine.exact, [target], ids), warm=False)
        if seconds > _QUICK or count >= _PILOT_IDS:
            return seconds / count
        count *= 4


def _glimpse(engine: Engine, batch: Batch) -> float:
    """Seconds of one exact pair, once the way is found; less surely and sooner."""
    target, ids = batch.rows(0, 1), ghost_ids(_FEW_GHOSTS)
    return _seconds(engine, lambda: engine.exact([target], ids)) / len(ids)


def _seconds(engine: Engine, function: Callable[[], Tensor], *, warm: bool = True) -> float:
    device = device_of(engine.network.model)
    if warm:
        function()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
