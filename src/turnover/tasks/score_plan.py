"""What scoring a run would take: every step of :func:`turnover.tasks.score.score`, from short trials."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from turnover.data.encoded import batches
from turnover.ids import ghost_ids
from turnover.influence.auto import Auto
from turnover.influence.gram.forecast import Forecast
from turnover.influence.plan import MethodCost, Plan, duration
from turnover.io.bars import stages
from turnover.runs.run import Run
from turnover.tasks.agreement import EXACT_GHOSTS, IDS, TARGETS
from turnover.tasks.score import OBJECTIVES, OWN_GHOSTS, ScoreConfig, Scoring, mean_method
from turnover.tasks.score_trained import BATCH, expected, forecast

_PAIR_BYTES = 32
"""Bytes of a pair while its z, p and q are computed."""


@dataclass(frozen=True)
class Step:
    """A step of scoring: estimated seconds, and GiB beyond the model, the data and the libraries."""

    name: str
    seconds: float
    gib: float


@dataclass(frozen=True)
class ScorePlan:
    """What scoring a run would take.

    Attributes:
        pairs: the methods of the pairs, compared.
        method: the one that runs.
        steps: all that is computed, in order.
    """

    pairs: Plan
    method: str
    steps: tuple[Step, ...]

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def gib(self) -> float:
        """Of the largest step: no two of them run at a time."""
        return max(step.gib for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        steps = [asdict(step) for step in self.steps]
        total = {"steps": steps, "seconds": self.seconds, "gib": self.gib}
        return self.pairs.to_dict() | {"method": self.method} | total

    def __str__(self) -> str:
        lines = [self.pairs.table(self.method), f"<- runs; auto: {self.pairs.chosen}"]
        lines[-1] += f", {self.pairs.reason}"
        width = max(len(step.name) for step in self.steps)
        lines += ["", f"{'step':<{width}} {'time':>10} {'memory':>10}"]
        total = Step("in total", self.seconds, self.gib)
        for step in (*self.steps, total):
            took = duration(step.seconds)
            lines.append(f"{step.name:<{width}} {took:>10} {step.gib:>6.2f} GiB")
        lines.append("memory is beyond the model, the data and the libraries")
        return "\n".join(lines)


def explain_plan(run: Run, config: ScoreConfig) -> ScorePlan | Forecast | None:
    """Estimate what scoring takes; of a run without masks by gram; ``None`` without errors.

    Args:
        run: the run.
        config: options of the scoring.

    Raises:
        InputError: as :func:`turnover.tasks.score.score`.

    Example::

        print(explain_plan(Run.load(Path("runs/mine")), ScoreConfig()))
    """
    if run.masks is None:
        return expected(run, config, OBJECTIVES)
    with stages("plan", 3) as begin:
        return _planned(run, config, begin)


def _planned(run: Run, config: ScoreConfig, begin: Callable[[str], None]) -> ScorePlan | None:
    begin("predictions, signal of the sites")
    start = time.perf_counter()
    scoring = Scoring(run, config)
    prepared = time.perf_counter() - start
    if not scoring.wrong:
        return None
    begin("trials of the methods")
    start = time.perf_counter()
    plan = scoring.influence("auto").plan(batches(scoring.test, scoring.wrong, BATCH), scoring.ids)
    compared = time.perf_counter() - start
    method = plan.chosen if config.method == "auto" else config.method
    start = time.perf_counter()
    import zarr  # noqa: F401 - a run stores by it, and a short one takes as long to import it

    storing = time.perf_counter() - start
    begin("trials of the other steps")
    steps = [Step("predictions, signal of the sites", prepared + storing, 0.0)]
    if config.method == "auto":
        steps.append(Step("trials of the methods", compared, 0.0))
    return ScorePlan(plan, method, (*steps, *_steps(scoring, config, plan, method)))


def _steps(scoring: Scoring, config: ScoreConfig, plan: Plan, method: str) -> list[Step]:
    targets, ids, ghosts = plan.targets, plan.ids, config.ghosts
    costs = {cost.method: cost for cost in plan.costs}
    linear, exact, pairs = costs["linear"], costs["exact"], costs[method]
    fresh = EXACT_GHOSTS if method == "exact" else ghosts
    chosen = scoring.influence(Auto(methods=(method,)))
    known = batches(scoring.known, scoring.wrong, BATCH)
    (again,) = chosen.plan(known, ghost_ids(fresh, start=ghosts)).costs
    (mean,) = scoring.influence(Auto(methods=("linear",))).plan(known, scoring.ids).costs
    steps = [
        _step(f"influence on {targets} errors ({method})", pairs, targets * (ids + ghosts)),
        _step(f"fresh ghosts on the errors ({method})", again, targets * (fresh + ghosts)),
    ]
    if method == "linear":
        checked = min(TARGETS, targets) * (min(IDS, ids) + EXACT_GHOSTS)
        seconds = checked * exact.each["exact"]
        steps.append(Step("agreement of linear and exact, on a sample", seconds, exact.gib))
    if config.gram:
        found = forecast(
            scoring.model, scoring.objective, scoring.training, targets=targets, means=0
        )
        steps.append(Step("gram of the errors", found.seconds, found.memory / 2**30))
    rows = len(scoring.test)
    if mean_method(config) == "exact":
        seconds, gib = exact.seconds * rows / targets, exact.gib
    else:
        seconds = rows * mean.each["backward"] + (ids + ghosts) * linear.each["pair"]
        gib = linear.gib
    steps.append(Step("influence on all test rows in the mean", seconds, gib))
    if scoring.by_rows:
        own = linear.each["backward"] + min(ghosts, OWN_GHOSTS) * linear.each["pair"]
        steps.append(Step("self-influence", len(scoring.training) * own, linear.gib))
    return steps


def _step(name: str, cost: MethodCost, pairs: int) -> Step:
    return Step(name, cost.seconds, cost.gib + _PAIR_BYTES * pairs / 2**30)
