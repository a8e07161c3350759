"""Influence asked with data loaders: the shared part of the adapters to other tools.

The tools of the field know a training instance by its position in a data set, masks by its id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from turnover.batches import Batch
from turnover.batches.loaders import loader_of, places_of, warn_left_out
from turnover.errors import InputError
from turnover.ids import check_training_ids
from turnover.influence.estimator import Influence


class LoaderInfluence:
    """An :class:`~turnover.Influence` that takes data loaders and answers row by row.

    A row's id is that in its batch, or else the one in ``train_ids`` at its position in the loader's data
    set, or else, for gram, that position.
    """

    def __init__(self, influence: Influence, train_ids: Tensor | None = None) -> None:
        self._influence = influence
        self._train_ids = None if train_ids is None else check_training_ids(train_ids).cpu()
        self._rows: int | None = None

    def fit(self, loader: Iterable[Any]) -> None:
        """Take in the whole training set: gram's gradients, and the size that positions refer to."""
        self._rows = None
        warn_left_out(loader)
        if self._influence.needs_fit:
            self._influence.fit(self._batches(loader))
        found = _map_style(loader)
        if found is not None:
            self._rows = _length(found)

    def scores(self, train: Iterable[Any], targets: Iterable[Any]) -> Tensor:
        """Influence of training rows on target rows: float32 (train, targets), positive = helpful."""
        _positions(targets)
        result = self._influence.estimate(targets, self._ids(train))
        return torch.from_numpy(result.scores).T.contiguous()

    def mean_scores(self, train: Iterable[Any], targets: Iterable[Any]) -> Tensor:
        """Influence of training rows on the mean objective of targets: float32 (train,)."""
        return torch.from_numpy(self._influence.aggregate(targets, self._ids(train)).scores)

    def self_scores(self, train: Iterable[Any]) -> Tensor:
        """Influence of training rows on themselves: float32 (train,)."""
        return torch.from_numpy(self._influence.self_influence(self._batches(train)).scores)

    def _batches(self, loader: Iterable[Any]) -> Iterator[Batch]:
        if self._has_ids(loader):
            yield from map(self._influence.adapter, loader)
            return
        ids, start = self._ids_by_position(loader), 0
        for given in loader:
            batch = self._influence.adapter(given)
            yield replace(batch, ids=ids[start : start + len(batch)])
            start += len(batch)

    def _ids(self, loader: Iterable[Any]) -> Tensor:
        if not self._has_ids(loader):
            return self._ids_by_position(loader)
        ids = [batch.ids for batch in self._batches(loader)]
        known = [one.cpu() for one in ids if one is not None]
        if len(known) < len(ids):
            raise InputError("some training batches have ids and others do not: give ids with all")
        return torch.cat(known)

    def _has_ids(self, loader: Iterable[Any]) -> bool:
        if self._train_ids is not None:
            return False
        _positions(loader)
        first = next(iter(loader), None)
        if first is None:
            raise InputError("no training batches given")
        return self._influence.adapter(first).ids is not None

    def _ids_by_position(self, loader: Iterable[Any]) -> Tensor:
        if self._train_ids is None and not self._influence.needs_fit:
            raise InputError(
                f"method={self._influence.method!r} needs the ids that the network was trained under: "
                f"give batches with their ids, or train_ids= in the order of the data set"
            )
        found = _map_style(loader)
        if found is None:
            raise InputError(
                "the training batches have no ids, and their positions in a data set are not known: "
                "give a DataLoader of a map-style data set, or batches with their ids"
            )
        count = _length(found)
        if self._rows not in (None, count):
            raise InputError(
                f"the training loader's data set has {count} rows, but the first one had {self._rows}, "
                f"so positions do not identify rows: use a sampler over the same data set, or batches "
                f"with their ids"
            )
        positions = _positions(loader)
        if self._train_ids is None:
            return positions
        if len(self._train_ids) != count:
            raise InputError(
                f"train_ids has {len(self._train_ids)} ids and the training data set {count} rows: give "
                f"one id for each row, in the data set's order"
            )
        return self._train_ids[positions]


def _map_style(loader: Iterable[Any]) -> DataLoader[Any] | None:
    """The loader of a map-style data set, batched, whose rows have positions."""
    found = loader_of(loader)
    return None if found is None or found.batch_sampler is None else found


def _length(loader: DataLoader[Any]) -> int:
    dataset: Any = loader.dataset
    return len(dataset)


def _positions(loader: Iterable[Any]) -> Tensor:
    """Positions of a loader's rows in its data set: int64 (rows,); none if they are not known."""
    found = _map_style(loader)
    positions = [] if found is None else places_of(found)
    if positions is None:
        raise InputError(
            "a loader shuffles, so positions do not identify its scores: set shuffle=False"
        )
    return torch.tensor(positions, dtype=torch.int64)
