"""Estimated time, memory and noise floor of each method, from a pilot of a few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.dropout.modules import device_of
from turnover.influence.engine import Engine, Once, TargetBlock

_ROWS = 8
PILOT_IDS = 4096
_QUICK_IDS = 16
_LONG_ENOUGH = 0.25
"""Seconds from which on a timing is trusted."""


@dataclass(frozen=True)
class MethodCost:
    """One method's estimated cost.

    Attributes:
        method: name.
        seconds: estimated time, masks and ghosts included.
        gib: estimated memory beyond the model and the targets.
        noise_floor: median over the pilot's targets, in the objective's units.
        each: seconds of a piece of each kind of work, such as a pair.
    """

    method: str
    seconds: float
    gib: float
    noise_floor: float
    each: dict[str, float] = field(default_factory=dict)


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
        return f"{self.table(self.chosen)}\n{self.chosen}: {self.reason}"

    def table(self, marked: str) -> str:
        """The costs, with an arrow at a method."""
        lines = [f"{self.targets:,} targets x {self.ids:,} training ids, estimated"]
        lines.append(f"{'method':<8} {'time':>12} {'memory':>10} {'noise floor':>12}")
        for cost in self.costs:
            mark = " <-" if cost.method == marked else ""
            lines.append(
                f"{cost.method:<8} {duration(cost.seconds):>12} {cost.gib:>6.2f} GiB "
                f"{cost.noise_floor:>12.4g}{mark}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class FitCost:
    """Estimated cost of one way to fit the training set and score targets.

    Attributes:
        way: what is computed.
        chosen: whether the method's options take it.
        fit_seconds: of :meth:`turnover.Influence.fit`.
        once_seconds: of what :meth:`turnover.Influence.estimate` computes before the first scores.
        target_seconds: of each target, on average.
        memory: largest number of bytes beyond the model, the data and the libraries.
        disk: bytes of temporary files.
        store: bytes of the folder that ``fit(..., out=)`` writes; 0: it writes none.
        seconds: of the fit and all targets.
        work: number of pieces of each kind of work, for each network: gradients of training rows, and
            inner products of gradients with one another.
    """

    way: str
    chosen: bool
    fit_seconds: float
    once_seconds: float
    target_seconds: float
    memory: int
    disk: int
    store: int
    seconds: float
    work: dict[str, int]


@dataclass(frozen=True)
class FitPlan:
    """What a fit and an estimate would take, in each way that the method knows.

    Attributes:
        targets: number of targets.
        instances: number of training instances.
        gradients: of each instance.
        costs: one for each way.
    """

    targets: int
    instances: int
    gradients: int
    costs: tuple[FitCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        each = f", {self.gradients} gradients each" if self.gradients > 1 else ""
        lines = [f"{self.targets:,} targets x {self.instances:,} instances{each}, estimated"]
        width = max(len(cost.way) for cost in self.costs)
        titles = ("fit", "once", "each target", "in total", "memory", "temporary", "store")
        lines.append(" " * width + "".join(f"{title:>13}" for title in titles))
        for cost in self.costs:
            times = (cost.fit_seconds, cost.once_seconds, cost.target_seconds, cost.seconds)
            cells = [duration(one) for one in times]
            cells += [_bytes(one) for one in (cost.memory, cost.disk, cost.store)]
            mark = " <-" if cost.chosen else ""
            lines.append(f"{cost.way:<{width}}" + "".join(f"{one:>13}" for one in cells) + mark)
        return "\n".join(lines)


class Pilot(Once):
    """A few targets, on which estimators time what they do.

    Args:
        engines: one for each network.
        first: a batch of targets, whose first rows are timed.
        targets: number of targets.
        ids: number of training ids.
        top: ids to keep on each side of each target; ``None``: all.
        in_memory: whether all scores are held in memory.
        quick: whether to time a few ids alone, for a progress bar that corrects itself.

    Attributes:
        first: the targets that are timed.
        block: the same, as a block.
        held: bytes of scores that are held until the end.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        first: Batch,
        targets: int,
        ids: int,
        *,
        top: int | None = None,
        in_memory: bool = False,
        quick: bool = False,
    ) -> None:
        super().__init__()
        self._quick = quick
        self.targets, self.ids, self.top = targets, ids, top
        self.first = first.rows(0, min(_ROWS, len(first)))
        self.block = TargetBlock(engines, [self.first])
        self.held = targets * (min(2 * top, ids) if top else ids) * 4 if in_memory else 0
        devices = {device_of(engine.network.model) for engine in engines}
        self._gpus = [device for device in devices if device.type == "cuda"]

    def timed(self, function: Callable[[], object], *, warm: bool = True) -> float:
        """Seconds of a call; with ``warm``, of the second one."""
        if warm:
            function()
        start = time.perf_counter()
        function()
        for device in self._gpus:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def seconds_of_id(self, function: Callable[[Tensor], object]) -> float:
        """Seconds that a function of ids takes for each, timed on as many as it needs."""
        count = _QUICK_IDS if self._quick else 8
        while True:
            seconds = self.timed(partial(function, torch.arange(count)), warm=False)
            if self._quick or seconds > _LONG_ENOUGH or count >= PILOT_IDS:
                return seconds / count
            count *= 4


def plan(costs: Sequence[MethodCost], targets: int, ids: int, *, budget: float) -> Plan:
    """Choose the most exact method that fits a budget.

    Args:
        costs: from the least to the most exact method.
        targets: number of targets.
        ids: number of training ids.
        budget: seconds.
    """
    chosen, reason = _choose({cost.method: cost.seconds for cost in costs}, budget)
    ordered = sorted(costs, key=lambda cost: cost.seconds)
    return Plan(targets, ids, budget, tuple(ordered), chosen, reason)


def _choose(times: dict[str, float], budget: float) -> tuple[str, str]:
    *_, best = methods = list(times)
    if times[best] <= budget:
        return best, f"the most exact method, and within {duration(budget)}"
    for method, better in zip(methods[-2::-1], methods[::-1], strict=False):
        if times[method] <= budget:
            return method, f"{better} would take {duration(times[better])}; this fits"
    second = methods[min(1, len(methods) - 1)]
    took, most = duration(times[second]), duration(budget)
    return methods[0], f"even {second} would take {took}, and the budget is {most}"


def duration(seconds: float) -> str:
    """Seconds as people read them."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _bytes(count: int) -> str:
    """Bytes as people read them."""
    if not count:
        return "-"
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
