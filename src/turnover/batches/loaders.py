"""What a data loader says of its rows: how many batches, in which order, and which rows it leaves out."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from turnover.errors import InputError

_SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_WITHIN = (
    "dataloader",
    "_dataloader",
    "base_dataloader",
    "loader",
    "_loader",
    "iterable",
)
"""Where wrappers (Accelerate, Lightning Fabric, XLA, timm, tqdm) keep the loader that they wrap."""
_DEEPEST = 8
_MOST_ROWS = 10**7
"""Of a data set that does not know its length: samplers may go on for ever."""
_FIX = (
    "give batches with their ids (turnover.WithIds(dataset) in the loader adds them), or set "
    "shuffle=False and leave the sampler out"
)


def length_of(batches: Any) -> int | None:
    """How many batches there are, where that is known beforehand.

    A ``DataLoader`` has a length by its class even where its data set has none.
    """
    try:
        return len(batches)
    except Exception:  # noqa: BLE001 - whatever a foreign object says when it does not know
        return None


def loader_of(batches: Any) -> DataLoader[Any] | None:
    """The ``DataLoader`` of a map-style data set that gives the batches, also within wrappers."""
    for _ in range(_DEEPEST):
        if isinstance(batches, DataLoader):
            return None if isinstance(batches.dataset, IterableDataset) else batches
        held = vars(batches) if hasattr(batches, "__dict__") else {}
        loaders = [one for one in held.values() if isinstance(one, DataLoader)]
        within = [held[name] for name in _WITHIN if held.get(name) is not None]
        if len(loaders) == 1:  # under whatever name
            within.extend(loaders)
        batches = next(iter(within), None)
        if batches is None:
            return None
    return None


def places_of(loader: DataLoader[Any]) -> list[Any] | None:
    """Places in the data set of a loader's rows; ``None`` where they change from pass to pass."""
    if _keeps_order(loader):
        return list(chain.from_iterable(_indices(loader)))
    with _restored(loader):
        first, second = (_flat(loader) for _ in range(2))
    return first if first == second else None


class Numbers(Enum):
    """What the numbers of rows without ids are used for."""

    UNUSED = "nothing"
    ROWS = "rows of the loader"
    """They must come in one order only."""
    DATA = "rows of the data set"
    """They must come from its first row on."""


def check_numbered(batches: Iterable[Any], numbers: Numbers) -> None:
    """Refuse rows without ids that nobody could tell apart by their numbers.

    Args:
        batches: what was given; an iterator has no loader to ask, and is taken as it comes.
        numbers: what they are used for.

    Raises:
        InputError: a loader that shuffles, or another order.
    """
    loader = None if numbers is Numbers.UNUSED else loader_of(batches)
    if loader is None or length_of(loader.dataset) in (0, 1):
        return
    shuffling = _shuffler(loader)
    if shuffling is not None:
        raise InputError(
            f"the data loader shuffles ({shuffling}) and its batches have no ids, so which row is which "
            f"is not known: {_FIX}"
        )
    if _keeps_order(loader):
        return
    places = places_of(loader)
    if places is None or (numbers is Numbers.DATA and places != list(range(len(places)))):
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        order = "from the first row on" if numbers is Numbers.DATA else "in one order only"
        raise InputError(
            f"the data loader's {type(sampler).__name__} does not go through the data set {order}, and "
            f"its batches have no ids, so which row is which is not known: {_FIX}"
        )


def warn_left_out(batches: Iterable[Any]) -> None:
    """Say which rows ``drop_last`` leaves out."""
    loader = loader_of(batches)
    sampler: Any = None if loader is None else loader.batch_sampler
    if sampler is None or getattr(sampler, "drop_last", False) is not True:
        return
    rows = length_of(getattr(sampler, "sampler", None))
    size = getattr(sampler, "batch_size", None)
    if rows is not None and isinstance(size, int) and size > 0 and rows % size:
        warnings.warn(
            f"turnover: drop_last=True leaves {rows % size} of {rows} rows out of the data loader: set "
            f"drop_last=False to include them",
            UserWarning,
            stacklevel=2,
        )


def _shuffler(loader: DataLoader[Any]) -> str | None:
    """Name of what brings the rows in another order each time, if it can be told without asking it."""
    if loader.num_workers > 1 and getattr(loader, "in_order", True) is False:
        return "in_order=False"
    for one in _samplers(loader):
        if isinstance(one, _SHUFFLING) or getattr(one, "shuffle", False) is True:
            return type(one).__name__
    return None


def _samplers(loader: DataLoader[Any]) -> Iterator[Any]:
    one: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    for _ in range(_DEEPEST):
        yield one
        one = getattr(one, "batch_sampler", None) or getattr(one, "sampler", None)
        if one is None:
            return


def _keeps_order(loader: DataLoader[Any]) -> bool:
    """Whether the loader's own samplers go through the data set from its first row on."""
    if loader.batch_sampler is None:
        return type(loader.sampler) is SequentialSampler
    batches: Any = loader.batch_sampler
    return type(batches) is BatchSampler and type(batches.sampler) is SequentialSampler


def _indices(loader: DataLoader[Any]) -> Iterator[Any]:
    """Places in the data set, one batch after another."""
    if loader.batch_sampler is None:
        # What a sampler of whole batches gives is a list.
        return (one if isinstance(one, list | tuple) else [one] for one in loader.sampler)
    return iter(loader.batch_sampler)


def _flat(loader: DataLoader[Any]) -> list[Any] | None:
    """Places of one pass; ``None`` where it does not end or gives no places."""
    batches, rows = length_of(loader), length_of(loader.dataset)
    most = _MOST_ROWS if rows is None else 2 * rows + 1000
    try:
        given = _indices(loader) if batches is None else islice(_indices(loader), batches)
        places = [int(place) for place in islice(chain.from_iterable(given), most + 1)]
    except (TypeError, ValueError):
        return None
    return places if len(places) <= most else None


@contextmanager
def _restored(loader: DataLoader[Any]) -> Iterator[None]:
    """Samplers that draw leave every generator as it was."""
    holders = [loader, *_samplers(loader)]
    found = [getattr(one, "generator", None) for one in holders]
    generators = {id(one): one for one in found if isinstance(one, torch.Generator)}
    states = {key: one.get_state() for key, one in generators.items()}
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for key, one in generators.items():
            one.set_state(states[key])
