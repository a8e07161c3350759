"""The gram estimator: fit to a training set, then score it for any targets."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.batches.loaders import Numbers
from turnover.errors import InputError
from turnover.ids import check_ids, check_scored_ids
from turnover.influence.engine import TargetSum, to_numpy
from turnover.influence.gram.capture import Rows
from turnover.influence.gram.collected import Collected
from turnover.influence.gram.disk import Blocks, Limits, Scratch
from turnover.influence.gram.fisher import SampledFitted
from turnover.influence.gram.fitted import Fitted
from turnover.influence.gram.given import check_wanted, train_ids_of
from turnover.influence.gram.kernel import block_of, is_full
from turnover.influence.gram.options import (
    Gram,
    capture_of,
    damping_of,
    digests_of,
    directions_of,
    measure,
    residual_of,
)
from turnover.influence.gram.plan import plan_of
from turnover.influence.gram.uncertainty import moderated
from turnover.influence.gram.whitening import Whitening
from turnover.influence.halving import Halving
from turnover.influence.plan import FitPlan, Plan
from turnover.influence.progress import Progress, counting
from turnover.influence.protocol import Ids, Setup, Wanted
from turnover.influence.topk import Extremes
from turnover.io.bars import tqdm
from turnover.objectives import cross_entropy
from turnover.results.calibration import NoiseFloor, StudentNull
from turnover.results.result import Result

_TINY = 1e-30


class GramDriver:
    """Influence by kernel ridge regression on the gradients of one or several networks.

    Args:
        method: how to score.
        setup: networks and objective.
    """

    def __init__(self, method: Gram, setup: Setup) -> None:
        models, objective = setup.models, setup.objective
        self._options = method
        self._setup = setup
        self._batches = setup.batches
        self._models = models
        self._shown = setup.progress
        self._limits = Limits()
        self._halving = Halving()
        self._residual = [residual_of(one, objective, method) for one in models]
        # Where an instance's gradient is not the loss's own, its part on itself is still to come.
        self._own_residual = objective is cross_entropy and directions_of(objective, method) > 0
        self._captures = [
            capture_of(one, objective, method, residuals=residual > 0 or self._own_residual)
            for one, residual in zip(models, self._residual, strict=True)
        ]
        self._damping = damping_of(objective, method)
        self._whitenings: list[Whitening] = []
        self._fitted: list[Fitted] = []
        self._digests: list[str] = []
        self._pair_seconds = 0.0
        self._ids = torch.empty(0, dtype=torch.int64)

    @property
    def general(self) -> tuple[str, ...]:
        """Parameters whose gradients are computed row by row, known after the first batch."""
        found = [name for capture in self._captures for name in capture.general]
        return tuple(dict.fromkeys(found))

    def fit(self, train_batches: Iterable[Any]) -> None:
        """Take in the training set. A second call starts anew.

        Raises:
            InputError: no batches, ids in some batches and not in others, or twice; two networks that
                are the same.
        """
        given: list[Tensor | None] = []
        sizes: list[int] = []
        every: list[list[Rows]] = [[] for _ in self._captures]
        scratch = Scratch()
        share = self._limits.memory // len(self._captures)
        blocks = [Blocks(share, scratch) for _ in self._captures]
        networks = len(self._captures)
        damping = self._damping
        whitenings = [] if damping is None else [Whitening(damping) for _ in self._captures]
        progress = Progress(
            "gram (gradients)", {"row": networks}, unit="instance", shown=self._shown
        )
        with closing(progress):
            for batch in progress.follow(
                train_batches, self._batches.checked(train_batches, Numbers.DATA)
            ):
                if not sizes:
                    measure(self._models, batch)
                given.append(None if batch.ids is None else check_ids(batch.ids).cpu())
                if batch.ids is None:  # labels are drawn by ids
                    numbers = torch.arange(sum(sizes), sum(sizes) + len(batch))
                    batch = replace(batch, ids=numbers)
                sizes.append(len(batch))
                for number, (rows, capture) in enumerate(zip(every, self._captures, strict=True)):
                    found = self._halving.by_rows(batch, partial(capture.rows, training=True))
                    if whitenings:
                        whitenings[number].add(found)
                    rows += [one.cheapest() for one in found]
                for rows, made in zip(every, blocks, strict=True):
                    _close(rows, made, full=True)
                progress.advance("row", len(batch) * networks)
        if not sizes:
            raise InputError("no training batches given")
        for rows, made in zip(every, blocks, strict=True):
            _close(rows, made, full=False)
        ids = train_ids_of(given, sizes)
        if len(ids) < 4:
            raise InputError(f"gram needs at least 4 training instances, got {len(ids)}")
        digests = digests_of(self._models)
        for one, made in zip(whitenings, blocks, strict=False):
            one.finish(made)
        entries = sum(sum(made.sizes) ** 2 for made in blocks)
        kind = SampledFitted if self._options.samples else Fitted
        start = time.perf_counter()
        with closing(counting("gram (kernel)", entries, "pairs", shown=self._shown)) as progress:
            fitted = [
                kind(
                    made,
                    rows,
                    self._options.ridge,
                    residual=residual,
                    own_residual=self._own_residual,
                    resamples=self._options.resamples,
                    limits=self._limits,
                    scratch=scratch,
                    done=progress.update,
                )
                for made, rows, residual in zip(blocks, every, self._residual, strict=True)
            ]
        # All at once, so that a fit that fails leaves the one before as it was.
        self._pair_seconds = (time.perf_counter() - start) / entries
        self._fitted, self._whitenings, self._digests, self._ids = fitted, whitenings, digests, ids

    def estimate(self, targets: Iterable[Any], train_ids: Ids, wanted: Wanted) -> Result:
        """Influence of the fitted instances, or of some of them, on every target."""
        top = wanted.top
        check_wanted(wanted)
        columns, ids = self._columns(train_ids)
        found = Collected()
        for batches, crosses in self._targets(targets, Numbers.ROWS):
            score, error, free = self._scored(crosses)
            score, error, place = score[:, columns], error[:, columns], None
            floor = error.double().square().mean(dim=1).sqrt().cpu().numpy()
            if top is not None:
                extremes = Extremes(len(score), top)
                extremes.add(score)
                place, _ = extremes.result()
                index = torch.from_numpy(place).to(score.device)
                score, error = score.gather(1, index), error.gather(1, index)
            found.add(batches, score, error, floor, free, place)
        return found.result(ids, self._describe(len(ids)))

    def aggregate(self, targets: Iterable[Any], train_ids: Ids, weights: Tensor | None) -> Result:
        """Influence on the mean objective over all targets, or its sum with weights."""
        columns, ids = self._columns(train_ids)
        sums = [TargetSum(weights) for _ in self._fitted]
        for _, crosses in self._targets(targets, Numbers.UNUSED):
            for one, cross in zip(sums, crosses, strict=True):
                one.add(cross)
        score, error, freedom = self._scored([one.total() for one in sums])
        return self._vector(score[0, columns], error[0, columns], freedom, ids, each=False)

    def self_influence(self, train_batches: Iterable[Any] | None) -> Result:
        """Influence of every fitted instance, or of those of some batches, on itself."""
        wanted = None
        if train_batches is not None:
            given = [batch.ids for batch in self._batches.adapted(train_batches)]
            if not given or any(one is None for one in given):
                raise InputError(
                    "self-influence of gram is that of fitted instances: give batches with their ids, "
                    "or none for all"
                )
            wanted = torch.cat([one.cpu() for one in given if one is not None])
        columns, ids = self._columns(wanted)
        fitted = self._fitted
        if len(fitted) == 1:
            values, variance, freedom = fitted[0].own(), fitted[0].own_variance(), fitted[0].freedom
        else:
            values, variance, freedom = _over([one.own() for one in fitted])
        squares, free = moderated(variance[None], freedom, self._scale())
        score, error = values[columns], squares[0, columns].sqrt()
        return self._vector(score, error, free, ids, each=True)

    def plan(
        self,
        targets: Iterable[Any],  # noqa: ARG002
        train_ids: Ids,  # noqa: ARG002
        wanted: Wanted,  # noqa: ARG002
    ) -> Plan:
        """Refuse: see :meth:`plan_fit`.

        Raises:
            InputError: always.
        """
        raise unplanned()

    def plan_fit(
        self, targets: Iterable[Any], train_batches: Iterable[Any], wanted: Wanted
    ) -> FitPlan:
        """See :meth:`turnover.Influence.plan`."""
        check_wanted(wanted)
        given = self._options, self._setup, self._limits
        return plan_of(*given, targets, train_batches, wanted.top)

    def _vector(
        self, score: Tensor, error: Tensor, freedom: float, ids: Tensor, *, each: bool
    ) -> Result:
        errors = to_numpy(error)
        floor = errors.astype(np.float64)
        if not each:
            floor = np.asarray(np.sqrt(np.mean(np.square(floor))))
        return Result(
            scores=to_numpy(score),
            floor=NoiseFloor(np.zeros_like(floor), floor),
            null=StudentNull(freedom),
            train_ids=ids.numpy(),
            target_ids=None,
            standard_error=errors,
            **self._describe(len(ids)),
        )

    def _targets(
        self, targets: Iterable[Any], numbers: Numbers
    ) -> Iterator[tuple[list[Batch], list[Tensor]]]:
        """Blocks of targets, and their inner products with the training set by each network."""
        networks = len(self._captures)
        progress = self._progress()
        with closing(progress):
            pending: list[Batch] = []
            rows: list[list[Rows]] = [[] for _ in self._captures]
            seen = 0

            def block() -> Iterator[tuple[list[Batch], list[Tensor]]]:
                crosses = self._crosses(rows)
                count = sum(map(len, pending)) * networks
                progress.advance("cross", count)
                yield pending, crosses
                if count == seen * networks:
                    progress.advance("halves", 1)
                progress.advance("score", count)

            for batch in progress.follow(targets, self._batches.checked(targets, numbers)):
                seen += len(batch)
                pending.append(batch)
                for every, capture in zip(rows, self._captures, strict=True):
                    found = self._halving.by_rows(batch, capture.rows)
                    every += [one.cheapest() for one in found]
                progress.advance("row", len(batch) * networks)
                if any(map(is_full, rows)):
                    yield from block()
                    pending, rows = [], [[] for _ in self._captures]
            if not seen:
                raise InputError("no targets given")
            if pending:
                yield from block()

    def _progress(self) -> Progress:
        """A bar of the targets. The first scores also solve for halves of the training set."""
        networks, seconds = len(self._captures), {"cross": 0.0, "halves": 0.0}
        if self._shown:
            start = time.perf_counter()
            for one in tqdm(self._fitted, "gram (solving)", unit="network", leave=False):
                one.solve()
            seconds["halves"] = time.perf_counter() - start
            widest = max(len(one.k) for one in self._fitted)
            seconds["cross"] = widest * self._pair_seconds
        return Progress(
            "influence (gram)",
            dict.fromkeys(("row", "cross", "score"), networks),
            once={"halves": 1},
            seconds=seconds,
            shown=self._shown,
        )

    def _crosses(self, rows: Sequence[Sequence[Rows]]) -> list[Tensor]:
        blocks = [block_of(one) for one in rows]
        for i, whitening in enumerate(self._whitenings):
            blocks[i] = whitening.whitened(blocks[i])
        return [one.cross(block) for one, block in zip(self._fitted, blocks, strict=True)]

    def _scored(self, crosses: Sequence[Tensor]) -> tuple[Tensor, Tensor, float]:
        """Scores and standard errors (targets, train), and the degrees of freedom of these."""
        fitted = self._fitted
        if len(fitted) == 1:
            values, variance = fitted[0].scores(crosses[0]), fitted[0].variance(crosses[0])
            freedom = fitted[0].freedom
        else:
            pairs = zip(fitted, crosses, strict=True)
            values, variance, freedom = _over([one.scores(cross) for one, cross in pairs])
        squares, free = moderated(variance, freedom, self._scale())
        return values, squares.sqrt(), free

    def _scale(self) -> Tensor:
        """The factor of all scores of a training instance."""
        factors = [one.factor.to(self._fitted[0].device) for one in self._fitted]
        return torch.stack(factors).mean(dim=0).clamp_min(_TINY)

    def _describe(self, considered: int) -> dict[str, Any]:
        return self._setup.described(self._options.name, self._digests, considered)

    def _columns(self, train_ids: Ids) -> tuple[Tensor, Tensor]:
        """Positions of training ids, and the ids."""
        device = self._fitted[0].device
        if train_ids is None:
            return torch.arange(len(self._ids), device=device), self._ids
        ids = check_scored_ids(train_ids)
        missing = ids[~torch.isin(ids, self._ids)]
        if len(missing):
            raise InputError(
                f"{len(missing)} training ids were not among the fitted instances: "
                f"{missing[:5].tolist()}"
            )
        order = self._ids.argsort()
        return order[torch.searchsorted(self._ids[order], ids)].to(device), ids


def _over(scores: Sequence[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Mean over networks, variance of the mean, degrees of freedom."""
    stacked = torch.stack([one.to(scores[0].device) for one in scores])
    return stacked.mean(dim=0), stacked.var(dim=0) / len(scores), len(scores) - 1


def _close(rows: list[Rows], blocks: Blocks, *, full: bool) -> None:
    """Make a block of the rows that still have their gradients, and take these from them.

    Args:
        rows: of the batches so far.
        blocks: where the block goes.
        full: not unless it is full.
    """
    pending = list(takewhile(lambda one: one.parts, reversed(rows)))[::-1]
    if pending and (is_full(pending) or not full):
        blocks.append(block_of(pending))
        rows[-len(pending) :] = [Rows({}, one.costs, one.residuals, one.weights) for one in pending]


def unplanned() -> InputError:
    """The error of a plan without training batches."""
    return InputError(
        "a plan of gram tries some training instances, before the fit or after it: "
        "plan(targets, train_batches=train_batches)"
    )
