"""Gram for many training instances: by landmarks, in passes over the training batches."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.batches.loaders import Numbers
from turnover.errors import InputError
from turnover.ids import check_ids
from turnover.influence.gram.capture import Rows
from turnover.influence.gram.collected import Collected
from turnover.influence.gram.disk import Blocks, Scratch
from turnover.influence.gram.estimator import (
    GramDriver,
    check_wanted,
    train_ids_of,
)
from turnover.influence.gram.kernel import Block, block_of, is_full
from turnover.influence.gram.landmark_scores import Scored, TargetSums, spread_over
from turnover.influence.gram.landmarks import Landmarked
from turnover.influence.gram.options import Gram, digests_of, measure
from turnover.influence.gram.whitening import Whitening
from turnover.influence.progress import Progress
from turnover.influence.protocol import Ids, Setup, Wanted, register
from turnover.results.result import Result

_SAMPLE = 4096
"""Instances that the variances of a target are pooled over."""
_MOST = 2**28
"""Bytes of the inner products of a block of targets with all instances."""
_CANDIDATES = 4
"""Instances whose inner products are taken, for each that is wanted."""


@dataclass(frozen=True)
class _Part:
    """Gradients of neighboring training batches by every network, and the instances' positions."""

    positions: Tensor
    blocks: list[Block]
    rows: list[list[Rows]]


class LandmarkDriver(GramDriver):
    """:class:`.estimator.GramDriver` by landmarks."""

    _fitted: list[Landmarked]  # type: ignore[assignment]
    _train: Iterable[Any] = ()
    _scratch: Scratch | None = None
    """Holds the landmarks' gradients; kept, as its files are deleted with it."""
    _contents: Sequence[int] = ()
    """Checksums of the training batches, where they have no ids."""

    def fit(self, train_batches: Iterable[Any]) -> None:
        """Take in the training set in three passes. A second call starts anew.

        Raises:
            InputError: batches that cannot be gone through again, or as in
                :meth:`.estimator.GramDriver.fit`.
        """
        if iter(train_batches) is train_batches:
            raise InputError(
                "landmarks need several passes over the training batches, and these can be gone through "
                "once: give a list or a data loader"
            )
        ids, contents = self._counted(train_batches)
        digests = digests_of(self._models)
        size = min(self._options.landmarks or len(ids), len(ids))
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
        before = self._train, self._ids, self._whitenings, self._contents
        self._train, self._ids, self._whitenings, self._contents = train_batches, ids, [], contents
        scratch = Scratch()
        try:
            self._fitted = self._streamed(order[:size].sort().values, scratch)
        except BaseException:  # a fit that fails leaves the one before as it was
            self._train, self._ids, self._whitenings, self._contents = before
            raise
        self._scratch, self._digests = scratch, digests

    def _counted(self, train_batches: Iterable[Any]) -> tuple[Tensor, list[int]]:
        """Ids of the training set, and checksums of its batches without ids."""
        given: list[Tensor | None] = []
        contents: list[int] = []
        sizes: list[int] = []
        for batch in self._batches.adapted(train_batches, Numbers.DATA):
            if not sizes:
                measure(self._models, batch)
            given.append(None if batch.ids is None else check_ids(batch.ids).cpu())
            if batch.ids is None:
                contents.append(_checksum(batch))
            sizes.append(len(batch))
        if not sizes:
            raise InputError("no training batches given")
        ids = train_ids_of(given, sizes)
        if len(ids) < self._options.resamples:
            raise InputError(
                f"landmarks need at least {self._options.resamples} training instances, got {len(ids)}"
            )
        return ids, contents

    def _streamed(self, chosen: Tensor, scratch: Scratch) -> list[Landmarked]:
        networks, options = len(self._captures), self._options
        progress = Progress(
            "gram (landmarks)", {"row": networks}, unit="instance", shown=self._shown
        )
        landmarks = [Blocks(self._limits.memory // networks, scratch) for _ in self._captures]
        damping = self._damping
        whitenings = [] if damping is None else [Whitening(damping) for _ in self._captures]
        weights = 1
        for part in self._parts(chosen, whitenings, None):
            for blocks, block in zip(landmarks, part.blocks, strict=True):
                blocks.append(block)
            first = part.rows[0][0].weights
            weights = 1 if first is None else first.shape[1]
        for one, blocks in zip(whitenings, landmarks, strict=False):
            one.finish(blocks)
        self._whitenings = whitenings
        fitted = [
            Landmarked(
                list(blocks),
                len(self._ids),
                weights,
                ridge=float(options.ridge),
                residual=residual,
                own_residual=self._own_residual,
                resamples=options.resamples,
                memory=self._limits.memory // networks,
            )
            for blocks, residual in zip(landmarks, self._residual, strict=True)
        ]
        with closing(progress):
            for part in self._parts(progress=progress):
                for network, block, rows in zip(fitted, part.blocks, part.rows, strict=True):
                    network.add(block, *_beside(rows), part.positions)
        return fitted

    def estimate(self, targets: Iterable[Any], train_ids: Ids, wanted: Wanted) -> Result:
        """Influence of the fitted instances, or of some of them, on every target."""
        check_wanted(wanted)
        columns, ids = self._columns(train_ids)
        columns, top = columns.cpu(), wanted.top
        sample = spread_over(len(self._ids), _SAMPLE)
        found = Collected()
        for batches, blocks in self._blocks(targets, Numbers.ROWS):
            some = Scored(self._fitted, blocks, self._scale().cpu())
            self._correct(some)
            pool, place = some.pool(sample), None
            if top is None:
                score, error = some.all(columns, pool)
            else:
                places, score = self._strongest(some, columns, top)
                error, place = some.errors(columns[places], pool), places.numpy()
            found.add(batches, score, error, pool.floor, pool.freedom, place)
        return found.result(ids, self._describe(len(ids)))

    def _correct(self, some: Scored) -> None:
        """Take in the exact inner products with all instances, where they are wanted."""
        if self._options.exact:
            for part in self._parts():
                some.correct(part.blocks, part.positions)

    def _strongest(self, some: Scored, columns: Tensor, top: int) -> tuple[Tensor, Tensor]:
        """Places in columns and scores (targets, ranks), from high to low, by their inner products."""
        if self._options.exact:
            return some.strongest(columns, min(top, len(columns)))
        place, score = some.strongest(columns, min(top * _CANDIDATES, len(columns)))
        wanted = columns[place]
        for part in self._parts(torch.unique(wanted)):
            some.add_missed(part.blocks, part.positions, wanted, score)
        score, order = score.sort(dim=1, descending=True, stable=True)
        ends = min(top, score.shape[1])
        rest = min(top, score.shape[1] - ends)
        kept = [*range(ends), *range(score.shape[1] - rest, score.shape[1])]
        return place.gather(1, order)[:, kept], score[:, kept]

    def aggregate(self, targets: Iterable[Any], train_ids: Ids, weights: Tensor | None) -> Result:
        """Influence on the mean objective over all targets, or its sum with weights."""
        columns, ids = self._columns(train_ids)
        columns = columns.cpu()
        sums: list[TargetSums] = [TargetSums(weights) for _ in self._fitted]
        for _, blocks in self._blocks(targets, Numbers.UNUSED):
            some = Scored(self._fitted, blocks, self._scale().cpu())
            self._correct(some)
            for one, made in zip(sums, some.targets, strict=True):
                one.add(made)
        total = Scored(self._fitted, [one.total() for one in sums], self._scale().cpu())
        pool = total.pool(spread_over(len(self._ids), _SAMPLE))
        score, error = total.all(columns, pool)
        return self._vector(score[0], error[0], pool.freedom, ids, each=False)

    def _blocks(
        self, targets: Iterable[Any], numbers: Numbers
    ) -> Iterator[tuple[list[Batch], list[Block]]]:
        """Blocks of targets, and their gradients by each network."""
        networks = len(self._captures)
        most = max(1, _MOST // (4 * len(self._ids))) if self._options.exact else None
        progress = Progress("influence (gram)", {"row": networks}, shown=self._shown)
        pending: list[Batch] = []
        rows: list[list[Rows]] = [[] for _ in self._captures]
        seen = 0
        with closing(progress):
            for given in progress.follow(targets, self._batches.checked(targets, numbers)):
                seen += len(given)
                step = min(len(given), most or len(given))
                for start in range(0, len(given), step):
                    batch = given.rows(start, min(start + step, len(given)))
                    pending.append(batch)
                    for every, capture in zip(rows, self._captures, strict=True):
                        found = self._halving.by_rows(batch, capture.rows)
                        every += [one.cheapest() for one in found]
                    count = sum(map(len, pending))
                    if any(map(is_full, rows)) or (most is not None and count + step > most):
                        yield pending, self._whitened(rows)
                        pending, rows = [], [[] for _ in self._captures]
                    progress.advance("row", len(batch) * networks)
            if not seen:
                raise InputError("no targets given")
            if pending:
                yield pending, self._whitened(rows)

    def _parts(
        self,
        chosen: Tensor | None = None,
        whitenings: Sequence[Whitening] | None = None,
        progress: Progress | None = None,
    ) -> Iterator[_Part]:
        """Gradients of the training set, or of chosen positions, some batches at a time.

        Args:
            chosen: increasing int64 positions; ``None``: all.
            whitenings: take in the moments; ``None``: the gradients are whitened.
            progress: counts instances.
        """
        positions: list[Tensor] = []
        rows: list[list[Rows]] = [[] for _ in self._captures]
        for batch, places in self._again(progress):
            if chosen is not None:
                inside = torch.isin(places, chosen)
                if not bool(inside.any()):
                    continue
                batch, places = _taken(batch, inside.nonzero()[:, 0]), places[inside]
            positions.append(places)
            for number, (every, capture) in enumerate(zip(rows, self._captures, strict=True)):
                found = self._halving.by_rows(batch, partial(capture.rows, training=True))
                if whitenings:
                    whitenings[number].add(found)
                every += [one.cheapest() for one in found]
            if any(map(is_full, rows)):
                yield self._part(positions, rows, plain=whitenings is not None)
                positions, rows = [], [[] for _ in self._captures]
            if progress is not None:
                progress.advance("row", len(batch) * len(self._captures))
        if positions:
            yield self._part(positions, rows, plain=whitenings is not None)

    def _part(self, positions: list[Tensor], rows: list[list[Rows]], *, plain: bool) -> _Part:
        blocks = [block_of(one) for one in rows] if plain else self._whitened(rows)
        return _Part(torch.cat(positions), blocks, rows)

    def _whitened(self, rows: Sequence[Sequence[Rows]]) -> list[Block]:
        blocks = [block_of(one) for one in rows]
        for i, whitening in enumerate(self._whitenings):
            blocks[i] = whitening.whitened(blocks[i])
        return blocks

    def _again(self, progress: Progress | None) -> Iterator[tuple[Batch, Tensor]]:
        """The training batches, and the positions of their rows."""
        order = self._ids.argsort()
        seen, contents = 0, iter(self._contents)
        found = torch.zeros(len(self._ids), dtype=torch.bool)
        given = self._batches.checked(self._train, Numbers.DATA)
        for batch in given if progress is None else progress.follow(self._train, given):
            ids = torch.arange(seen, seen + len(batch)) if batch.ids is None else batch.ids.cpu()
            place = torch.searchsorted(self._ids[order], ids).clamp_max(len(order) - 1)
            positions = order[place]
            seen += len(batch)
            same = torch.equal(self._ids[positions], ids) and not bool(found[positions].any())
            if batch.ids is None:
                same = same and next(contents, None) == _checksum(batch)
            if not same:
                raise _changed()
            found[positions] = True
            # Labels are drawn by ids.
            yield replace(batch, ids=ids), positions
        if seen != len(self._ids):
            raise _changed()


def driver_of(method: Gram, setup: Setup) -> GramDriver:
    """Make the driver for options of gram: by landmarks, or by all pairs."""
    return (GramDriver if method.landmarks is None else LandmarkDriver)(method, setup)


register("gram", Gram, driver=driver_of)


def _changed() -> InputError:
    return InputError(
        "the training batches have other instances than when they were first gone through: give a list, or a "
        "loader that gives the same ones each time"
    )


def _checksum(batch: Batch) -> int:
    """Of inputs and labels: what tells rows without ids apart."""
    found = 0
    labels = [] if batch.labels is None else [("labels", batch.labels)]
    for _, values in [*batch.by_rows(), *labels]:
        found = zlib.crc32(
            values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), found
        )
    return found


def _beside(rows: Sequence[Rows]) -> tuple[Tensor | None, Tensor | None]:
    """Weights and residuals of several batches."""
    weights = [one.weights for one in rows if one.weights is not None]
    residuals = [one.residuals for one in rows if one.residuals is not None]
    return (torch.cat(one) if one else None for one in (weights, residuals))  # type: ignore[return-value]


def _taken(batch: Batch, rows: Tensor) -> Batch:
    size = len(batch)

    def cut(value: Tensor) -> Tensor:
        if not value.dim() or len(value) != size:
            return value
        return value[rows.to(value.device)]

    return batch.mapped(cut)
