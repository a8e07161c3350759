"""The automatic choice of an estimator, by what each is estimated to cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from turnover.batches import Batch
from turnover.errors import InputError, check_number
from turnover.influence.driver import BUDGET, PLANNED, BlockDriver
from turnover.influence.protocol import (
    Estimator,
    Method,
    Setup,
    Wanted,
    method_of,
    nothing_to_fit,
    register,
)


@dataclass(frozen=True)
class Auto(Method):
    """Options of the automatic choice: the most exact method that is estimated to fit a budget.

    A pilot of a few seconds times every method on the first targets; :meth:`turnover.Influence.plan` prints
    the estimates. If none fits, the least exact method is taken. A stored result is resumed with the method
    that began it. Self-influence is by the least exact method.

    Attributes:
        seconds: the budget.
        methods: to choose among, from the least to the most exact: names, or options such as
            :class:`turnover.Rerank`.

    Raises:
        InputError: a budget below 0, no methods, an unknown one, or one that does not score by masks.

    Source: this library; the methods name theirs.

    Example::

        candidates = turnover.Rerank(candidates=100)
        method = turnover.Auto(seconds=300, methods=("linear", candidates, "exact"))
        print(turnover.Influence(network, method=method).plan(targets, train_ids))
    """

    seconds: float = BUDGET
    methods: Sequence[str | Method] = PLANNED

    def __post_init__(self) -> None:
        check_number("seconds", self.seconds, finite=False)
        if isinstance(self.methods, str | Method) or not self.methods:
            raise InputError(f"Auto needs several methods to choose among, got {self.methods!r}")
        names = [method_of(one).name for one in self.methods]
        if len(set(names)) < len(names):
            raise InputError(f"Auto chooses among different methods, and got {', '.join(names)}")
        for one in self.methods:
            if method_of(one).driver is not None:
                raise InputError(
                    f"Auto cannot choose {one!r}: it chooses among methods that score by masks"
                )


class AutoDriver(BlockDriver):
    """Runs the estimator that it chooses for each call."""

    def __init__(self, method: Auto, setup: Setup) -> None:
        self._budget = method.seconds
        self._methods = [method_of(one) for one in method.methods]
        super().__init__(self._methods[0], setup)
        self.method = method
        self._estimators = [one.estimator(setup.engines, setup.ghosts) for one in self._methods]
        if any(one.differentiates for one in self._estimators):
            setup.batches.ordered = setup.sites

    def fit(self, train_batches: Iterable[Any]) -> None:  # noqa: ARG002
        """See :meth:`turnover.Influence.fit`."""
        raise nothing_to_fit(self.method.name)

    def _planned(self) -> list[Estimator]:
        return self._estimators

    def _check_top(self, top: int | None) -> None:
        for one in self._estimators:
            one.check_top(top)

    def _choose(
        self, batches: Iterator[Batch], ids: Tensor, wanted: Wanted
    ) -> tuple[Estimator, Iterable[Batch]]:
        found = list(batches)
        chosen = None if wanted.out is None else _stored_method(wanted.out)
        by_name = {one.name: one for one in self._estimators}
        if chosen not in by_name:
            chosen = self._compared(found, ids, wanted).chosen
        return by_name[chosen], found


register("auto", Auto, driver=AutoDriver)


def _stored_method(out: str | Path) -> str | None:
    """The method that began a stored result."""
    from turnover.results import store

    return store.stored_method(out)
