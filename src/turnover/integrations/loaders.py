"""Training rows of data loaders, told by their ids or places: what the adaptors into other tools share.

The field's tools know a training instance by its place in a data set. Masks know it by its id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.batches.loaders import loader_of, places_of, warn_left_out
from turnover.errors import InputError
from turnover.ids import check_training_ids
from turnover.influence.estimator import Influence

_NO_PLACES = (
    "the training batches have no ids, and their places in a data set are not known: give a "
    "DataLoader of a map-style data set, or batches with their ids"
)


class LoaderInfluence:
    """An :class:`~turnover.Influence` that is asked with data loaders and answers row by row.

    A row's id is the one in its batch; else ``train_ids`` at its place in the loader's data set; else,
    by gram, that place itself.

    Args:
        influence: the estimator.
        train_ids: int64 (rows of the training data set,), what its rows were trained under, where the
            batches do not have their ids.

    Raises:
        InputError: ids that are not those of training instances.
    """

    def __init__(self, influence: Influence, train_ids: Tensor | None = None) -> None:
        self._influence = influence
        self._train_ids = None if train_ids is None else check_training_ids(train_ids).cpu()
        self._rows: int | None = None

    def fit(self, loader: Iterable[Any]) -> None:
        """Take in the whole training set: by gram its gradients, else what its places refer to.

        Raises:
            InputError: as in :meth:`scores` and :meth:`turnover.Influence.fit`.
        """
        self._rows = None
        warn_left_out(loader)
        if self._influence.needs_fit:
            self._influence.fit(self._batches(loader))
        if _has_places(loader):
            self._rows = _rows_of(loader)

    def scores(self, train: Iterable[Any], targets: Iterable[Any]) -> Tensor:
        """Influence of every row of a training loader on every row of another: float32 (train, targets).

        Positive: helpful. On the CPU.

        Args:
            train: the training set or a part of it, in an order that does not change.
            targets: rows to explain, likewise.

        Raises:
            InputError: a loader that shuffles, rows without ids whose places are not known, or
                whatever :meth:`turnover.Influence.estimate` refuses.
        """
        _check_order(targets)
        result = self._influence.estimate(targets, self._ids(train))
        return torch.from_numpy(result.scores).T.contiguous()

    def mean_scores(self, train: Iterable[Any], targets: Iterable[Any]) -> Tensor:
        """Influence of every row of a training loader on the mean objective: float32 (train,).

        Arguments and errors as in :meth:`scores`; the matrix is never held.
        """
        return torch.from_numpy(self._influence.aggregate(targets, self._ids(train)).scores)

    def self_scores(self, train: Iterable[Any]) -> Tensor:
        """Influence of every row of a training loader on itself: float32 (train,).

        Errors as in :meth:`scores`.
        """
        return torch.from_numpy(self._influence.self_influence(self._batches(train)).scores)

    def _batches(self, loader: Iterable[Any]) -> Iterator[Batch]:
        """The batches, with the ids of their rows."""
        if self._has_ids(loader):
            yield from map(self._influence.adapter, loader)
            return
        ids, start = self._ids_of_places(loader), 0
        for given in loader:
            batch = self._influence.adapter(given)
            yield replace(batch, ids=ids[start : start + len(batch)])
            start += len(batch)

    def _ids(self, loader: Iterable[Any]) -> Tensor:
        if not self._has_ids(loader):
            return self._ids_of_places(loader)
        ids = [batch.ids for batch in self._batches(loader)]
        known = [one.cpu() for one in ids if one is not None]
        if len(known) < len(ids):
            raise InputError("some training batches have ids and others have none: give all theirs")
        return torch.cat(known)

    def _has_ids(self, loader: Iterable[Any]) -> bool:
        if self._train_ids is not None:
            return False
        _check_order(loader)
        first = next(iter(loader), None)
        if first is None:
            raise InputError("no training batches given")
        return self._influence.adapter(first).ids is not None

    def _ids_of_places(self, loader: Iterable[Any]) -> Tensor:
        if self._train_ids is None and not self._influence.needs_fit:
            raise InputError(
                f"method={self._influence.method!r} needs the ids that the network was trained under: "
                f"give batches with their ids, or train_ids= in the order of the data set"
            )
        if not _has_places(loader):
            raise InputError(_NO_PLACES)
        count = _rows_of(loader)
        if self._rows not in (None, count):
            raise InputError(
                f"the training loader's data set has {count} rows, and the one taken in first has "
                f"{self._rows}, so rows cannot be told by their places: use a sampler over the same data "
                f"set, or batches with their ids"
            )
        places = _check_order(loader)
        if self._train_ids is None:
            return places
        if len(self._train_ids) != count:
            raise InputError(
                f"train_ids has {len(self._train_ids)} ids and the training data set {count} rows: give "
                f"one id for each row, in the data set's order"
            )
        return self._train_ids[places]


def _has_places(loader: Iterable[Any]) -> bool:
    """Whether rows can be told by their places: those of a DataLoader of a map-style data set, batched."""
    found = loader_of(loader)
    return found is not None and found.batch_sampler is not None


def _rows_of(loader: Iterable[Any]) -> int:
    found: Any = loader_of(loader)
    return len(found.dataset)


def _check_order(loader: Iterable[Any]) -> Tensor:
    """Places in the data set of a loader's rows: int64 (rows,); none where they are not known.

    Raises:
        InputError: the order changes from pass to pass.
    """
    found = loader_of(loader)
    if found is None or found.batch_sampler is None:
        return torch.empty(0, dtype=torch.int64)
    places = places_of(found)
    if places is None:
        raise InputError(
            "a loader shuffles, so scores could not be told apart by their places: set shuffle=False"
        )
    return torch.tensor(places, dtype=torch.int64)
