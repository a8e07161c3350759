"""The highest and lowest scores of every target, over blocks of ids."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, reduce

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Extremes:
    """The ``count`` most helpful and ``count`` most harmful ids of every target.

    Ids are ordered by score, equal scores by position; the result is both ends of that order, whatever the
    blocks.

    Args:
        targets: number of targets.
        count: ids on each side.
    """

    def __init__(self, targets: int, count: int) -> None:
        self._targets = targets
        self._count = count
        self._seen = 0
        self._sides = (_Side(targets, count), _Side(targets, count, last_first=True))

    def add(self, scores: Tensor) -> None:
        """Add scores (targets, ids) of the next ids."""
        high, low = self._sides
        high.add(scores, self._seen)
        low.add(-scores, self._seen)
        self._seen += scores.shape[1]

    def result(self) -> Found:
        """Positions of ids and scores, from high to low: (targets, ranks). No id is there twice."""
        high, low = (side.sorted() for side in self._sides)
        most = min(self._count, self._seen)
        least = min(self._count, self._seen - most)
        positions = np.concatenate([high[0][:, :most], low[0][:, :least][:, ::-1]], axis=1)
        scores = np.concatenate([high[1][:, :most], -low[1][:, :least][:, ::-1]], axis=1)
        return positions, scores


_Hits = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
"""Targets, positions of ids, and scores."""
Found = tuple[NDArray[np.int64], NDArray[np.float32]]
"""Positions and scores, as :meth:`Extremes.result`."""


def merged(parts: Iterable[Found], count: int) -> Found:
    """Extremes of all ids, from those of at least one disjoint part; two parts at a time are in memory.

    Args:
        parts: for the same targets, with positions among all ids.
        count: ids on each side, as in every part.
    """
    return reduce(partial(_of_two, count), parts)


def _of_two(count: int, one: Found, other: Found) -> Found:
    positions = np.concatenate([one[0], other[0]], axis=1)
    scores = np.concatenate([one[1], other[1]], axis=1)
    order = np.lexsort((positions, -scores), axis=1)
    if order.shape[1] > 2 * count:
        order = np.concatenate([order[:, :count], order[:, -count:]], axis=1)
    return np.take_along_axis(positions, order, axis=1), np.take_along_axis(scores, order, axis=1)


class _Side:
    """The highest scores of every target; of equal ones the first, or the last."""

    def __init__(self, targets: int, count: int, *, last_first: bool = False) -> None:
        self._targets, self._count, self._last_first = targets, count, last_first
        self._threshold: Tensor | None = None
        # Allocated once: arrays kept between blocks of scores would fragment the memory that these free.
        size = 2 * targets * count
        self._kept = (
            np.empty(size, np.int64),
            np.empty(size, np.int64),
            np.empty(size, np.float32),
        )
        self._filled = 0

    def add(self, scores: Tensor, start: int) -> None:
        if self._threshold is None:
            count = min(self._count, scores.shape[1])
            threshold = scores.topk(count, dim=1).values[:, -1:]
            hits = scores >= threshold
            if count == self._count:
                self._threshold = threshold
        elif self._last_first:
            hits = scores >= self._threshold
        else:
            hits = scores > self._threshold
        rows, columns = hits.nonzero(as_tuple=True)
        values = scores[rows, columns]
        found = (rows.cpu().numpy(), (columns + start).cpu().numpy(), values.cpu().numpy())
        if self._filled + len(rows) > len(self._kept[0]):
            self._prune(found, scores)
        else:
            self._keep(found)

    def _keep(self, found: _Hits) -> None:
        end = self._filled + len(found[0])
        some = slice(self._filled, end)
        rows, positions, values = self._kept
        rows[some], positions[some], values[some] = found
        self._filled = end

    def _prune(self, found: _Hits, like: Tensor) -> None:
        rows, positions, values = self._best(found)
        self._filled = 0
        self._keep((rows, positions, values))
        counts = np.bincount(rows, minlength=self._targets)
        if counts.min() >= self._count:
            last = values[np.cumsum(counts) - 1]
            self._threshold = torch.from_numpy(last).to(like.device)[:, None]

    def _best(self, *more: _Hits) -> _Hits:
        kept = tuple(array[: self._filled] for array in self._kept)
        rows, positions, values = (np.concatenate(parts) for parts in zip(kept, *more, strict=True))
        order = np.lexsort((-positions if self._last_first else positions, -values, rows))
        rows, positions, values = rows[order], positions[order], values[order]
        starts = np.searchsorted(rows, np.arange(self._targets))
        best = np.arange(len(rows)) - starts[rows] < self._count
        return rows[best], positions[best], values[best]

    def sorted(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        rows, positions, values = self._best()
        ranks = len(rows) // self._targets  # every target has seen the same ids
        shape = (self._targets, ranks)
        return positions.reshape(shape), values.reshape(shape)
