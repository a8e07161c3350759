"""Influence of training instances on predictions, with the noise floor of every number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn

from turnover.batches import Adapter
from turnover.dropout.modules import exclusive
from turnover.dropout.network import Network
from turnover.errors import InputError, check_whole
from turnover.influence.driver import BlockDriver
from turnover.influence.networks import attached, distinct
from turnover.influence.plan import FitPlan, Plan
from turnover.influence.protocol import (
    METHODS,
    Driver,
    Ids,
    Method,
    PlanningDriver,
    Setup,
    StoringDriver,
    Wanted,
    method_of,
)
from turnover.influence.storing import check_engine
from turnover.influence.user_batches import UserBatches
from turnover.objectives import Objective, margin
from turnover.results.calibration import MIN_GHOSTS
from turnover.results.result import Result

if TYPE_CHECKING:
    from turnover.results.reader import StoredResult


class Influence:
    """Estimates how much each training instance moved a network's predictions, and its noise.

    Args:
        network: from :func:`turnover.attach`, trained under ``exposed(ids)``; or several, trained on
            the same ids with other seeds, whose scores are averaged: noise falls with the square root
            of their number, and every score comes with its standard error. For ``"gram"`` also any
            trained modules, without masks.
        objective: cost of a prediction, callable ``(outputs, batch) -> (rows,)``; default
            :func:`turnover.objectives.margin`, whose noise is closest to Gaussian. Significance is
            computed on the objective given.
        method: the estimator, by name with its default options, or by its options:

            - ``"linear"``, :class:`turnover.Linear`: one backward pass per target, whatever the number of
              ids.
            - ``"exact"``, :class:`turnover.Exact`: two forwards of every id.
            - ``"rerank"``, :class:`turnover.Rerank`: linear, then exact for the candidates at both ends.
            - ``"auto"``, :class:`turnover.Auto`: the most exact of them that is estimated to fit a budget.
            - ``"gram"``, :class:`turnover.Gram`: inner products of gradients; needs :meth:`fit`.
            - any method added by :func:`turnover.influence.protocol.register`.
        ghosts: number of ghost ids of the noise floor, at least 10. Below 1,000 the far tail is rough.
        sites: names or glob patterns of the sites whose masks are flipped; at the others the network
            runs whole, so the scores are the influence that these sites carry. Sites with few units
            add more noise than signal. ``None``: all, which is the paper's estimate.
        adapter: turns a batch into :class:`turnover.Batch`; a :class:`turnover.Batch` stays as it is.
            ``None``: as the network was attached (by a trainer), else :func:`turnover.batches.as_batch`.
        progress: show a progress bar with the time left.

    Attributes:
        method: name of the estimator.
        needs_fit: whether :meth:`fit` must come first.
        modules: the networks' modules.

    Raises:
        InputError: unknown method (the registered ones are listed), unknown site, too few ghosts, one
            network twice, networks whose sites differ, or modules without masks by a method that
            needs them.
    """

    def __init__(
        self,
        network: Network | nn.Module | Sequence[Network | nn.Module],
        objective: Objective = margin,
        method: str | Method = "linear",
        *,
        ghosts: int = 1000,
        sites: Sequence[str] | None = None,
        adapter: Adapter | None = None,
        progress: bool = False,
    ) -> None:
        options = method_of(method)
        if not callable(objective):
            is_method = isinstance(objective, Method) or objective in METHODS
            hint = f": write method={objective!r}" if is_method else ""
            raise InputError(f"objective must be callable, got {objective!r}{hint}")
        check_whole("ghosts", ghosts, MIN_GHOSTS)
        models = distinct(network)
        self.method, self.objective, self.sites = options.name, objective, list[str]()
        self.needs_fit, self._ready = options.needs_fit, not options.needs_fit
        if options.needs_masks:
            first = attached(models, options.name)[0]
            if sites is not None and (isinstance(sites, str) or not sites):
                raise InputError(f"sites must be a list of names or patterns, got {sites!r}")
            self.sites = first.sites if sites is None else first.select(sites)
        self.modules = [one.model if isinstance(one, Network) else one for one in models]
        self._batches = UserBatches(models[0], objective, adapter)
        setup = Setup(models, objective, ghosts, self.sites, self._batches, progress)
        # Another thread that scores sets the parameters' requires_grad to False meanwhile.
        with exclusive(*self.modules):
            self._driver: Driver = (options.driver or BlockDriver)(options, setup)

    @property
    def adapter(self) -> Adapter:
        """How a batch becomes :class:`turnover.Batch`."""
        return self._batches.adapter

    @adapter.setter
    def adapter(self, adapter: Adapter) -> None:
        self._batches.adapter = adapter

    def fit(
        self,
        train_batches: Iterable[Any],
        *,
        out: str | Path | None = None,
        engine: str = "process",
        num_gpus: float = 1.0,
    ) -> Influence:
        """Take in the training set, where the method needs it (``"gram"``). A second call starts anew.

        Args:
            train_batches: the training instances, each once, with labels. Their ids come from the
                batches; where none has any, row numbers from 0 are the ids.
            out: with ``turnover.Gram(landmarks=)``, folder or fsspec URL of a zarr store that keeps what
                is computed of the training set. The same call continues one that was interrupted, and
                gives the same bits; it only reads a finished one. With further batches after the same
                ones, it computes those alone.
            engine: with ``turnover.Gram(landmarks=)``, where gradients of the training set, their
                coordinates and inner products are computed: in this ``"process"``, or by ``"ray"``, as in
                :meth:`estimate`. Both give the same bits, and each continues what the other began. This
                process goes through the batches, computes the landmarks' gradients, writes and solves.
            num_gpus: as in :meth:`estimate`.

        Returns:
            The estimator itself.

        Raises:
            InputError: another method, no batches, ids in some batches only or given twice, an
                objective that is not finite or mixes rows; a store with something else, with other
                instances, or one that another process writes; an engine that is missing, or does not
                compute this method.

        Example::

            method = turnover.Gram(landmarks=1000)
            influence = turnover.Influence(model, method=method)
            influence.fit(train_batches, out="gram.zarr", engine="ray")
            best = influence.estimate(targets, top=100, engine="ray")  # scores (targets, 200)
        """
        check_engine(engine, num_gpus)
        driver = self._driver
        with exclusive(*self.modules):
            if isinstance(driver, StoringDriver):
                driver.fit_to(train_batches, Wanted(out=out, engine=engine, num_gpus=num_gpus))
            elif out is not None:
                raise InputError(
                    "fit keeps what landmarks need: take method=turnover.Gram(landmarks=...), or leave "
                    "out= out"
                )
            elif engine != "process":
                raise InputError(
                    f"engine={engine!r} computes the fit of landmarks alone: take "
                    f"method=turnover.Gram(landmarks=...), or leave engine= out"
                )
            else:
                driver.fit(train_batches)
        self._ready = True
        return self

    @overload
    def estimate(
        self,
        targets: Iterable[Any],
        train_ids: Ids = None,
        *,
        top: int | None = None,
        out: None = None,
        coordinates: Mapping[str, Any] | None = None,
    ) -> Result: ...

    @overload
    def estimate(
        self,
        targets: Iterable[Any],
        train_ids: Ids = None,
        *,
        top: int | None = None,
        out: str | Path,
        coordinates: Mapping[str, Any] | None = None,
        engine: str = "process",
        num_gpus: float = 1.0,
    ) -> StoredResult: ...

    def estimate(
        self,
        targets: Iterable[Any],
        train_ids: Ids = None,
        *,
        top: int | None = None,
        out: str | Path | None = None,
        coordinates: Mapping[str, Any] | None = None,
        engine: str = "process",
        num_gpus: float = 1.0,
    ) -> Result | StoredResult:
        """Influence of every training instance on every target.

        Args:
            targets: batches of predictions to explain, with labels as the objective needs them.
            train_ids: int64 (train,), distinct. Ghosts beyond the first ``ghosts`` are allowed, to check
                the false-positive rate. By ``"gram"`` of fitted instances, and ``None`` for all.
            top: number of most helpful and of most harmful ids to keep for each target. Memory then
                does not grow with the number of ids.
            out: folder or fsspec URL of a zarr store to write, block by block. Memory then grows
                neither with targets nor with ids. The same call resumes one that was interrupted, and
                gives the same bits.
            coordinates: with ``out``, labels to store beside the training ids: name to one value for
                each id.
            engine: with ``out``, where blocks are computed: in this ``"process"``, or by ``"ray"``, the
                workers of the cluster that ``ray.init`` connected to (else of ``RAY_ADDRESS``, else of this
                machine). Both give the same bits, and each resumes results of the other. By
                ``turnover.Gram(landmarks=)`` without ``out``: where inner products with training instances
                are computed, of candidates (``top``) or of all (``exact=True``).
            num_gpus: share of a GPU that a Ray task takes if the networks are on CUDA: 1 is a card for each
                worker, 0.5 lets two workers share one.

        Returns:
            :class:`Result` with scores (targets, train), or (targets, ranks) with ``top``, in memory;
            with ``out`` a :class:`StoredResult`, which reads on demand.

        Raises:
            InputError: no targets, duplicate ids or ids of the noise floor, an objective that is not
                finite (with the rows), a store with something else, or one that another process writes.
        """
        if top is not None:
            check_whole("top", top, 1)
        check_engine(engine, num_gpus)
        wanted = Wanted(top, out, dict(coordinates or {}), engine, num_gpus)
        with self._scoring():
            return self._driver.estimate(targets, train_ids, wanted)

    def aggregate(
        self,
        targets: Iterable[Any],
        train_ids: Ids = None,
        *,
        weights: Tensor | Sequence[float] | None = None,
    ) -> Result:
        """Influence on the mean objective over all targets, without the pairwise matrix.

        Args:
            targets: as in :meth:`estimate`.
            train_ids: as in :meth:`estimate`.
            weights: float (targets,), of either sign: the influence is that on the objectives' sum with
                these factors, such as a difference between two groups of targets
                (:mod:`turnover.fairness`). ``None``: 1 / targets each.

        Returns:
            :class:`Result` with scores (train,) and a scalar noise floor.

        Raises:
            InputError: as :meth:`estimate`, or other than one finite weight for each target.
        """
        factors = None
        if weights is not None:
            factors = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
            if factors.dim() != 1 or not bool(factors.isfinite().all()):
                raise InputError(
                    f"weights must be finite numbers of shape (targets,), got {tuple(factors.shape)}"
                )
        with self._scoring():
            return self._driver.aggregate(targets, train_ids, factors)

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
        with self._scoring():
            return self._driver.self_influence(train_batches)

    @overload
    def plan(
        self,
        targets: Iterable[Any],
        train_ids: Ids = None,
        *,
        train_batches: None = None,
        top: int | None = None,
        out: str | Path | None = None,
    ) -> Plan: ...

    @overload
    def plan(
        self,
        targets: Iterable[Any],
        train_ids: Ids = None,
        *,
        train_batches: Iterable[Any],
        top: int | None = None,
        out: str | Path | None = None,
    ) -> FitPlan: ...

    def plan(
        self,
        targets: Iterable[Any],
        train_ids: Ids = None,
        *,
        train_batches: Iterable[Any] | None = None,
        top: int | None = None,
        out: str | Path | None = None,
    ) -> Plan | FitPlan:
        """Estimate what :meth:`estimate` would cost by each method, from a pilot of a few seconds.

        By ``"gram"``, with ``train_batches``: what :meth:`fit` and :meth:`estimate` take by all pairs, by
        landmarks, and by landmarks with exact inner products, before the fit or after it. Gradients of the
        first training rows and targets, their inner products, and solves of at most 2,048 rows are timed;
        the number of each is counted, and larger solves follow from their size. Other rows are taken to be
        like the first ones, other networks like the first one, and the device to do nothing else.

        Args:
            targets: as in :meth:`estimate`; all are counted.
            train_ids: as in :meth:`estimate`; not with ``train_batches``.
            train_batches: by ``"gram"``, as in :meth:`fit`. Their rows are counted: without reading them
                in a ``DataLoader`` with torch's own batches, otherwise in one pass.
            top: as in :meth:`estimate`.
            out: as in :meth:`estimate`; nothing is written.

        Returns:
            :class:`turnover.influence.plan.Plan` with estimated seconds, memory and noise floor of
            each method, and the one that ``"auto"`` takes; with ``train_batches``
            :class:`turnover.influence.plan.FitPlan` with the seconds, memory and disk of each way.
            ``str()`` of it is a table.

        Raises:
            InputError: as in :meth:`estimate`; ``train_batches`` for another method, or none for gram.
        """
        driver, wanted = self._driver, Wanted(top, out)
        if isinstance(driver, PlanningDriver):
            if train_batches is None:
                return driver.plan(targets, train_ids, wanted)
            if train_ids is not None:
                raise InputError("give train_ids or train_batches to a plan, and not both")
            if top is not None:
                check_whole("top", top, 1)
            with exclusive(*self.modules):
                return driver.plan_fit(targets, train_batches, wanted)
        if train_batches is not None:
            raise InputError(
                f"plan counts train_batches for method='gram' alone: give {self.method!r} train_ids"
            )
        with self._scoring():
            return driver.plan(targets, train_ids, wanted)

    def _scoring(self) -> AbstractContextManager[None]:
        if not self._ready:
            raise InputError(
                f"{self.method} looks at the training data: call fit(train_batches) before it scores"
            )
        return exclusive(*self.modules)
