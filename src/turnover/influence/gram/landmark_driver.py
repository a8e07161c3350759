"""Gram for many training instances: by landmarks, in passes over the training batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.batches.loaders import Numbers
from turnover.dropout.modules import device_of
from turnover.dropout.network import Network
from turnover.errors import InputError
from turnover.influence.gram.capture import Rows
from turnover.influence.gram.collected import Collected
from turnover.influence.gram.coordinates import Coordinates, basis_of
from turnover.influence.gram.disk import Blocks, Scratch
from turnover.influence.gram.engines import Computing, InProcess, computing
from turnover.influence.gram.estimator import GramDriver
from turnover.influence.gram.given import check_memory
from turnover.influence.gram.kernel import Block, is_full
from turnover.influence.gram.landmark_draws import SampledCoordinates, SampledLandmarked
from turnover.influence.gram.landmark_scores import (
    CANDIDATES,
    MOST,
    SAMPLE,
    Scored,
    TargetSums,
    spread_over,
)
from turnover.influence.gram.landmarks import Landmarked
from turnover.influence.gram.options import Gram, digests_of, landmarks_of
from turnover.influence.gram.passes import Passes, taken
from turnover.influence.gram.stored import Unstored, identity_of, storing
from turnover.influence.gram.training_parts import Given, Gradients, Multiply, TakeIn
from turnover.influence.gram.whitening import Whitening
from turnover.influence.progress import Progress, counting
from turnover.influence.protocol import Ids, Setup, Wanted
from turnover.results.result import Result


class LandmarkDriver(GramDriver):
    """:class:`.estimator.GramDriver` by landmarks."""

    _fitted: list[Landmarked]  # type: ignore[assignment]
    _passes: Passes
    _scratch: Scratch | None = None
    """Holds the landmarks' gradients; kept, as its files are deleted with it."""

    def __init__(self, method: Gram, setup: Setup) -> None:
        super().__init__(method, setup)
        self._gradients = Gradients(self._captures, self._halving)

    def fit(self, train_batches: Iterable[Any]) -> None:
        """Take in the training set in three passes. A second call starts anew.

        Raises:
            InputError: as :meth:`fit_to`.
        """
        self.fit_to(train_batches, Wanted())

    def fit_to(self, train_batches: Iterable[Any], wanted: Wanted) -> None:
        """:meth:`fit`, and keep what is computed, or compute it elsewhere.

        Args:
            train_batches: re-iterable.
            wanted: folder or URL of a store that is written, or continued; by which engine the last pass
                is computed.

        Raises:
            InputError: batches that cannot be gone through again, another store, or as in
                :meth:`.estimator.GramDriver.fit`.
        """
        stored = wanted.out is not None
        self.take_in(Passes(train_batches, self._batches, self._models, hashed=stored), wanted)

    def take_in(self, passes: Passes, wanted: Wanted) -> None:
        """:meth:`fit_to`, once the training batches are counted."""
        if len(passes) < self._options.resamples:
            raise InputError(
                f"landmarks need at least {self._options.resamples} training instances, got {len(passes)}"
            )
        digests = digests_of(self._models)
        before = self.__dict__.get("_passes"), self._ids, self._gradients
        self._passes, self._ids = passes, passes.ids
        self._gradients = Gradients(self._captures, self._halving)
        scratch = Scratch()
        try:
            with self._computing(wanted) as computing:
                if wanted.out is None:
                    self._fitted = self._streamed(Unstored(len(passes)), scratch, computing)
                else:
                    described = self._setup.described(self._options.name, digests, len(passes))
                    identity = identity_of(described, asdict(self._options))
                    with storing(wanted.out, identity, passes) as store:
                        self._fitted = self._streamed(store, scratch, computing)
        except BaseException:  # a fit that fails leaves the one before as it was
            self._passes, self._ids, self._gradients = before  # type: ignore[assignment]
            raise
        self._scratch, self._digests = scratch, digests

    def _computing(self, wanted: Wanted) -> AbstractContextManager[Computing]:
        modules = (one.model if isinstance(one, Network) else one for one in self._models)
        devices = [device_of(one) for one in modules]
        return computing(wanted.engine, wanted.num_gpus, self._gradients, devices)

    def _streamed(
        self, store: Unstored, scratch: Scratch, computing: Computing
    ) -> list[Landmarked]:
        networks, total = len(self._captures), len(self._ids)
        fitted = self._begun(store, scratch)
        progress = Progress(
            "gram (landmarks)", {"row": networks}, unit="instance", shown=self._shown
        )
        work = TakeIn([one.coordinates for one in fitted])

        def done(count: int) -> None:
            progress.advance("row", count * networks)

        with closing(progress), ExitStack() as stack:
            if store.rows < total:
                given = self._given(torch.arange(total) >= store.rows, progress)
                parts = computing.over(given, work, done, store.renew)
                for positions, taken in stack.enter_context(closing(parts)):
                    for network, one in zip(fitted, taken, strict=True):
                        network.put(one, positions)
                    store.note(positions)
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
        chosen = order[: landmarks_of(options, store.first)]
        made = [Blocks(self._limits.memory // networks, scratch) for _ in self._captures]
        damping = self._damping
        whitenings = [] if damping is None else [Whitening(damping) for _ in self._captures]
        costs: list[list[Tensor]] = [[] for _ in self._captures]
        positions, directions = [], 1
        for part in self._gradients.of(self._given(self._mask(chosen)), whitenings):
            positions.append(part.positions)
            for blocks, block in zip(made, part.blocks, strict=True):
                blocks.append(block)
            for known, rows in zip(costs, part.rows, strict=True):
                known += [one.costs for one in rows]
            weights = part.rows[0][0].weights
            directions = 1 if weights is None else weights.shape[1]
        for one, blocks in zip(whitenings, made, strict=False):
            one.finish(blocks)
        self._gradients.whitenings = whitenings
        landmarks = [list(blocks) for blocks in made]
        kind = SampledLandmarked if options.samples else Landmarked
        coordinates = SampledCoordinates if options.samples else Coordinates
        bases = store.bases or [
            basis_of(blocks, options.ridge, torch.cat(cost), coordinates.holding)
            for blocks, cost in zip(landmarks, costs, strict=True)
        ]
        fitted = [
            kind(
                coordinates(blocks, basis, directions),
                len(self._ids),
                residual=residual,
                own_residual=self._own_residual,
                resamples=options.resamples,
                memory=self._limits.memory // networks,
                # With exact products, or drawn labels, nothing of the landmarks stands out.
                alike=None if options.exact or options.samples else torch.cat(positions),
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
        check_memory(wanted)
        columns, ids = self._columns(train_ids)
        columns, top = columns.cpu(), wanted.top
        if wanted.engine != "process" and top is None and not self._options.exact:
            raise InputError(
                f"engine={wanted.engine!r} computes passes over the training batches, and these scores "
                f"take none: give top=, take turnover.Gram(landmarks=..., exact=True), or leave engine= out"
            )
        sample = spread_over(len(self._ids), SAMPLE)
        found = Collected()
        with self._computing(wanted) as computing:
            for batches, blocks in self._blocks(targets, Numbers.ROWS):
                some = Scored(self._fitted, blocks, self._scale().cpu())
                self._correct(some, blocks, computing)
                pool, place = some.pool(sample), None
                if top is None:
                    score, error = some.all(columns, pool)
                else:
                    places, score = self._strongest(some, blocks, columns, top, computing)
                    error, place = some.errors(columns[places], pool), places.numpy()
                found.add(batches, score, error, pool.floor, pool.freedom, place)
        return found.result(ids, self._describe(len(ids)))

    def _correct(self, some: Scored, blocks: list[Block], computing: Computing) -> None:
        """Take in the exact inner products with all instances, where they are wanted."""
        if self._options.exact:
            with closing(computing.over(self._given(), Multiply(blocks))) as parts:
                for positions, products in parts:
                    some.correct(products, positions)

    def _strongest(
        self, some: Scored, blocks: list[Block], columns: Tensor, top: int, computing: Computing
    ) -> tuple[Tensor, Tensor]:
        """Places in columns and scores (targets, ranks), from high to low, by their inner products."""
        if self._options.exact:
            return some.strongest(columns, min(top, len(columns)))
        place, score = some.strongest(columns, min(top * CANDIDATES, len(columns)))
        wanted = columns[place]
        given = self._given(self._mask(wanted.flatten()))
        with closing(computing.over(given, Multiply(blocks))) as parts:
            for positions, products in parts:
                some.add_missed(products, positions, wanted, score)
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
            self._correct(some, blocks, InProcess(self._gradients))
            for one, made in zip(sums, some.targets, strict=True):
                one.add(made)
        total = Scored(self._fitted, [one.total() for one in sums], self._scale().cpu())
        pool = total.pool(spread_over(len(self._ids), SAMPLE))
        score, error = total.all(columns, pool)
        return self._vector(score[0], error[0], pool.freedom, ids, each=False)

    def _blocks(
        self, targets: Iterable[Any], numbers: Numbers
    ) -> Iterator[tuple[list[Batch], list[Block]]]:
        """Blocks of targets, and their gradients by each network."""
        networks = len(self._captures)
        most = max(1, MOST // (4 * len(self._ids))) if self._options.exact else None
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
                        yield pending, self._made(rows)
                        pending, rows = [], [[] for _ in self._captures]
                    progress.advance("row", len(batch) * networks)
            if not seen:
                raise InputError("no targets given")
            if pending:
                yield pending, self._made(rows)

    def _made(self, rows: Sequence[Sequence[Rows]]) -> list[Block]:
        return [block.own_memory() for block in self._gradients.blocks(rows)]

    def _given(
        self, chosen: Tensor | None = None, progress: Progress | None = None
    ) -> Iterator[Given]:
        """The training batches, or the rows of them at chosen positions.

        Args:
            chosen: positions to take, bool (train,); ``None``: all.
            progress: counts instances.
        """
        for batch, places in self._passes.again(progress):
            if chosen is None:
                yield batch, places
                continue
            inside = chosen[places]
            if progress is not None:
                progress.skip("row", int((~inside).sum()) * len(self._captures))
            if bool(inside.any()):
                yield taken(batch, inside.nonzero()[:, 0]), places[inside]
