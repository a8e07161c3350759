"""Going through targets and ids in blocks, by any method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.ids import ghost_ids
from turnover.influence.engine import Engine, MeanTarget, Score, Scores, TargetBlock, to_numpy
from turnover.influence.rerank import EXACT_GHOSTS, put_on_scale, rerank
from turnover.influence.sinks import Sink
from turnover.influence.topk import Extremes, Found, merged

_GRADIENT_BYTES = 2**28
_SCORE_BYTES = 2**25
"""Bytes of derivatives and of scores that a block of targets takes."""
_MOST_TARGETS = 1024
_EXACT_BLOCK = (16, 1024)
"""Targets and ids between two saves of exact scores: minutes of a small BERT."""
_RERANKED = 32
_SCANNED, _MOST_PARTS = 16, 32
"""Blocks of ids looked through at once for their extremes, and parts of which extremes are held, at most."""
_RECALLED = 10


@dataclass(frozen=True)
class Walk:
    """How targets and ids are gone through.

    Attributes:
        engines: one for each network.
        method: estimator.
        ghosts: ghosts of the noise floor.
        candidates: ids on each side that are reranked.
        top: keep only so many ids on each side of each target; ``None``: all.
    """

    engines: Sequence[Engine]
    method: str
    ghosts: int
    candidates: int
    top: int | None = None

    def over(self, targets: Iterable[Batch], ids: Tensor, sink: Sink) -> int:
        """Score all targets, block by block; returns how many there were."""
        columns = self.grid(len(ids))[1]
        count = 0
        for rows, batches in self.announced(targets, ids, sink):
            self.fill(TargetBlock(self.engines, batches), rows, ids, sink, columns)
            count += sum(map(len, batches))
        return count

    def announce(self, targets: Iterable[Batch], ids: Tensor, sink: Sink) -> int:
        """Tell the sink of all targets, and score none; returns how many there were."""
        return sum(len(batch) for _, some in self.announced(targets, ids, sink) for batch in some)

    def announced(
        self, targets: Iterable[Batch], ids: Tensor, sink: Sink
    ) -> Iterator[tuple[slice, list[Batch]]]:
        """The blocks of targets, of which the sink has been told: their numbers and they themselves."""
        start = 0
        for batches in _regrouped(targets, self.grid(len(ids))[0]):
            sink.begin(start, batches)
            rows = slice(start, start + sum(map(len, batches)))
            yield rows, [batch.own_memory() for batch in batches]
            start = rows.stop

    def over_mean(self, targets: Sequence[Batch], ids: Tensor, sink: Sink) -> None:
        """Score the mean objective of all targets."""
        block, columns = MeanTarget(self.engines, targets), self.columns(1, len(ids))
        self.fill(block, slice(0, 1), ids, sink, columns)

    def rows(self, targets: int | None = None) -> int:
        """Targets in one block."""
        if self.method == "exact":
            return _EXACT_BLOCK[0]
        if self.method == "rerank":
            return _RERANKED  # the exact part of a block is what takes the time
        units = sum(engine.units for engine in self.engines)
        most = min(_MOST_TARGETS, max(32, _GRADIENT_BYTES // (4 * units) // 32 * 32))
        return most if targets is None else min(most, targets)

    def columns(self, rows: int, ids: int) -> int:
        """Ids in one block of so many targets."""
        if self.method == "exact":
            return _EXACT_BLOCK[1]
        size = max(1024, _SCORE_BYTES // (4 * rows))
        return int(min(2 ** (size.bit_length() - 1), 2 ** (max(ids, 1024) - 1).bit_length()))

    @property
    def scans(self) -> bool:
        """Whether parts are not written, but :meth:`scan` gives what :meth:`settle` writes."""
        return self.top is not None and self.method != "rerank"

    def parts(self, ids: int, columns: int) -> list[slice]:
        """Parts of the ids that can be scored apart, ghosts with the first."""
        if self.method == "rerank":
            return [slice(0, ids)]
        size = columns
        if self.scans:
            size *= max(_SCANNED, -(-ids // (columns * _MOST_PARTS)))
        return [slice(start, min(start + size, ids)) for start in range(0, ids, size)]

    def grid(self, ids: int) -> tuple[int, int]:
        """Targets and ids in one block; whoever repeats it repeats the bits."""
        rows = self.rows()
        return rows, self.columns(rows, ids)

    @property
    def floor_ghosts(self) -> int:
        """Ghosts that make the noise floor of a target."""
        return min(EXACT_GHOSTS, self.ghosts) if self.method == "rerank" else self.ghosts

    def pairs(self, ids: int, part: slice | None = None) -> int:
        """Pairs that a target, or a part of it, takes of each network, by which progress is told."""
        start, stop = (0, ids) if part is None else (part.start, part.stop)
        scored: int = stop - start
        if self.method == "rerank":
            scored = min(2 * self.candidates, scored)
        return scored + (0 if start else self.floor_ghosts)

    def work(self, ids: int, part: slice | None = None) -> dict[str, int]:
        """What a target, or a part of it, takes of each network, by kind."""
        pairs = self.pairs(ids, part)
        first = part is None or not part.start
        if self.method == "exact":
            # Whose standard errors are wanted is known only when all are scored.
            again = 2 * self.top if self.top and len(self.engines) > 1 and first else 0
            return {"exact": pairs + min(again, ids)}
        work = {"backward": int(first), "pair": pairs}
        if self.method == "rerank":
            work["pair"] = (2 if self.top is None else 1) * ids
            work["exact"] = pairs
        return work

    def count(self, targets: int, ids: int, part: slice | None = None) -> None:
        """Targets, or parts of them, are done elsewhere."""
        for engine in self.engines:
            for kind, each in self.work(ids, part).items():
                engine.counts.advance(kind, targets * each)

    def skip(self, targets: int, work: Mapping[str, int]) -> None:
        """Work that was done before."""
        for engine in self.engines:
            for kind, each in work.items():
                engine.counts.skip(kind, targets * each)

    def fill(
        self,
        block: TargetBlock,
        rows: slice,
        ids: Tensor,
        sink: Sink,
        columns: int,
        part: slice | None = None,
    ) -> None:
        """Put the scores of one block of targets where they belong: all, or one of :meth:`parts`."""
        part = part or slice(0, len(ids))
        if self.scans:
            self.settle(
                block, rows, ids, sink, columns, [self.scan(block, rows, ids, sink, columns, part)]
            )
            return
        self._forget()
        if self.method == "rerank":
            self._rerank(block, rows, ids, sink, columns)
            return
        score = self._floor(block, rows, sink, part)
        for start in range(part.start, part.stop, columns):
            some = slice(start, min(start + columns, part.stop))
            several = len(self.engines) > 1
            if sink.has("standard_error" if several else "score", rows, some):
                self.skip(rows.stop - rows.start, {self._kind: some.stop - some.start})
                continue
            _put(sink, rows, score(ids[some]), some)

    def scan(
        self,
        block: TargetBlock,
        rows: slice,
        ids: Tensor,
        sink: Sink,
        columns: int,
        part: slice,
    ) -> Found | None:
        """The extremes of one of :meth:`parts`; ``None`` where the sink has those of all."""
        self._forget()
        score = self._floor(block, rows, sink, part)
        if sink.has("train_id", rows):
            self.skip(rows.stop - rows.start, {self._kind: part.stop - part.start})
            return None
        assert self.top is not None
        extremes = Extremes(rows.stop - rows.start, self.top)
        for some in torch.split(ids[part], columns):
            extremes.add(score(some).mean)
        positions, scores = extremes.result()
        return positions + part.start, scores

    def settle(
        self,
        block: TargetBlock,
        rows: slice,
        ids: Tensor,
        sink: Sink,
        columns: int,
        parts: Sequence[Found | None],
    ) -> None:
        """Put the extremes of all parts where they belong."""
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return
        assert self.top is not None
        self._forget()
        positions, scores = merged(found, self.top)
        if len(self.engines) > 1:
            # Few of them are wanted, but which is known only now.
            sink.put("standard_error", rows, self._errors(block, ids, positions, columns))
        sink.put("score", rows, scores)
        sink.put("train_id", rows, ids.numpy()[positions])

    def _floor(self, block: TargetBlock, rows: slice, sink: Sink, part: slice) -> Score:
        """What scores the block; its ghosts go to the sink with the first part."""
        score: Score = block.exact if self.method == "exact" else partial(self._linear, block)
        if part.start == 0 and not sink.has("ghost", rows):
            sink.put("ghost", rows, to_numpy(score(ghost_ids(self.ghosts)).mean))
        elif part.start == 0:
            again = {self._kind: self.ghosts, "backward": int(self.method != "exact")}
            self.skip(rows.stop - rows.start, again)
        return score

    @property
    def _kind(self) -> str:
        """Kind of work that a score is."""
        return "exact" if self.method == "exact" else "pair"

    def _forget(self) -> None:
        for engine in self.engines:
            engine.forget()

    def _linear(self, block: TargetBlock, ids: Tensor) -> Scores:
        scores = block.linear(ids)
        for engine in self.engines:
            engine.counts.advance("pair", scores.mean.numel())
        return scores

    def _errors(self, block: TargetBlock, ids: Tensor, positions: Any, columns: int) -> Any:
        """Standard errors of the scores of the ids at some positions: float32, of their shape."""
        errors = np.empty(positions.shape, dtype=np.float32)
        if self.method == "exact":
            for index, target in enumerate(block.targets()):
                errors[index] = _error(target.exact(ids[torch.from_numpy(positions[index])]))[0]
            return errors
        wanted = np.unique(positions)
        for start in range(0, len(wanted), columns):
            some = wanted[start : start + columns]
            error = _error(block.linear(ids[torch.from_numpy(some)]))
            row, rank = np.nonzero((positions >= some[0]) & (positions <= some[-1]))
            errors[row, rank] = error[row, np.searchsorted(some, positions[row, rank])]
        return errors

    def _rerank(
        self,
        block: TargetBlock,
        rows: slice,
        ids: Tensor,
        sink: Sink,
        columns: int,
    ) -> None:
        if sink.has("recall", rows):
            self.skip(rows.stop - rows.start, self.work(len(ids)))
            return
        count = rows.stop - rows.start
        parts = torch.split(ids, columns)
        found = rerank(
            block,
            (self._linear(block, part).mean for part in parts),
            ids,
            ghost_ids(self.ghosts),
            targets=count,
            candidates=self.candidates,
            wanted=self.top or _RECALLED,
        )
        sink.put("ghost", rows, found.ghosts)
        if self.top is None:
            start = 0
            for part in parts:
                some = slice(start, start + len(part))
                linear = self._linear(block, part)
                scores = put_on_scale(found, linear)
                inside = (found.positions >= some.start) & (found.positions < some.stop)
                row, column = np.nonzero(inside)
                at = found.positions[row, column] - some.start
                scores[row, at] = found.scores[row, column]
                exact = np.zeros(scores.shape, dtype=bool)
                exact[row, at] = True
                sink.put("score", rows, scores, some)
                sink.put("exact", rows, exact, some)
                if found.standard_error is not None and linear.standard_error is not None:
                    errors = to_numpy(linear.standard_error) * np.abs(found.slope[:, None])
                    errors[row, at] = found.standard_error[row, column]
                    sink.put("standard_error", rows, errors.astype(np.float32), some)
                start = some.stop
        else:
            order = np.argsort(-found.scores, axis=1, kind="stable")
            if order.shape[1] > 2 * self.top:
                ends = [order[:, : self.top], order[:, -self.top :]]
                order = np.concatenate(ends, axis=1)
            positions = np.take_along_axis(found.positions, order, axis=1)
            sink.put("score", rows, np.take_along_axis(found.scores, order, axis=1))
            sink.put("train_id", rows, ids.numpy()[positions])
            if found.standard_error is not None:
                errors = np.take_along_axis(found.standard_error, order, axis=1)
                sink.put("standard_error", rows, errors)
        sink.put("recall", rows, found.recall)


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


def _put(sink: Sink, rows: slice, scores: Scores, columns: slice) -> None:
    sink.put("score", rows, to_numpy(scores.mean), columns)
    if scores.standard_error is not None:
        sink.put("standard_error", rows, to_numpy(scores.standard_error), columns)


def _error(scores: Scores) -> Any:
    assert scores.standard_error is not None
    return to_numpy(scores.standard_error)
