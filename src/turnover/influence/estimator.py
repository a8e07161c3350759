"""Influence of training instances on predictions, with the noise floor of every number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from turnover.batches import Adapter, Batch
from turnover.batches.loaders import Numbers
from turnover.dropout.modules import exclusive
from turnover.dropout.network import Network
from turnover.errors import InputError
from turnover.ids import check_ids, ghost_ids
from turnover.influence.bars import bar_of, own_bar
from turnover.influence.blockwise import Walk
from turnover.influence.engine import Engine, Scores, TargetBlock, measure
from turnover.influence.given import Given
from turnover.influence.gram import DEFAULT_RIDGE, Gram, Options
from turnover.influence.plan import Plan, plan
from turnover.influence.progress import Counts, Progress
from turnover.influence.signature import precision, signature_columns
from turnover.influence.sinks import MemorySink, StoreSink, check_columns
from turnover.objectives import Objective, margin
from turnover.parallel.engines import check_engine
from turnover.results.calibration import MIN_GHOSTS, GhostPool, NoiseFloor
from turnover.results.result import Result

if TYPE_CHECKING:
    from turnover.results.reader import StoredResult
    from turnover.results.writer import Writer

    Over = Callable[[Walk, Iterable[Batch], Tensor, Writer], int]


METHODS = ("linear", "exact", "rerank", "auto", "gram")


_OWN_GHOSTS = 20


_TWICE = "training ids are given twice: {}; score each id (group) once"


class Influence:
    """Estimates which training instances made a network predict what it predicts.

    Args:
        network: from :func:`turnover.attach`, trained under ``exposed(ids)``; or several, trained on
            the same ids with other seeds, whose scores are averaged: noise falls with the square root
            of their number, and every score comes with its standard error. For ``"gram"`` also any
            trained modules, without masks.
        objective: cost of a prediction, callable ``(outputs, batch) -> (rows,)``; default
            :func:`turnover.objectives.margin`, whose noise is closest to Gaussian. Significance is
            computed on the objective given.
        method: ``"exact"`` (two forwards of every id: Kobayashi et al. 2020, equation 6), ``"linear"``
            (one backward per target, whatever the number of ids), ``"rerank"`` (linear, then exact
            for the candidates at both ends), or ``"auto"``: the most exact of them that is estimated
            to stay within ``seconds`` (see :meth:`plan`). ``"gram"``: inner products of gradients,
            which needs :meth:`fit` (:mod:`turnover.influence.gram`).
        ghosts: ghost ids for the noise floor, at least 10. Below 1,000 the far tail is rough.
        block: ids in one forward of the exact method; ``None``: as many as the caches hold.
        sites: names or glob patterns of the sites whose masks are flipped; at the others the network
            runs whole, so the scores are the influence that these sites carry. Sites with few units
            add more noise than signal. ``None``: all, which is the paper's estimate.
        candidates: ids on each side that ``"rerank"`` scores exactly.
        seconds: what ``"auto"`` may take.
        ridge: of gram, what is added to the diagonal: a multiple of the mean diagonal, ``"gcv"`` or
            ``"evidence"``.
        residual: of gram, exponent of 1 minus the probability of the training instance's label, which
            scores are multiplied with; ``None``: 0.5 for plain modules, 0.25 for turn-over networks
            (:class:`turnover.influence.gram.Options`).
        directions: of gram, how many directions in the class outputs each training instance holds the
            network along; ``None``: 2 with the built-in objectives. With 0 less is computed.
        features: of gram, ``"gradients"``, or ``"masks"``: derivatives by the masks alone, a compact
            stand-in for big networks.
        resamples: of gram with one network, halves of the training set behind standard errors.
        adapter: how a batch becomes :class:`turnover.Batch`; what is one already is taken as it is.
            ``None``: as the network was attached (by a trainer), else :func:`turnover.batches.as_batch`.
        progress: show a progress bar with the time left.

    Raises:
        InputError: unknown method (those that exist are listed), unknown site, too few ghosts, one
            network twice, networks whose sites differ, or modules without masks by a method that
            needs them.
    """

    def __init__(
        self,
        network: Network | nn.Module | Sequence[Network | nn.Module],
        objective: Objective = margin,
        method: str = "linear",
        *,
        ghosts: int = 1000,
        block: int | None = None,
        sites: Sequence[str] | None = None,
        candidates: int = 50,
        seconds: float = 60.0,
        ridge: float | str = DEFAULT_RIDGE,
        residual: bool | float | None = None,
        directions: int | None = None,
        features: str = "gradients",
        resamples: int = 8,
        adapter: Adapter | None = None,
        progress: bool = False,
    ) -> None:
        if method not in METHODS:
            raise InputError(f"unknown method {method!r}; built are: {', '.join(METHODS)}")
        if not callable(objective):
            hint = f": write method={objective!r}" if objective in METHODS else ""
            raise InputError(f"objective must be callable, got {objective!r}{hint}")
        for name, value, least in (
            ("ghosts", ghosts, MIN_GHOSTS),
            ("block", block, 1),
            ("candidates", candidates, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} must be >= {least}, got {value}")
        self.objective = objective
        self.method = method
        self.ghosts = ghosts
        self.block = block
        self.candidates = candidates
        self.seconds = seconds
        self.progress = progress
        self._progress: Progress | None = None
        self._gram: Gram | None = None
        models = _several(network)
        self._models = [one.model if isinstance(one, Network) else one for one in models]
        self._given = Given(models[0], objective, adapter)
        if method == "gram":
            self.sites: list[str] = []
            self.networks: list[Network] = []
            self._engines: list[Engine] = []
            # Another thread that scores holds the parameters' requires_grad at False.
            with exclusive(*self._models):
                self._gram = Gram(
                    models,
                    objective,
                    Options(ridge, residual, directions, features, resamples),
                    given=self._given,
                    progress=progress,
                )
            return
        self.networks = _attached(models, method)
        first = self.networks[0]
        self.sites = first.sites if sites is None else first.select(sites)
        self._engines = [Engine(one, objective, block, self.sites) for one in self.networks]
        if method != "exact":  # whose targets are one row, repeated
            self._given.ordered = self.sites

    @property
    def adapter(self) -> Adapter:
        """How a batch becomes :class:`turnover.Batch`."""
        return self._given.adapter

    @adapter.setter
    def adapter(self, adapter: Adapter) -> None:
        self._given.adapter = adapter

    def fit(self, train_batches: Iterable[Any]) -> Influence:
        """Take in the training set, as ``"gram"`` needs it. A second call starts anew.

        Args:
            train_batches: the training instances, each once, with labels. Their ids come from the
                batches; where none has any, row numbers from 0 are the ids.

        Returns:
            The estimator itself.

        Raises:
            InputError: another method, no batches, ids in some batches only or given twice, an
                objective that is not finite or mixes rows.
        """
        if self._gram is None:
            raise InputError(
                f"nothing to fit: method={self.method!r} does not look at the training data; call "
                f"estimate"
            )
        with exclusive(*self._models):
            self._gram.fit(train_batches)
        return self

    @overload
    def estimate(
        self,
        targets: Iterable[Any],
        train_ids: Tensor | Sequence[int] | None = None,
        *,
        top: int | None = None,
        out: None = None,
        coordinates: Mapping[str, Any] | None = None,
    ) -> Result: ...

    @overload
    def estimate(
        self,
        targets: Iterable[Any],
        train_ids: Tensor | Sequence[int] | None = None,
        *,
        top: int | None = None,
        out: str | Path,
        coordinates: Mapping[str, Any] | None = None,
        engine: str = "process",
    ) -> StoredResult: ...

    def estimate(
        self,
        targets: Iterable[Any],
        train_ids: Tensor | Sequence[int] | None = None,
        *,
        top: int | None = None,
        out: str | Path | None = None,
        coordinates: Mapping[str, Any] | None = None,
        engine: str = "process",
    ) -> Result | StoredResult:
        """Influence of every training instance on every target.

        Args:
            targets: batches of predictions to explain, with labels as the objective needs them.
            train_ids: int64 (train,), distinct. Ghosts beyond the first ``ghosts`` are allowed, to check
                the false-positive rate. By ``"gram"`` of fitted instances, and ``None`` for all.
            top: keep only so many of the most helpful and of the most harmful ids of each target.
                Memory then does not grow with the number of ids.
            out: folder or fsspec URL of a zarr store to write, block by block. Memory then grows
                neither with targets nor with ids. If it was begun before and cut off, by the same
                call, it is gone on with, and ends in the same bits.
            coordinates: with ``out``, labels to store beside the training ids: name to one value for
                each id.
            engine: with ``out``, what computes the blocks: this ``"process"``, or ``"ray"``, the workers
                of the Ray cluster that ``ray.init`` connected to (else of ``RAY_ADDRESS``, else of this
                machine). Same bits, and each goes on with what the other began.

        Returns:
            :class:`Result` with scores (targets, train), or (targets, ranks) with ``top``, in memory;
            with ``out`` a :class:`StoredResult` that reads what is asked for.

        Raises:
            InputError: no targets, ids given twice or shared with the noise floor, an objective
                that is not finite (the rows are named), a store that holds something else or that
                somebody else is writing.
        """
        if top is not None and top < 1:
            raise InputError(f"top must be >= 1, got {top}")
        _check_engine(engine, out)
        if self._gram is not None:
            if out is not None or coordinates:
                raise InputError(
                    "gram keeps its scores in memory: leave out= and coordinates= out, and give top= "
                    "where there are too many"
                )
            with exclusive(*self._models):
                return self._gram.estimate(targets, train_ids, top)
        ids = self._check(train_ids)
        reranks = self.method in ("rerank", "auto")
        if reranks and top is not None and top > self.candidates:
            raise InputError(
                f"top={top} asks for more than the {self.candidates} candidates that are scored "
                f"exactly: raise candidates, or lower top"
            )
        if coordinates and out is None:
            raise InputError("coordinates are stored beside the scores: give out= as well")
        with self._evaluating():
            batches = self._given.batches(targets, Numbers.ROWS)
            walk, batches = self._begun(targets, batches, ids, top, out)
            if out is None:
                sink = MemorySink(len(ids))
                walk.over(batches, ids, sink)
                return sink.result(ids.numpy(), **self._described(walk.method, ids))
            with _over(engine, walk) as over:
                return self._store(walk, batches, ids, out, dict(coordinates or {}), over)

    def aggregate(
        self, targets: Iterable[Any], train_ids: Tensor | Sequence[int] | None = None
    ) -> Result:
        """Influence on the mean objective over all targets, without the pairwise matrix.

        Arguments and errors as in :meth:`estimate`.

        Returns:
            :class:`Result` with scores (train,) and a scalar noise floor.
        """
        if self._gram is not None:
            with exclusive(*self._models):
                return self._gram.aggregate(targets, train_ids)
        ids = self._check(train_ids)
        with self._evaluating():
            batches = self._given.batches(targets)
            walk, batches = self._begun(targets, batches, ids, None, None, mean=True)
            sink = MemorySink(len(ids))
            walk.over_mean(list(batches), ids, sink)
            result = sink.result(ids.numpy(), **self._described(walk.method, ids))
        floor = NoiseFloor(result.floor.mean[0], result.floor.sd[0])
        error, exact, recall = result.standard_error, result.exact, result.recall
        return replace(
            result,
            scores=result.scores[0],
            floor=floor,
            target_ids=None,
            standard_error=None if error is None else error[0],
            exact=None if exact is None else exact[0],
            recall=None if recall is None else recall[0],
        )

    def self_influence(self, train_batches: Iterable[Any] | None = None) -> Result:
        """Influence of every training instance on itself: memorization, and mislabels.

        Every row is scored under its own id and under ghosts: all of them with the linear method, 20
        with the exact one, whose null distribution is pooled over the rows. With ``"rerank"`` there is
        nothing to rank, and the scores are linear, as with ``"auto"``.

        Args:
            train_batches: batches with labels and ids; by ``"gram"`` of fitted instances, and ``None`` for
                all of them.

        Returns:
            :class:`Result` with scores and noise floor (train,); q is over all instances.

        Raises:
            InputError: a batch without ids, ids given twice, an objective that is not finite.
        """
        if self._gram is not None:
            with exclusive(*self._models):
                return self._gram.self_influence(train_batches)
        if train_batches is None:
            raise InputError(f"self-influence by method={self.method!r} needs train_batches")
        pool = GhostPool()
        ids: list[Tensor] = []
        own, errors, floors = [], [], []
        seen: set[int] = set()
        exact = (1 + min(self.ghosts, _OWN_GHOSTS)) if self.method == "exact" else 0
        progress = own_bar(len(self.networks), exact, shown=self.progress)
        with self._evaluating():
            self._listen(progress)
            for batch in progress.follow(train_batches, self._given.adapted(train_batches)):
                if batch.ids is None:
                    raise InputError("self-influence needs the ids of its batches")
                row_ids = self._check(batch.ids)
                again = sorted(seen.intersection(row_ids.tolist()))
                if again:
                    raise InputError(_TWICE.format(again[:5]))
                seen.update(row_ids.tolist())
                batch = self._given.check(batch)
                if not ids:
                    measure(self._engines, batch)
                scores, noise = self._own(batch, row_ids)
                own.append(scores.mean[0].cpu().numpy())
                if scores.standard_error is not None:
                    errors.append(scores.standard_error[0].cpu().numpy())
                floors.append(pool.add(noise.cpu().numpy()))
                ids.append(row_ids)
        if not ids:
            raise InputError("no training batches given")
        all_ids = torch.cat(ids)
        described = self._described("exact" if self.method == "exact" else "linear", all_ids)
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
            **described,
        )

    def _own(self, batch: Batch, ids: Tensor) -> tuple[Scores, Tensor]:
        """Scores of every row under its own id (1, rows), and under ghosts (rows, ghosts)."""
        block = TargetBlock(self._engines, [batch])
        if self.method == "exact":
            noise_ids = ghost_ids(min(self.ghosts, _OWN_GHOSTS))
            scored = [
                row.exact(torch.cat([ids[i : i + 1], noise_ids]))
                for i, row in enumerate(block.targets())
            ]
            first = [one.columns(0, 1) for one in scored]
            error = [one.standard_error for one in first if one.standard_error is not None]
            own = Scores(
                torch.cat([one.mean for one in first], dim=1),
                torch.cat(error, dim=1) if error else None,
            )
            return own, torch.cat([one.mean[:, 1:] for one in scored])
        return block.own(ids), block.linear(ghost_ids(self.ghosts)).mean

    def plan(
        self,
        targets: Iterable[Any],
        train_ids: Tensor | Sequence[int] | None = None,
        *,
        top: int | None = None,
        out: str | Path | None = None,
    ) -> Plan:
        """What :meth:`estimate` would cost by each method, from a pilot of a few seconds.

        Arguments and errors as in :meth:`estimate`; nothing is written.

        Returns:
            :class:`turnover.influence.plan.Plan` with estimated seconds, memory and noise floor of
            each method, and the one that ``"auto"`` takes; ``str()`` of it is a table.
        """
        if self._gram is not None:
            raise InputError('plan compares the methods that need masks: leave method="gram" out')
        ids = self._check(train_ids)
        with self._evaluating():
            batches = self._measured(self._given.batches(targets))
            walk = self._walk("linear", top)
            return plan(walk, list(batches), len(ids), budget=self.seconds, in_memory=out is None)

    def _begun(
        self,
        targets: Iterable[Any],
        batches: Iterator[Batch],
        ids: Tensor,
        top: int | None,
        out: str | Path | None,
        *,
        mean: bool = False,
    ) -> tuple[Walk, Iterator[Batch]]:
        """How the targets will be gone through, and the targets, with a progress bar."""
        batches = self._measured(batches)
        walk = self._walk(self.method, top)
        if self.method == "auto":
            listed = list(batches)
            chosen = None if out is None else _begun_method(out)
            if chosen is None:
                budget, count = self.seconds, len(ids)
                chosen = plan(walk, listed, count, budget=budget, in_memory=out is None).chosen
            walk, targets, batches = self._walk(chosen, top), listed, iter(listed)
        first = next(batches)
        progress = bar_of(walk, len(ids), first, mean=mean, shown=self.progress)
        self._listen(progress)
        return walk, progress.follow(targets, chain([first], batches))

    def _listen(self, progress: Progress) -> None:
        for engine in self._engines:
            engine.counts = progress
        self._progress = progress

    def _measured(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, after a look at the first, by which all widths are known."""
        first = next(batches, None)
        if first is None:
            raise InputError("no targets given")
        measure(self._engines, first)
        return chain([first], batches)

    def _walk(self, method: str, top: int | None) -> Walk:
        return Walk(self._engines, method, self.ghosts, self.candidates, top)

    def _store(
        self,
        walk: Walk,
        targets: Iterator[Batch],
        ids: Tensor,
        out: str | Path,
        coordinates: dict[str, Any],
        over: Over,
    ) -> StoredResult:
        from turnover.results import reader, store

        top, reranks = walk.top, walk.method == "rerank"
        rows, columns = walk.grid(len(ids))
        described = self._described(walk.method, ids)
        identity = described | {
            "precision": precision(self._engines),
            "sites": list(self.sites),
            "ghosts": self.ghosts,
            "candidates": self.candidates if reranks else None,
            "top": top,
            "grid": [rows, columns, self.block],
        }
        labelled = {"train": ("train", ids.numpy())} | check_columns(coordinates, len(ids))
        sizes = {"ghost": walk.floor_ghosts}
        sizes["signature"] = signature_columns(self._engines, walk.method)
        if top is None:
            sizes["train"] = len(ids)
        else:
            sizes["rank"] = min(2 * top, len(ids))
        variables = self._variables(rows, columns, sizes, reranks=reranks)
        with store.writing(
            out, identity, variables, sizes, labelled, "dense" if top is None else "top"
        ) as writer:
            if writer.complete:  # what is finished is only checked
                count = walk.announce(targets, ids, StoreSink(writer, walk))
            else:
                count = over(walk, targets, ids, writer)
            writer.finish(count)
        return reader.open_result(out)

    def _variables(
        self, rows: int, columns: int, sizes: Mapping[str, int], *, reranks: bool
    ) -> dict[str, Any]:
        from turnover.results.arrays import Variable

        few = min(rows, 32)  # targets in one file: a reader wants some of them
        second = "train" if "train" in sizes else "rank"
        dims = ("target", second)
        chunks = (few, min(columns, sizes[second]))
        variables = {
            "score": Variable(dims, "float32", chunks),
            "ghost": Variable(("target", "ghost"), "float32", (few, sizes["ghost"])),
        }
        if second == "rank":
            variables["train_id"] = Variable(dims, "int64", chunks)
        if len(self.networks) > 1:
            variables["standard_error"] = Variable(dims, "float32", chunks)
        if reranks:
            variables["recall"] = Variable(("target",), "float32", (few,))
            if second == "train":
                variables["exact"] = Variable(dims, "bool", chunks)
        return variables

    def _described(self, method: str, ids: Tensor) -> dict[str, Any]:
        return {
            "method": method,
            "objective": getattr(self.objective, "__name__", type(self.objective).__name__),
            "sites": tuple(self.sites),
            "network": "+".join(network.digest() for network in self.networks),
            "considered": len(ids),
        }

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(exclusive(*self._models))
            for engine in self._engines:
                stack.enter_context(engine.evaluating())
            stack.callback(self._finished)
            yield

    def _finished(self) -> None:
        if self._progress is not None:
            self._progress.close()
        self._progress = None
        for engine in self._engines:
            engine.counts = Counts()

    def _check(self, train_ids: Tensor | Sequence[int] | None) -> Tensor:
        if train_ids is None:
            raise InputError(
                f"method={self.method!r} needs train_ids: it scores any ids it is given"
            )
        ids = check_ids(train_ids).cpu()
        if not len(ids):
            raise InputError("no training ids given")
        values, counts = torch.unique(ids, return_counts=True)
        if len(values) < len(ids):
            twice = values[counts > 1][:5].tolist()
            raise InputError(_TWICE.format(twice))
        if bool(((ids < 0) & (ids >= -self.ghosts)).any()):
            raise InputError(
                f"ids -1 to -{self.ghosts} are the ghosts of the noise floor; use "
                f"turnover.ghost_ids(count, start={self.ghosts}) for fresh ones"
            )
        return ids


def _check_engine(engine: str, out: str | Path | None) -> None:
    check_engine(engine)
    if engine == "process":
        return
    if out is None:
        raise InputError(f"engine={engine!r} writes blocks from many processes: give out= as well")
    from turnover.results.location import Location

    _ = Location(out).address


@contextmanager
def _over(engine: str, walk: Walk) -> Iterator[Over]:
    """What scores all targets and writes them."""
    if engine == "process":
        yield lambda walk, targets, ids, writer: walk.over(targets, ids, StoreSink(writer, walk))
        return
    from turnover.influence import ray_blocks
    from turnover.parallel.ray import connected

    with connected():
        ray_blocks.check(walk)
        yield ray_blocks.over


def _begun_method(out: str | Path) -> str | None:
    """What a result was begun with goes on with it, however long it would now be estimated to take."""
    from turnover.results import store

    return store.stored_method(out)


def _several(
    network: Network | nn.Module | Sequence[Network | nn.Module],
) -> list[Network | nn.Module]:
    models = [network] if isinstance(network, Network | nn.Module) else list(network)
    if not models:
        raise InputError("no network given")
    if len({id(one.model if isinstance(one, Network) else one) for one in models}) < len(models):
        raise InputError(
            "one network is given twice, and would count double in the mean over networks"
        )
    return models


def _attached(models: Sequence[Network | nn.Module], method: str) -> list[Network]:
    networks = [one for one in models if isinstance(one, Network)]
    if len(networks) < len(models):
        raise InputError(
            f"method={method!r} needs the masks that a network was trained under: give one from "
            f'turnover.attach, or take method="gram" for a network that was trained without'
        )
    for one in networks[1:]:
        if one.sites != networks[0].sites:
            raise InputError(
                f"the networks have different sites, {networks[0].sites} and {one.sites}: attach the "
                f"same ones to all"
            )
    return networks
