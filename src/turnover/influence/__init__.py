"""Influence of training instances on predictions, with the noise floor of every number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from turnover.batches import Adapter, Batch, as_batch
from turnover.errors import InputError
from turnover.influence.calibration import MIN_GHOSTS, GhostPool, NoiseFloor
from turnover.influence.exact import ExactEstimator
from turnover.influence.linear import LinearScorer, mask_gradients
from turnover.influence.result import Result
from turnover.masks import check_ids, ghost_ids
from turnover.network import Network
from turnover.objectives import Objective, margin
from turnover.sites import device_of

METHODS = ("exact", "linear")
_OWN_GHOSTS = 20
_TWICE = "training ids are given twice: {}; score each id (group) once"


class Influence:
    """Estimates which training instances made a network predict what it predicts.

    Args:
        network: from :func:`turnover.attach`, trained under ``exposed(ids)``.
        objective: cost of a prediction, callable ``(outputs, batch) -> (rows,)``; default
            :func:`turnover.objectives.margin`, whose noise is closest to Gaussian. Significance is
            computed on the objective given.
        method: ``"exact"`` (two forwards of every id: Kobayashi et al. 2020, equation 6) or
            ``"linear"`` (one backward per target, whatever the number of ids).
        ghosts: ghost ids for the noise floor, at least 10. Below 1,000 the far tail is rough.
        block: ids in one forward of the exact method; ``None``: as many as the caches hold.
        sites: names or glob patterns of the sites whose masks are flipped; at the others the network
            runs whole, so the scores are the influence that these sites carry. Sites with few units
            add more noise than signal. ``None``: all, which is the paper's estimate.
        adapter: how a batch becomes :class:`turnover.Batch`.
        progress: show a progress bar with the time left.

    Raises:
        InputError: unknown method (those that exist are listed), unknown site, or too few ghosts.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective = margin,
        method: str = "linear",
        *,
        ghosts: int = 1000,
        block: int | None = None,
        sites: Sequence[str] | None = None,
        adapter: Adapter = as_batch,
        progress: bool = False,
    ) -> None:
        if method not in METHODS:
            raise InputError(f"unknown method {method!r}; built are: {', '.join(METHODS)}")
        if ghosts < MIN_GHOSTS:
            raise InputError(f"ghosts must be >= {MIN_GHOSTS} to tell a noise floor, got {ghosts}")
        if block is not None and block < 1:
            raise InputError(f"block must be >= 1, got {block}")
        self.network = network
        self.objective = objective
        self.method = method
        self.ghosts = ghosts
        self.block = block
        self.sites = network.sites if sites is None else network.select(sites)
        self.adapter = adapter
        self.progress = progress

    def estimate(self, targets: Iterable[Any], train_ids: Tensor | Sequence[int]) -> Result:
        """Influence of every training instance on every target.

        Args:
            targets: batches of predictions to explain, with labels as the objective needs them.
            train_ids: int64 (train,), distinct. Ghosts beyond the first ``ghosts`` are allowed, to
                check the false-positive rate.

        Returns:
            :class:`Result` with scores (targets, train); all of it is held in memory.

        Raises:
            InputError: no targets, ids given twice or shared with the noise floor, an objective
                that is not finite (the rows are named).
        """
        ids = self._check(train_ids)
        both = torch.cat([ids, ghost_ids(self.ghosts)])
        scores, target_ids = [], []
        with self._evaluating():
            exact = ExactEstimator(self.network, self.objective, self.block, self.sites)
            for batch in self._batches(targets):
                if self.method == "linear":
                    gradients = self._gradients(batch)
                    part = self._linear(gradients).scores(both)
                else:
                    part = exact.scores([batch.rows(i, i + 1) for i in range(len(batch))], both)
                scores.append(_finite(part, "influence"))
                target_ids.append(batch.ids)
        if not scores:
            raise InputError("no targets given")
        values = torch.cat(scores).cpu().numpy()
        known = [value for value in target_ids if value is not None]
        return self._result(
            values[:, : len(ids)],
            values[:, len(ids) :],
            ids,
            torch.cat(known).cpu().numpy() if len(known) == len(target_ids) else None,
        )

    def aggregate(self, targets: Iterable[Any], train_ids: Tensor | Sequence[int]) -> Result:
        """Influence on the mean objective over all targets, without the pairwise matrix.

        Arguments and errors as in :meth:`estimate`.

        Returns:
            :class:`Result` with scores (train,) and a scalar noise floor.
        """
        ids = self._check(train_ids)
        both = torch.cat([ids, ghost_ids(self.ghosts)])
        count = 0
        total: Tensor | None = None
        with self._evaluating():
            exact = ExactEstimator(self.network, self.objective, self.block, self.sites)
            for batch in self._batches(targets):
                if self.method == "linear":
                    part = self._gradients(batch).double().sum(dim=0)
                else:
                    rows = [batch.rows(i, i + 1) for i in range(len(batch))]
                    part = _finite(exact.scores(rows, both), "influence").double().sum(dim=0)
                total = part if total is None else total + part
                count += len(batch)
            if total is None:
                raise InputError("no targets given")
            mean = (total / count).float()[None]
            if self.method == "linear":
                mean = self._linear(mean).scores(both)
        values = _finite(mean, "influence").cpu().numpy()
        pairwise = self._result(values[:, : len(ids)], values[:, len(ids) :], ids, None)
        return _first_row(pairwise)

    def self_influence(self, train_batches: Iterable[Any]) -> Result:
        """Influence of every training instance on itself: memorisation, and mislabels.

        Every row is scored under its own id and under ghosts: all of them with the linear method, 20
        with the exact one, whose null distribution is pooled over the rows.

        Args:
            train_batches: batches with labels and ids.

        Returns:
            :class:`Result` with scores and noise floor (train,); q is over all instances.

        Raises:
            InputError: a batch without ids, ids given twice, an objective that is not finite.
        """
        ids, own, ghosts = [], [], []
        seen: set[int] = set()
        with self._evaluating():
            exact = ExactEstimator(self.network, self.objective, self.block, self.sites)
            for batch in self._batches(train_batches):
                if batch.ids is None:
                    raise InputError("self-influence needs the ids of its batches")
                row_ids = self._check(batch.ids)
                again = sorted(seen.intersection(row_ids.tolist()))
                if again:
                    raise InputError(_TWICE.format(again[:5]))
                seen.update(row_ids.tolist())
                scores, noise = self._own(batch, row_ids, exact)
                own.append(_finite(scores, "self-influence").cpu().numpy())
                ghosts.append(noise.cpu().numpy())
                ids.append(row_ids)
        if not ids:
            raise InputError("no training batches given")
        by_row = self._result(
            np.concatenate(own)[:, None], np.concatenate(ghosts), torch.cat(ids), None
        )
        return replace(by_row, scores=by_row.scores[:, 0], considered=len(by_row.scores))

    def _own(self, batch: Batch, ids: Tensor, exact: ExactEstimator) -> tuple[Tensor, Tensor]:
        """Scores of every row under its own id (rows,) and under ghosts (rows, ghosts)."""
        if self.method == "linear":
            gradients = self._gradients(batch)
            scorer = self._linear(gradients)
            return scorer.own(ids), scorer.scores(ghost_ids(self.ghosts))
        noise_ids = ghost_ids(min(self.ghosts, _OWN_GHOSTS))
        rows = torch.stack(
            [
                exact.scores([batch.rows(i, i + 1)], torch.cat([ids[i : i + 1], noise_ids]))[0]
                for i in range(len(batch))
            ]
        )
        return rows[:, 0], rows[:, 1:]

    def _gradients(self, batch: Batch) -> Tensor:
        gradients = mask_gradients(self.network, self.objective, batch, self.sites)
        return _finite(gradients, "mask derivative")

    def _linear(self, gradients: Tensor) -> LinearScorer:
        return LinearScorer(gradients, self.network.spec, self.network.known_units(self.sites))

    def _batches(self, batches: Iterable[Any]) -> Iterator[Batch]:
        device = device_of(self.network.model)
        for raw in tqdm(batches, desc=f"influence ({self.method})", disable=not self.progress):
            batch = self.adapter(raw)
            rows = len(batch)
            if not rows:
                raise InputError("a batch has no rows")
            if batch.ids is not None and batch.ids.shape != (rows,):
                raise InputError(
                    f"a batch of {rows} rows has ids of shape {tuple(batch.ids.shape)}; give one id "
                    f"for each row"
                )
            yield batch.to(device)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode, put back after: dropout or batch statistics would be taken for influence.

        Masks are differentiated and parameters are not: below the first site no graph is built.
        """
        modes = {module: module.training for module in self.network.model.modules()}
        trained = [p for p in self.network.model.parameters() if p.requires_grad]
        self.network.model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            # The linear method needs autograd even where the caller needs none.
            with torch.inference_mode(False):
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for module, mode in modes.items():
                module.training = mode

    def _check(self, train_ids: Tensor | Sequence[int]) -> Tensor:
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

    def _result(
        self,
        scores: NDArray[np.float32],
        ghosts: NDArray[np.float32],
        ids: Tensor,
        target_ids: NDArray[np.int64] | None,
    ) -> Result:
        pool = GhostPool()
        floor = pool.add(ghosts)
        return Result(
            scores=scores,
            floor=floor,
            null=pool.null(),
            train_ids=ids.numpy(),
            target_ids=target_ids,
            method=self.method,
            objective=_name(self.objective),
            sites=tuple(self.sites),
            network=self.network.digest(),
            considered=len(ids),
        )


def _name(objective: Objective) -> str:
    return getattr(objective, "__name__", type(objective).__name__)


def _finite(values: Tensor, what: str) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        rows = (~torch.isfinite(values)).reshape(len(values), -1).any(dim=1).nonzero().flatten()
        raise InputError(
            f"{what} is NaN or infinite for rows {rows[:5].tolist()} of a batch: the network or the "
            f"objective diverged on them"
        )
    return values


def _first_row(result: Result) -> Result:
    floor = NoiseFloor(result.floor.mean[0], result.floor.sd[0])
    return replace(result, scores=result.scores[0], floor=floor)
