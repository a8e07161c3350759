"""Data loaders: their number of batches, the order of their rows, and the rows that they leave out."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
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
_WRAPPED = ("dataloader", "_dataloader", "base_dataloader", "loader", "_loader", "iterable")
"""Attributes in which Accelerate, Lightning Fabric, XLA, timm and tqdm keep the loader that they wrap."""
_DEEPEST = 8
_MOST_ROWS = 10**7
"""Of a data set without a length: samplers may be endless."""
_FIX = (
    "give batches with their ids (turnover.WithIds(dataset) in the loader adds them), or set "
    "shuffle=False and leave the sampler out"
)


def length_of(batches: Any) -> int | None:
    """The number of batches, if known before the first.

    The class ``DataLoader`` defines a length even where the data set has none.
    """
    try:
        return len(batches)
    except Exception:  # noqa: BLE001 - the user's data set may raise anything
        return None


def rows_of(batches: Any) -> int | None:
    """The number of rows of one of torch's own data loaders, if known without a pass."""
    sampler = batches.batch_sampler if isinstance(batches, DataLoader) else None
    if type(sampler) is not BatchSampler:
        return None
    rows = length_of(sampler.sampler)
    return None if rows is None else rows - (rows % sampler.batch_size) * sampler.drop_last


def loader_of(batches: Any) -> DataLoader[Any] | None:
    """The ``DataLoader`` of a map-style data set behind batches, inside any wrappers."""
    for _ in range(_DEEPEST):
        if isinstance(batches, DataLoader):
            return None if isinstance(batches.dataset, IterableDataset) else batches
        attributes = vars(batches) if hasattr(batches, "__dict__") else {}
        loaders = [one for one in attributes.values() if isinstance(one, DataLoader)]
        inner = [attributes[name] for name in _WRAPPED if attributes.get(name) is not None]
        if len(loaders) == 1:  # in an attribute of any name
            inner.extend(loaders)
        if not inner:
            return None
        batches = inner[0]
    return None


def places_of(loader: DataLoader[Any]) -> list[Any] | None:
    """Indices in the data set of a loader's rows; ``None`` if they change from pass to pass."""
    if _is_sequential(loader):
        return list(chain.from_iterable(_indices(loader)))
    with _restored(loader):
        first, second = (_one_pass(loader) for _ in range(2))
    return first if first == second else None


class Numbers(Enum):
    """How rows without ids are identified by their numbers."""

    UNUSED = auto()
    ROWS = auto()
    """In the loader's order, which must be the same in each pass."""
    DATA = auto()
    """In the data set's order, which must be the loader's."""


def check_numbered(batches: Iterable[Any], numbers: Numbers) -> None:
    """Refuse a loader of batches without ids whose rows cannot be identified by their numbers."""
    loader = None if numbers is Numbers.UNUSED else loader_of(batches)
    if loader is None or length_of(loader.dataset) in (0, 1):
        return
    shuffling = _shuffler(loader)
    if shuffling is not None:
        raise InputError(
            f"the data loader shuffles ({shuffling}) and its batches have no ids, so its rows cannot be "
            f"identified: {_FIX}"
        )
    if _is_sequential(loader):
        return
    places = places_of(loader)
    if places is None or (numbers is Numbers.DATA and places != list(range(len(places)))):
        sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        order = (
            "from the first row on" if numbers is Numbers.DATA else "in the same order each time"
        )
        raise InputError(
            f"the data loader's {type(sampler).__name__} does not go through the data set {order}, and "
            f"its batches have no ids, so its rows cannot be identified: {_FIX}"
        )


def warn_left_out(batches: Iterable[Any]) -> None:
    """Warn about rows that ``drop_last`` leaves out."""
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
    """Name of what shuffles the rows, if it can be seen without a pass."""
    if loader.num_workers > 1 and getattr(loader, "in_order", True) is False:
        return "in_order=False"
    for one in _samplers(loader):
        if isinstance(one, _SHUFFLING) or getattr(one, "shuffle", False) is True:
            return type(one).__name__
    return None


def _samplers(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's sampler and the samplers inside it."""
    one: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    for _ in range(_DEEPEST):
        yield one
        one = getattr(one, "batch_sampler", None) or getattr(one, "sampler", None)
        if one is None:
            return


def _is_sequential(loader: DataLoader[Any]) -> bool:
    """Whether torch's own samplers go through the data set in order."""
    if loader.batch_sampler is None:
        return type(loader.sampler) is SequentialSampler
    batches: Any = loader.batch_sampler
    return type(batches) is BatchSampler and type(batches.sampler) is SequentialSampler


def _indices(loader: DataLoader[Any]) -> Iterator[Any]:
    """Indices in the data set, by batch."""
    if loader.batch_sampler is None:  # the sampler may give whole batches, as lists
        return (one if isinstance(one, list | tuple) else [one] for one in loader.sampler)
    return iter(loader.batch_sampler)


def _one_pass(loader: DataLoader[Any]) -> list[Any] | None:
    """Indices of one pass; ``None`` if it does not end, or gives something else."""
    rows = length_of(loader.dataset)
    most = _MOST_ROWS if rows is None else 2 * rows + 1000
    try:
        batches = islice(_indices(loader), length_of(loader))
        places = [int(place) for place in islice(chain.from_iterable(batches), most + 1)]
    except (TypeError, ValueError):
        return None
    return places if len(places) <= most else None


@contextmanager
def _restored(loader: DataLoader[Any]) -> Iterator[None]:
    """Restore all random generators, which samplers may use."""
    owners = [loader, *_samplers(loader)]
    found = [getattr(one, "generator", None) for one in owners]
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
