"""The exact estimator: the objective in the hidden minus in the exposed sub-network of every id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover.batches import Batch
from turnover.errors import InputError
from turnover.ids import ghost_ids
from turnover.influence.calibrated import calibrated
from turnover.influence.engine import Engine, Scores, TargetBlock
from turnover.influence.forwards import Forwards
from turnover.influence.gradients import finite
from turnover.influence.linear import Linear, LinearEstimator
from turnover.influence.plan import PILOT_IDS, MethodCost, Pilot, timed
from turnover.influence.protocol import Estimator, Method, register
from turnover.results.calibration import noise_floor

_FEW_GHOSTS, _MORE_GHOSTS = 16, 64
_QUICK = 0.25
"""Seconds below which a timing is repeated on more ids."""


@dataclass(frozen=True)
class Exact(Method):
    """Options of the exact estimator: every target under both masks of every id.

    The objective in the sub-network that never learned the id, minus that in the one that did. Two forwards
    for each pair, of what the ids do not share; each shortcut is compared with the definition before it is
    trusted (``docs/scale.md``).

    Attributes:
        block: ids in one forward; ``None``: as many as the caches hold. Less takes less memory.

    Raises:
        InputError: a block of less than 1.

    Source: Kobayashi et al. 2020 (arXiv 2012.04207), equation 6.

    Example::

        influence = turnover.Influence(network, method=turnover.Exact(block=64))
        result = influence.estimate(targets, train_ids)
    """

    block: int | None = None

    def __post_init__(self) -> None:
        check_block(self.block)


def check_block(block: int | None) -> None:
    """Refuse forwards of no ids.

    Raises:
        InputError: a block of less than 1.
    """
    if block is not None and block < 1:
        raise InputError(f"block must be >= 1, got {block}")


class ExactEstimator(Estimator):
    """Scores ids by forwards under their masks."""

    work_kind = "exact"
    reports_work = True
    runs_masked = True
    block_shape = (16, 1024)  # between two saves: minutes of a small BERT

    def scores(self, block: TargetBlock, ids: Tensor) -> Scores:
        """See :class:`Estimator`."""
        return block.scores(lambda engine, batches: self._scored(engine, batches, ids))

    def forget(self) -> None:
        """See :class:`Estimator`."""
        for engine in self.engines:
            self._forwards(engine).forget()

    def cost(self, pilot: Pilot) -> MethodCost:
        """See :class:`Estimator`."""
        each = self.seconds_of_pair(pilot)
        pairs = self.work(pilot.ids, first=True, top=None)["exact"]
        size = self.rows() * self.columns(self.rows(), pilot.ids) * 4
        size += max(
            8 * self._forwards(one).elements * self._forwards(one).rows_at_once
            for one in self.engines
        )
        floor = float(np.median(noise_floor(self._ghosts(pilot, each)).sd))
        seconds = pilot.targets * pairs * each
        return MethodCost(self.name, seconds, (pilot.held + size) / 2**30, floor)

    def seconds_of_pair(self, pilot: Pilot) -> float:
        """Seconds of a pair by all networks."""
        target = pilot.first.rows(0, 1)
        return pilot.once("exact", lambda: sum(self._timed(one, target) for one in self.engines))

    def guess(self, first: Batch) -> float:
        """Seconds of a pair, sooner and less surely."""
        target, ids = first.rows(0, 1), ghost_ids(_FEW_GHOSTS)
        found = [timed(one, partial(self._scored, one, [target], ids)) for one in self.engines]
        return sum(found) / len(found) / len(ids)

    def _scored(self, engine: Engine, batches: Sequence[Batch], ids: Tensor) -> Tensor:
        moved = [engine.moved(batch) for batch in batches]
        scores = self._forwards(engine).scores(moved, ids, partial(engine.counts.advance, "exact"))
        return finite(scores, "influence")

    def _forwards(self, engine: Engine) -> Forwards:
        block = self.options.block

        def make() -> Forwards:
            return Forwards(engine.network, engine.objective, block, engine.sites)

        return engine.once(("forwards", block), make)

    def _timed(self, engine: Engine, target: Batch) -> float:
        self._scored(engine, [target], ghost_ids(2))  # finds the strategy
        count = 8
        while True:
            run = partial(self._scored, engine, [target], torch.arange(count))
            seconds = timed(engine, run, warm=False)
            if seconds > _QUICK or count >= PILOT_IDS:
                return seconds / count
            count *= 4

    def _ghosts(self, pilot: Pilot, each: float) -> NDArray[np.float32]:
        """A few exact ghosts with the mean and deviation that linear scores of all foretell."""

        def calibrate() -> NDArray[np.float32]:
            linear = LinearEstimator(Linear(), self.engines, self.ghosts).ghost_scores(pilot)
            count = _FEW_GHOSTS if each > _QUICK / _MORE_GHOSTS else _MORE_GHOSTS
            some = ghost_ids(self.ghosts)[:count]
            return calibrated(linear, self.scores(pilot.block, some).mean.cpu().numpy())[3]

        return pilot.once("exact ghosts", calibrate)


register("exact", Exact, ExactEstimator)
