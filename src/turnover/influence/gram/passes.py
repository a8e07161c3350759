"""Passes over the training batches: the first one counts them, later ones must give the same instances."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover.batches import Batch
from turnover.batches.loaders import Numbers
from turnover.errors import InputError
from turnover.ids import check_ids
from turnover.influence.gram.given import train_ids_of
from turnover.influence.gram.options import Model, measure
from turnover.influence.progress import Progress
from turnover.influence.sinks import fingerprints
from turnover.influence.user_batches import UserBatches


class Passes:
    """The training batches, which are gone through now to count them.

    Args:
        train: the batches, re-iterable.
        batches: makes batches of them.
        models: whose masks are measured by the first one.
        hashed: whether to hash every row.

    Attributes:
        ids: int64 (train,), in the order of this pass.
        prints: hashes of the rows, uint64 (train,), if wanted.

    Raises:
        InputError: batches that cannot be gone through again, none, or ids as in
            :meth:`.estimator.GramDriver.fit`.
    """

    def __init__(
        self,
        train: Iterable[Any],
        batches: UserBatches,
        models: Sequence[Model],
        *,
        hashed: bool = False,
    ) -> None:
        if isinstance(train, Iterator):
            raise InputError(
                "landmarks need several passes over the training batches, and these can be gone through "
                "once: give a list or a data loader"
            )
        self._train, self._batches = train, batches
        given: list[Tensor | None] = []
        sizes: list[int] = []
        self._contents: list[int] = []
        prints: list[NDArray[np.uint64]] = []
        for batch in batches.adapted(train, Numbers.DATA):
            if not sizes:
                measure(models, batch)
            given.append(None if batch.ids is None else check_ids(batch.ids).cpu())
            if batch.ids is None:
                self._contents.append(_checksum(batch))
            if hashed:
                prints.append(fingerprints(batch))
            sizes.append(len(batch))
        if not sizes:
            raise InputError("no training batches given")
        self.ids = train_ids_of(given, sizes)
        self.prints = np.concatenate(prints) if prints else np.empty(0, np.uint64)

    def __len__(self) -> int:
        return len(self.ids)

    def again(self, progress: Progress | None) -> Iterator[tuple[Batch, Tensor]]:
        """The training batches, and the positions of their rows.

        Raises:
            InputError: they have other instances than in the first pass.
        """
        ordered, order = self.ids.sort()
        seen, contents = 0, iter(self._contents)
        found = torch.zeros(len(self.ids), dtype=torch.bool)
        given = self._batches.checked(self._train, Numbers.DATA)
        for batch in given if progress is None else progress.follow(self._train, given):
            ids = torch.arange(seen, seen + len(batch)) if batch.ids is None else batch.ids.cpu()
            place = torch.searchsorted(ordered, ids).clamp_max(len(order) - 1)
            positions = order[place]
            seen += len(batch)
            same = torch.equal(self.ids[positions], ids) and not bool(found[positions].any())
            if batch.ids is None:
                same = same and next(contents, None) == _checksum(batch)
            if not same:
                raise _changed()
            found[positions] = True
            # Labels are drawn by ids.
            yield replace(batch, ids=ids), positions
        if seen != len(self.ids):
            raise _changed()


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


def taken(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch, int64 (some,)."""
    size = len(batch)

    def cut(value: Tensor) -> Tensor:
        if not value.dim() or len(value) != size:
            return value
        return value[rows.to(value.device)]

    return batch.mapped(cut)
