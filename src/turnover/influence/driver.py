"""Estimate with any estimator that scores blocks of targets: checks, noise floors, progress and results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.batches.loaders import Numbers
from turnover.errors import InputError
from turnover.ids import check_scored_ids, given_twice
from turnover.influence.blockwise import Traversal
from turnover.influence.engine import TargetBlock, measure, to_numpy
from turnover.influence.plan import Pilot, Plan, plan
from turnover.influence.progress import Counts, Progress
from turnover.influence.protocol import Estimator, Ids, Method, Setup, Wanted, method_of
from turnover.influence.sinks import MemorySink
from turnover.influence.storing import check_place, store
from turnover.io.bars import slowly
from turnover.results.calibration import GhostPool, NoiseFloor
from turnover.results.result import Result

if TYPE_CHECKING:
    from turnover.results.reader import StoredResult

PLANNED = ("linear", "rerank", "exact")
"""Methods that a plan compares, from the least to the most exact."""
BUDGET = 60.0


class BlockDriver:
    """Runs an estimator that scores blocks of targets (:class:`turnover.influence.protocol.Driver`).

    Args:
        method: options of the estimator.
        setup: networks, objective, ghosts.
    """

    _budget = BUDGET

    def __init__(self, method: Method, setup: Setup) -> None:
        self.method = method
        self._setup = setup
        self._engines = setup.engines
        self._estimator = method.estimator(setup.engines, setup.ghosts)
        if self._estimator.differentiates:
            setup.batches.ordered = setup.sites

    def fit(self, train_batches: Iterable[Any]) -> None:
        """See :meth:`turnover.Influence.fit`."""
        with self._scoring():
            self._estimator.fit(self._setup.batches.checked(train_batches, Numbers.DATA))

    def estimate(
        self, targets: Iterable[Any], train_ids: Ids, wanted: Wanted
    ) -> Result | StoredResult:
        """See :meth:`turnover.Influence.estimate`."""
        check_place(wanted.engine, wanted.out)
        ids = self._checked_ids(train_ids)
        self._check_top(wanted.top)
        if wanted.coordinates and wanted.out is None:
            raise InputError("coordinates are stored beside the scores: give out= as well")
        with self._scoring():
            batches = self._setup.batches.checked(targets, Numbers.ROWS)
            traversal, batches = self._begin(targets, batches, ids, wanted)
            described = self._described(traversal.estimator, ids)
            if wanted.out is not None:
                return store(traversal, batches, ids, wanted, described)
            sink = MemorySink(len(ids))
            traversal.over(batches, ids, sink)
            return sink.result(ids.numpy(), **described)

    def aggregate(self, targets: Iterable[Any], train_ids: Ids, weights: Tensor | None) -> Result:
        """See :meth:`turnover.Influence.aggregate`."""
        ids = self._checked_ids(train_ids)
        with self._scoring():
            batches = self._setup.batches.checked(targets)
            traversal, batches = self._begin(targets, batches, ids, Wanted(), mean=True)
            sink = MemorySink(len(ids))
            traversal.over_mean(list(batches), ids, sink, weights)
            result = sink.result(ids.numpy(), **self._described(traversal.estimator, ids))
        error, exact, recall = result.standard_error, result.exact, result.recall
        return replace(
            result,
            scores=result.scores[0],
            floor=NoiseFloor(result.floor.mean[0], result.floor.sd[0]),
            target_ids=None,
            standard_error=None if error is None else error[0],
            exact=None if exact is None else exact[0],
            recall=None if recall is None else recall[0],
        )

    def self_influence(self, train_batches: Iterable[Any] | None) -> Result:
        """See :meth:`turnover.Influence.self_influence`."""
        if train_batches is None:
            raise InputError(f"self-influence by method={self.method.name!r} needs train_batches")
        estimator = self._estimator.on_itself
        pool = GhostPool()
        ids: list[Tensor] = []
        own, errors, floors = [], [], []
        seen: set[int] = set()
        work = {kind: len(self._engines) * each for kind, each in estimator.own_work().items()}
        progress = Progress("self-influence", work, unit="row", shown=self._setup.progress)
        with self._scoring(progress):
            adapted = self._setup.batches.adapted(train_batches)
            for batch in progress.follow(train_batches, adapted):
                if batch.ids is None:
                    raise InputError("self-influence needs the ids of its batches")
                row_ids = self._checked_ids(batch.ids)
                again = sorted(seen.intersection(row_ids.tolist()))
                if again:
                    raise given_twice(again)
                seen.update(row_ids.tolist())
                batch = self._setup.batches.check(batch)
                if not ids:
                    measure(self._engines, batch)
                    progress.advance("measure", 0)  # takes time once
                scores, noise = estimator.own(TargetBlock(self._engines, [batch]), row_ids)
                own.append(to_numpy(scores.mean[0]))
                if scores.standard_error is not None:
                    errors.append(to_numpy(scores.standard_error[0]))
                floors.append(pool.add(to_numpy(noise)))
                ids.append(row_ids)
        if not ids:
            raise InputError("no training batches given")
        all_ids = torch.cat(ids)
        return Result(
            scores=np.concatenate(own),
            floor=NoiseFloor(
                np.concatenate([floor.mean for floor in floors]),
                np.concatenate([floor.sd for floor in floors]),
            ),
            null=pool.null(),
            train_ids=all_ids.numpy(),
            target_ids=None,
            standard_error=np.concatenate(errors) if errors else None,
            **self._described(estimator, all_ids),
        )

    def plan(self, targets: Iterable[Any], train_ids: Ids, wanted: Wanted) -> Plan:
        """See :meth:`turnover.Influence.plan`."""
        ids = self._checked_ids(train_ids)
        with self._scoring():
            batches = list(self._measured(self._setup.batches.checked(targets)))
            return self._compared(batches, ids, wanted)

    def _planned(self) -> list[Estimator]:
        """What a plan compares: this method with its options, and the others by default."""
        planned = [
            self._estimator
            if name == self.method.name
            else method_of(name).estimator(self._engines, self._setup.ghosts)
            for name in PLANNED
        ]
        return planned if self._estimator in planned else [self._estimator, *planned]

    def _compared(self, batches: Sequence[Batch], ids: Tensor, wanted: Wanted) -> Plan:
        targets, in_memory = sum(map(len, batches)), wanted.out is None
        pilot = Pilot(
            self._engines, batches[0], targets, len(ids), top=wanted.top, in_memory=in_memory
        )
        shown = self._setup.progress
        tried = slowly(self._planned(), "trials of the methods", "method", shown=shown)
        costs = [one.cost(pilot) for one in tried]
        return plan(costs, targets, len(ids), budget=self._budget)

    def _choose(
        self,
        batches: Iterator[Batch],
        ids: Tensor,  # noqa: ARG002
        wanted: Wanted,  # noqa: ARG002
    ) -> tuple[Estimator, Iterable[Batch]]:
        """The estimator of some targets, and the targets."""
        return self._estimator, batches

    def _check_top(self, top: int | None) -> None:
        self._estimator.check_top(top)

    def _begin(
        self,
        targets: Iterable[Any],
        batches: Iterator[Batch],
        ids: Tensor,
        wanted: Wanted,
        *,
        mean: bool = False,
    ) -> tuple[Traversal, Iterator[Batch]]:
        """What scores the targets, and the targets, followed by a progress bar."""
        estimator, found = self._choose(self._measured(batches), ids, wanted)
        traversal = Traversal(estimator, wanted.top)
        batches = iter(found)
        first = next(batches)
        work = {kind: len(self._engines) * n for kind, n in traversal.work(len(ids)).items()}
        # The derivatives of the mean are one target's.
        once = {"pair": work.pop("pair")} if mean and "pair" in work else None
        shown = self._setup.progress
        guesses: dict[str, float] = {}
        if shown and len(work) + bool(once) > 1:  # some kind of work runs late
            rows = estimator.rows(1 if mean else len(first))
            pilot = Pilot(self._engines, first, rows, len(ids), quick=True)
            seconds = estimator.seconds(pilot)
            guesses = {kind: each / len(self._engines) for kind, each in seconds.items()}
        title = f"influence ({estimator.name})"
        progress = Progress(title, work, once=once, seconds=guesses, shown=shown)
        self._listen(progress)
        known = found if isinstance(found, list) else targets
        return traversal, progress.follow(known, chain([first], batches))

    def _measured(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, once all widths are known from the first."""
        first = next(batches, None)
        if first is None:
            raise InputError("no targets given")
        measure(self._engines, first)
        return chain([first], batches)

    def _described(self, estimator: Estimator, ids: Tensor) -> dict[str, Any]:
        digests = [engine.network.digest() for engine in self._engines]
        return self._setup.described(estimator.name, digests, len(ids))

    @contextmanager
    def _scoring(self, progress: Counts | None = None) -> Iterator[None]:
        with ExitStack() as stack:
            for engine in self._engines:
                stack.enter_context(engine.evaluating())
            stack.callback(self._finish)
            self._listen(progress or Counts())
            yield

    def _listen(self, counts: Counts) -> None:
        for engine in self._engines:
            engine.counts = counts

    def _finish(self) -> None:
        self._engines[0].counts.close()
        self._listen(Counts())

    def _checked_ids(self, train_ids: Ids) -> Tensor:
        ghosts = self._setup.ghosts
        if train_ids is None:
            raise InputError(
                f"method={self.method.name!r} needs train_ids: it scores any ids it is given"
            )
        ids = check_scored_ids(train_ids)
        if bool(((ids < 0) & (ids >= -ghosts)).any()):
            raise InputError(
                f"ids -1 to -{ghosts} are the ghosts of the noise floor; use "
                f"turnover.ghost_ids(count, start={ghosts}) for fresh ones"
            )
        return ids
