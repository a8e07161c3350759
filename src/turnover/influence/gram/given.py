"""Checks of what gram is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turnover.errors import InputError
from turnover.ids import repeated
from turnover.influence.protocol import Wanted


def check_wanted(wanted: Wanted) -> None:
    """Refuse a store, and other processes."""
    check_memory(wanted)
    if wanted.engine != "process":
        raise InputError(
            f"engine={wanted.engine!r} does not compute gram of all pairs: take "
            f"turnover.Gram(landmarks=...), or leave engine= out"
        )


def check_memory(wanted: Wanted) -> None:
    """Refuse a store."""
    if wanted.out is not None or wanted.coordinates:
        raise InputError(
            "gram keeps its scores in memory: do not pass out= or coordinates=; top= keeps the strongest "
            "alone if memory is short"
        )


def train_ids_of(ids: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """Ids of all batches: int64 (rows,); row numbers where none are given."""
    known = [one for one in ids if one is not None]
    if not known:
        return torch.arange(sum(sizes))
    if len(known) < len(ids):
        raise InputError(
            f"{len(ids) - len(known)} of {len(ids)} training batches have no ids: give ids with all of "
            f"them, or with none, where row numbers are the ids"
        )
    joined = torch.cat(known)
    twice = repeated(joined)
    if twice:
        raise InputError(
            f"training ids are given twice: {twice[:5]}; gram fits every instance once, under an id of its "
            f"own"
        )
    return joined
