"""Gram by all pairs of a small training set, by landmarks of a large one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from turnover.errors import InputError
from turnover.influence.gram.disk import Limits
from turnover.influence.gram.estimator import GramDriver
from turnover.influence.gram.landmark_driver import LandmarkDriver
from turnover.influence.gram.options import Gram, gradients_of
from turnover.influence.gram.passes import Passes
from turnover.influence.plan import FitPlan, Plan
from turnover.influence.protocol import Ids, Setup, Wanted, register
from turnover.results.result import Result


class AutoDriver:
    """Counts the training instances, and leaves the rest to one of the two.

    Args:
        method: how to score, with ``landmarks="auto"``.
        setup: networks and objective.
    """

    def __init__(self, method: Gram, setup: Setup) -> None:
        self._options, self._setup = method, setup
        self._limits = Limits()
        self._landmarks = LandmarkDriver(method, setup)
        self._taken: GramDriver = self._landmarks

    def fit(self, train_batches: Iterable[Any]) -> None:
        """See :class:`.estimator.GramDriver`."""
        self.fit_to(train_batches, Wanted())

    def fit_to(self, train_batches: Iterable[Any], wanted: Wanted) -> None:
        """See :class:`.landmark_driver.LandmarkDriver`; what is kept is kept by landmarks."""
        setup, stored = self._setup, wanted.out is not None
        passes = Passes(train_batches, setup.batches, setup.models, hashed=stored)
        rows = len(passes) * gradients_of(setup.objective, self._options)
        if stored or rows > self._limits.rows:
            self._landmarks.take_in(passes, wanted)
            self._taken = self._landmarks
            return
        if wanted.engine != "process":
            raise InputError(
                f'landmarks="auto" takes all pairs of {len(passes)} training instances, which '
                f"engine={wanted.engine!r} does not compute: give a number of landmarks, or leave engine= out"
            )
        every = GramDriver(replace(self._options, landmarks=None, exact=False), setup)
        every.fit(train_batches)
        self._taken = every

    def estimate(self, targets: Iterable[Any], train_ids: Ids, wanted: Wanted) -> Result:
        """See :class:`.estimator.GramDriver`."""
        return self._taken.estimate(targets, train_ids, wanted)

    def aggregate(self, targets: Iterable[Any], train_ids: Ids, weights: Tensor | None) -> Result:
        """See :class:`.estimator.GramDriver`."""
        return self._taken.aggregate(targets, train_ids, weights)

    def self_influence(self, train_batches: Iterable[Any] | None) -> Result:
        """See :class:`.estimator.GramDriver`."""
        return self._taken.self_influence(train_batches)

    def plan(self, targets: Iterable[Any], train_ids: Ids, wanted: Wanted) -> Plan:
        """See :class:`.estimator.GramDriver`."""
        return self._taken.plan(targets, train_ids, wanted)

    def plan_fit(
        self, targets: Iterable[Any], train_batches: Iterable[Any], wanted: Wanted
    ) -> FitPlan:
        """See :class:`.estimator.GramDriver`."""
        return self._landmarks.plan_fit(targets, train_batches, wanted)


def driver_of(method: Gram, setup: Setup) -> GramDriver | AutoDriver:
    """Make the driver for options of gram: by landmarks, by all pairs, or by what suits."""
    if method.landmarks == "auto":
        return AutoDriver(method, setup)
    return (GramDriver if method.landmarks is None else LandmarkDriver)(method, setup)


register("gram", Gram, driver=driver_of)
