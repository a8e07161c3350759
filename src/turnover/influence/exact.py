"""The exact estimator: the objective in the hidden minus in the exposed sub-network of every id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from turnover.batches import Batch
from turnover.dropout.modules import device_of
from turnover.errors import check_whole
from turnover.ids import ghost_ids
from turnover.influence.engine import Engine, Scores, TargetBlock, to_numpy
from turnover.influence.forwards import Forwards
from turnover.influence.gradients import finite
from turnover.influence.linear import Linear, LinearEstimator, calibrated
from turnover.influence.plan import Pilot
from turnover.influence.protocol import Estimator, Method, register

_FEW_GHOSTS, _MORE_GHOSTS = 16, 64
_SLOW = 0.004
"""Seconds of a pair from which on a pilot scores few ghosts."""


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
        if self.block is not None:
            check_whole("block", self.block, 1)


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

    def memory(self, pilot: Pilot) -> int:  # noqa: ARG002
        """See :class:`Estimator`."""
        return max(self._forwards(engine).nbytes for engine in self.engines)

    def ghost_scores(self, pilot: Pilot) -> NDArray[np.float64]:
        """See :class:`Estimator`: a few, with the mean and deviation that linear scores of all foretell."""

        def calibrate() -> NDArray[np.float64]:
            linear = LinearEstimator(Linear(), self.engines, self.ghosts).ghost_scores(pilot)
            count = _FEW_GHOSTS if self.seconds(pilot)["exact"] > _SLOW else _MORE_GHOSTS
            some = self.scores(pilot.block, ghost_ids(self.ghosts)[:count])
            return calibrated(linear, to_numpy(some.mean))[3].astype(np.float64)

        return pilot.once("exact ghosts", calibrate)

    def seconds(self, pilot: Pilot) -> dict[str, float]:
        """See :class:`Estimator`."""
        return pilot.once(("exact", self.options.block), partial(super().seconds, pilot))

    def _scored(self, engine: Engine, batches: Sequence[Batch], ids: Tensor) -> Tensor:
        moved = [engine.moved(batch) for batch in batches]
        ids = ids.to(device_of(engine.network.model))  # once, and not for each block of them
        scores = self._forwards(engine).scores(moved, ids, partial(engine.counts.advance, "exact"))
        return finite(scores, "influence")

    def _forwards(self, engine: Engine) -> Forwards:
        block = self.options.block

        def make() -> Forwards:
            return Forwards(engine.network, engine.objective, block, engine.sites, engine.halving)

        return engine.once(("forwards", block), make)


register("exact", Exact, ExactEstimator)
