"""Gram for many training instances: by landmarks, in passes over the training batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.batches.loaders import Numbers
from turnover.errors import InputError
from turnover.influence.gram.capture import Rows
from turnover.influence.gram.collected import Collected
from turnover.influence.gram.disk import Blocks, Scratch
from turnover.influence.gram.estimator import (
    GramDriver,
    check_wanted,
)
from turnover.influence.gram.kernel import Block, block_of, is_full
from turnover.influence.gram.landmark_scores import Scored, TargetSums, spread_over
from turnover.influence.gram.landmarks import Landmarked, basis_of
from turnover.influence.gram.options import digests_of
from turnover.influence.gram.passes import Passes, taken
from turnover.influence.gram.stored import Unstored, identity_of, storing
from turnover.influence.gram.whitening import Whitening
from turnover.influence.progress import Progress, counting
from turnover.influence.protocol import Ids, Wanted
from turnover.results.result import Result

_SAMPLE = 4096
"""Instances that the variances of a target are pooled over."""
_MOST = 2**28
"""Bytes of the inner products of a block of targets with all instances."""
_LEAST, _USUAL = 1000, 2000
"""Landmarks by ``"auto"``."""
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
    _passes: Passes
    _scratch: Scratch | None = None
    """Holds the landmarks' gradients; kept, as its files are deleted with it."""

    def fit(self, train_batches: Iterable[Any]) -> None:
        """Take in the training set in three passes. A second call starts anew.

        Raises:
            InputError: as :meth:`fit_to`.
        """
        self.fit_to(train_batches, None)

    def fit_to(self, train_batches: Iterable[Any], out: str | Path | None) -> None:
        """:meth:`fit`, and keep what is computed.

        Args:
            train_batches: re-iterable.
            out: folder or URL of a store that is written, or continued.

        Raises:
            InputError: batches that cannot be gone through again, another store, or as in
                :meth:`.estimator.GramDriver.fit`.
        """
        stored = out is not None
        self.take_in(Passes(train_batches, self._batches, self._models, hashed=stored), out)

    def take_in(self, passes: Passes, out: str | Path | None) -> None:
        """:meth:`fit_to`, once the training batches are counted."""
        if len(passes) < self._options.resamples:
            raise InputError(
                f"landmarks need at least {self._options.resamples} training instances, got {len(passes)}"
            )
        digests = digests_of(self._models)
        before = self.__dict__.get("_passes"), self._ids, self._whitenings
        self._passes, self._ids, self._whitenings = passes, passes.ids, []
        scratch = Scratch()
        try:
            if out is None:
                self._fitted = self._streamed(Unstored(len(passes)), scratch)
            else:
                described = self._setup.described(self._options.name, digests, len(passes))
                identity = identity_of(described, asdict(self._options))
                with storing(out, identity, passes) as store:
                    self._fitted = self._streamed(store, scratch)
        except BaseException:  # a fit that fails leaves the one before as it was
            self._passes, self._ids, self._whitenings = before  # type: ignore[assignment]
            raise
        self._scratch, self._digests = scratch, digests

    def _streamed(self, store: Unstored, scratch: Scratch) -> list[Landmarked]:
        networks, total = len(self._captures), len(self._ids)
        fitted = self._begun(store, scratch)
        progress = Progress(
            "gram (landmarks)", {"row": networks}, unit="instance", shown=self._shown
        )
        missing = torch.arange(total) >= store.rows
        with closing(progress):
            for part in self._parts(missing, progress=progress) if store.rows < total else ():
                for network, block, found in zip(fitted, part.blocks, part.rows, strict=True):
                    network.add(block, *_beside(found), part.positions)
                store.note(part.positions)
        store.finish()
        count = total * networks
        with closing(counting("gram (solving)", count, "instances", shown=self._shown)) as progress:
            for network in fitted:
                network.solve(progress.update)
        return fitted

    def _begun(self, store: Unstored, scratch: Scratch) -> list[Landmarked]:
        """What the training instances come into: the landmarks, and what was stored."""
        networks, options = len(self._captures), self._options
        order = torch.randperm(store.first, generator=torch.Generator().manual_seed(0))
        chosen = order[: _count(options.landmarks, store.first)]
        made = [Blocks(self._limits.memory // networks, scratch) for _ in self._captures]
        damping = self._damping
        whitenings = [] if damping is None else [Whitening(damping) for _ in self._captures]
        costs: list[list[Tensor]] = [[] for _ in self._captures]
        positions, directions = [], 1
        for part in self._parts(self._mask(chosen), whitenings, None):
            positions.append(part.positions)
            for blocks, block in zip(made, part.blocks, strict=True):
                blocks.append(block)
            for known, rows in zip(costs, part.rows, strict=True):
                known += [one.costs for one in rows]
            weights = part.rows[0][0].weights
            directions = 1 if weights is None else weights.shape[1]
        for one, blocks in zip(whitenings, made, strict=False):
            one.finish(blocks)
        self._whitenings = whitenings
        landmarks = [list(blocks) for blocks in made]
        bases = store.bases or [
            basis_of(blocks, options.ridge, torch.cat(cost))
            for blocks, cost in zip(landmarks, costs, strict=True)
        ]
        fitted = [
            Landmarked(
                blocks,
                basis,
                len(self._ids),
                directions,
                residual=residual,
                own_residual=self._own_residual,
                resamples=options.resamples,
                memory=self._limits.memory // networks,
            )
            for blocks, basis, residual in zip(landmarks, bases, self._residual, strict=True)
        ]
        store.begin(fitted, torch.cat(positions))
        return fitted

    def _mask(self, positions: Tensor) -> Tensor:
        found = torch.zeros(len(self._ids), dtype=torch.bool)
        found[positions] = True
        return found

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
        for part in self._parts(self._mask(wanted.flatten())):
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
            chosen: positions to take, bool (train,); ``None``: all.
            whitenings: take in the moments; ``None``: the gradients are whitened.
            progress: counts instances.
        """
        positions: list[Tensor] = []
        rows: list[list[Rows]] = [[] for _ in self._captures]
        for batch, places in self._passes.again(progress):
            if chosen is not None:
                inside = chosen[places]
                if progress is not None:
                    progress.skip("row", int((~inside).sum()) * len(self._captures))
                if not bool(inside.any()):
                    continue
                batch, places = taken(batch, inside.nonzero()[:, 0]), places[inside]
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


def _count(landmarks: int | str | None, instances: int) -> int:
    """Number of landmarks."""
    if isinstance(landmarks, int):
        return landmarks
    return min(max(_LEAST, instances // 10), _USUAL)


def _beside(rows: Sequence[Rows]) -> tuple[Tensor | None, Tensor | None]:
    """Weights and residuals of several batches."""
    weights = [one.weights for one in rows if one.weights is not None]
    residuals = [one.residuals for one in rows if one.residuals is not None]
    return (torch.cat(one) if one else None for one in (weights, residuals))  # type: ignore[return-value]
