"""Go through targets and ids in blocks, by any estimator."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.ids import ghost_ids
from turnover.influence.engine import MeanTarget, Scores, TargetBlock, to_numpy
from turnover.influence.protocol import Estimator
from turnover.influence.sinks import Region, Sink
from turnover.influence.topk import Extremes, Found, merged

_SCANNED, _MOST_PARTS = 16, 32
"""Blocks of ids scanned at once for their extremes, and parts whose extremes are held, at most."""


@dataclass(frozen=True)
class Traversal:
    """Scores blocks of targets on blocks of ids, and puts the scores into a sink.

    Attributes:
        estimator: scores a block.
        top: ids to keep on each side of each target; ``None``: all.
    """

    estimator: Estimator
    top: int | None = None

    def over(self, targets: Iterable[Batch], ids: Tensor, sink: Sink) -> int:
        """Score all targets, block by block; returns their number."""
        columns = self.grid(len(ids))[1]
        count = 0
        for rows, batches in self.announced(targets, ids, sink):
            block = TargetBlock(self.estimator.engines, batches)
            self.fill(Region(block, rows, ids, columns, sink))
            count = rows.stop
        return count

    def announce(self, targets: Iterable[Batch], ids: Tensor, sink: Sink) -> int:
        """Announce all targets to the sink without scoring them; returns their number."""
        return sum(len(batch) for _, some in self.announced(targets, ids, sink) for batch in some)

    def announced(
        self, targets: Iterable[Batch], ids: Tensor, sink: Sink
    ) -> Iterator[tuple[slice, list[Batch]]]:
        """Blocks of targets and their numbers, once the sink knows of them."""
        start = 0
        for batches in _regrouped(targets, self.grid(len(ids))[0]):
            sink.begin(start, batches)
            rows = slice(start, start + sum(map(len, batches)))
            yield rows, [batch.own_memory() for batch in batches]
            start = rows.stop

    def over_mean(
        self, targets: Sequence[Batch], ids: Tensor, sink: Sink, weights: Tensor | None
    ) -> None:
        """Score the mean objective of all targets, or its sum with weights, float64 (targets,)."""
        block = MeanTarget(self.estimator.engines, targets, weights)
        columns = self.estimator.columns(1, len(ids))
        self.fill(Region(block, slice(0, 1), ids, columns, sink))

    @property
    def scans(self) -> bool:
        """Whether :meth:`scan` finds the extremes of each part, and :meth:`settle` writes those of all."""
        return self.top is not None and not self.estimator.ranks_first

    def parts(self, ids: int, columns: int) -> list[slice]:
        """Parts of the ids that can be scored apart, ghosts with the first."""
        if self.estimator.ranks_first:
            return [slice(0, ids)]
        size = columns
        if self.scans:
            size *= max(_SCANNED, -(-ids // (columns * _MOST_PARTS)))
        return [slice(start, min(start + size, ids)) for start in range(0, ids, size)]

    def grid(self, ids: int) -> tuple[int, int]:
        """Block shape, targets and ids; fixes results bit for bit."""
        rows = self.estimator.rows()
        return rows, self.estimator.columns(rows, ids)

    def work(self, ids: int) -> dict[str, int]:
        """Work of each kind that a target takes of each network."""
        return self.estimator.work(ids, first=True, top=self.top)

    def count(self, targets: int, part: slice) -> None:
        """Report a part of the ids that another process scored for a block of targets."""
        work = self.estimator.work(part.stop - part.start, first=not part.start, top=self.top)
        self.estimator.advance(work, targets)

    def fill(self, region: Region, part: slice | None = None) -> None:
        """Score a block of targets on all ids, or on one of :meth:`parts`."""
        part = part or slice(0, len(region.ids))
        whole = self.estimator.halving.whole
        self.estimator.forget()
        if self.scans:
            self._fill_ghosts(region, part)
            whole(lambda: self._settle(region, [self._scan(region, part)]))
            return
        if self.estimator.ranks_first:
            whole(lambda: self.estimator.fill(region, self.top))
            return
        self._fill_ghosts(region, part)
        last = "standard_error" if len(self.estimator.engines) > 1 else "score"
        for start in range(part.start, part.stop, region.columns):
            some = slice(start, min(start + region.columns, part.stop))
            if region.has(last, some):
                self._skip(region, some)
                continue
            scores = self._scores(region.block, region.ids[some])
            region.put("score", to_numpy(scores.mean), some)
            if scores.standard_error is not None:
                region.put("standard_error", to_numpy(scores.standard_error), some)

    def scan(self, region: Region, part: slice) -> Found | None:
        """Find the extremes of one of :meth:`parts`; ``None`` where the sink has those of all."""
        self.estimator.forget()
        self._fill_ghosts(region, part)
        return self.estimator.halving.whole(lambda: self._scan(region, part))

    def _scan(self, region: Region, part: slice) -> Found | None:
        if region.has("train_id"):
            self._skip(region, part)
            return None
        assert self.top is not None
        extremes = Extremes(region.targets, self.top)
        for some in torch.split(region.ids[part], region.columns):
            extremes.add(self.estimator.counted_scores(region.block, some).mean)
        positions, scores = extremes.result()
        return positions + part.start, scores

    def settle(self, region: Region, parts: Sequence[Found | None]) -> None:
        """Put the extremes of all parts into the sink, unless it has them."""
        self.estimator.halving.whole(lambda: self._settle(region, parts))

    def _settle(self, region: Region, parts: Sequence[Found | None]) -> None:
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return
        assert self.top is not None
        self.estimator.forget()
        positions, scores = merged(found, self.top)
        if len(self.estimator.engines) > 1:
            errors = self.estimator.errors(region.block, region.ids, positions, region.columns)
            region.put("standard_error", errors)
        region.put("score", scores)
        region.put("train_id", region.ids.numpy()[positions])

    def _fill_ghosts(self, region: Region, part: slice) -> None:
        if part.start:
            return
        if region.has("ghost"):
            done = self.estimator.work(0, first=True, top=None)
            self.estimator.skip(done, region.targets)
        else:
            ghosts = ghost_ids(self.estimator.ghosts)
            region.put("ghost", to_numpy(self._scores(region.block, ghosts).mean))

    def _scores(self, block: TargetBlock, ids: Tensor) -> Scores:
        return self.estimator.halving.whole(lambda: self.estimator.counted_scores(block, ids))

    def _skip(self, region: Region, part: slice) -> None:
        done = self.estimator.work(part.stop - part.start, first=False, top=None)
        self.estimator.skip(done, region.targets)


def _regrouped(batches: Iterable[Batch], rows: int) -> Iterator[list[Batch]]:
    """Batches of exactly ``rows`` targets in all, but for the last; a batch may be cut."""
    group: list[Batch] = []
    missing = rows
    for batch in batches:
        start = 0
        while len(batch) - start >= missing:
            yield [*group, batch.rows(start, start + missing)]
            start += missing
            group, missing = [], rows
        if start < len(batch):
            group.append(batch.rows(start, len(batch)))
            missing -= len(batch) - start
    if group:
        yield group
