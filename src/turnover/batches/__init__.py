"""Batches: a user's batch as model inputs, labels and ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import Dataset

from turnover.errors import InputError
from turnover.ids import check_ids, check_training_ids

_ALIGNMENT = 64
"""Bytes, of the memory that torch allocates."""


@dataclass(frozen=True)
class Batch:
    """A batch, as the estimators use it.

    Attributes:
        inputs: arguments of the model: a mapping is passed as keywords, a tuple as positional
            arguments, anything else as the single argument.
        labels: labels for the objective, rows first; int64 classes for the built-in objectives.
        ids: int64 instance ids (rows,), if known.
        shared: names of inputs that all rows share (class prototypes, a graph) and that are never cut
            into rows: the key in a mapping or the index in a tuple, with dots for deeper levels. A tensor
            that is not as long as the batch is shared without being named.
    """

    inputs: Any
    labels: Tensor | None = None
    ids: Tensor | None = None
    shared: tuple[str, ...] = ()

    def __len__(self) -> int:
        lengths = [len(value) for _, value in self.by_rows()]
        if not lengths:
            raise InputError(
                "no tensor in the batch's model inputs has rows: pass adapter=, a function from your batch "
                "to turnover.Batch(inputs, labels, ids)"
            )
        if self.labels is not None and self.labels.dim() and len(self.labels) in lengths:
            return len(self.labels)
        return lengths[0]

    def by_rows(self) -> list[tuple[str, Tensor]]:
        """Names and tensors of the model inputs that may have rows."""
        return [(n, v) for n, v in named(self.inputs) if v.dim() and not self.shares(n)]

    def shares(self, name: str) -> bool:
        """Whether an input, or the collection around it, is named as shared."""
        return any(name == one or name.startswith(f"{one}.") for one in self.shared)

    def rows(self, start: int, stop: int) -> Batch:
        """Rows ``start`` to ``stop`` of inputs, labels and ids.

        Tensors whose first axis is not as long as the batch are shared, and stay whole.

        Raises:
            InputError: a sparse or nested tensor that cannot be cut.
        """
        size = len(self)

        def cut(value: Tensor) -> Tensor:
            if not value.dim() or len(value) != size or (start, stop) == (0, size):
                return value
            try:
                return value[start:stop]
            except (RuntimeError, NotImplementedError) as error:
                raise InputError(
                    f"a tensor of layout {value.layout} cannot be cut into rows ({error}): pass "
                    f"adapter= that makes it dense or padded"
                ) from error

        return self.mapped(cut)

    def expanded(self, rows: int) -> Batch:
        """Repeat the row of a batch of one, without copying."""

        def repeat(value: Tensor) -> Tensor:
            if value.dim() and len(value) == 1:
                return value.expand(rows, *value.shape[1:])
            return value

        return self.mapped(repeat)

    def to(self, device: torch.device) -> Batch:
        """Move inputs and labels to a device; ids stay where they are."""
        without_ids = replace(self, ids=None)
        moved = without_ids.mapped(lambda v: v.to(device, non_blocking=True), shared=True)
        return replace(moved, ids=self.ids)

    def own_memory(self) -> Batch:
        """Give each CPU tensor memory of its own.

        Matrix products may add up in another order at other memory addresses, and a view keeps the
        whole tensor behind it.
        """
        return self.mapped(own_memory, shared=True)

    def call(self, model: nn.Module) -> Any:
        """Run the model on the inputs."""
        if isinstance(self.inputs, Mapping):
            return model(**self.inputs)
        if isinstance(self.inputs, tuple):
            return model(*self.inputs)
        return model(self.inputs)

    def mapped(self, function: Callable[[Tensor], Tensor], *, shared: bool = False) -> Batch:
        """Apply a function to all tensors, with or without those that are shared by name."""

        def of_input(name: str, value: Tensor) -> Tensor:
            return value if not shared and self.shares(name) else function(value)

        labels, ids = (None if one is None else function(one) for one in (self.labels, self.ids))
        return Batch(_map_named(self.inputs, of_input), labels, ids, self.shared)


Adapter = Callable[[Any], Batch]
"""Turns a user's batch into a :class:`Batch`."""


class Identified(NamedTuple):
    """An item of a data set, or a batch, with its ids beside it."""

    rows: Any
    ids: Any


class WithIds(Dataset[Identified]):
    """A data set that adds an id to each item: ``(item, id)``, collated to ``(batch, ids)``.

    Ids stay with their rows under any sampler, order, number of workers and number of processes.

    Args:
        dataset: a data set with rows (``__getitem__`` and ``__len__``).
        ids: int64 (rows,); ``None``: row numbers from 0. Rows with the same id form a group.

    Raises:
        InputError: a data set without rows, or ids that are not one id >= 0 for each row.
        TypeError: ids that are not integers.
    """

    def __init__(self, dataset: Any, ids: Tensor | Sequence[int] | None = None) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise InputError(
                f"a data set of type {type(dataset).__name__} has no rows to number: let it return "
                f"(inputs, labels, id) itself"
            )
        rows = len(dataset)
        self.dataset = dataset
        self.ids = torch.arange(rows) if ids is None else check_training_ids(ids)
        if len(self.ids) != rows:
            raise InputError(f"{len(self.ids)} ids for {rows} rows of the data set: give one each")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> Identified:
        return Identified(self.dataset[row], int(self.ids[row]))

    def __getitems__(self, rows: Sequence[int]) -> list[Identified]:
        """The items of a batch, in one call if the data set allows it."""
        items = zip(fetched(self.dataset, rows), self.ids[list(rows)].tolist(), strict=True)
        return [Identified(*item) for item in items]

    @staticmethod
    def collate(collate_fn: Callable[[list[Any]], Any]) -> Callable[[list[Identified]], Identified]:
        """Extend a collate function to items with ids."""
        return partial(_collate, collate_fn)


def fetched(dataset: Any, rows: Sequence[int]) -> Any:
    """Rows of a data set, fetched as a ``DataLoader`` does: in one call if the data set allows it."""
    fetch = getattr(dataset, "__getitems__", None)
    return fetch(rows) if fetch else [dataset[row] for row in rows]


def _collate(collate_fn: Callable[[list[Any]], Any], items: list[Identified]) -> Identified:
    return Identified(
        collate_fn([item.rows for item in items]), torch.tensor([i.ids for i in items])
    )


def as_batch(batch: Any, *, label_names: Sequence[str] = ("labels", "label")) -> Batch:
    """Convert common kinds of batches: the default adapter.

    These are a :class:`Batch`; a batch of :class:`WithIds`; a tensor; a tuple or list ``(inputs,)``,
    ``(inputs, labels)`` or ``(inputs, labels, ids)``; a mapping with ``labels`` (or ``label``) and
    ``ids`` (or ``id``) beside the model's keywords, as from Hugging Face collators.

    Args:
        batch: any of these.
        label_names: keys of a mapping that may hold the labels, in order of preference.

    Raises:
        InputError: another kind of batch, or labels that are not numbers: pass an ``adapter``.
        TypeError: ids that are not integers.
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Identified):
        return replace(as_batch(batch.rows, label_names=label_names), ids=check_ids(batch.ids))
    check_not_packed(batch)
    if isinstance(batch, Mapping):
        inputs: Any = dict(batch)
        found = [inputs.pop(name, None) for name in label_names]
        labels = next((one for one in found if one is not None), None)
        ids = inputs.pop("ids", inputs.pop("id", None))
    elif isinstance(batch, Tensor):
        return Batch(batch)
    elif isinstance(batch, tuple | list) and 1 <= len(batch) <= 3 and not _are_rows(batch):
        inputs, labels, ids = (*batch, None, None)[:3]
    else:
        raise InputError(
            f"cannot convert a batch of type {_describe(batch)}: pass adapter=, a function from your batch "
            f"to turnover.Batch(inputs, labels, ids)"
        )
    return Batch(inputs, _as_labels(labels), None if ids is None else check_ids(ids))


def check_not_packed(inputs: Any) -> None:
    """Refuse packed sequences, in inputs nested to any depth."""
    if isinstance(inputs, PackedSequence):
        raise InputError(
            "a PackedSequence is not arranged by rows: pad it (torch.nn.utils.rnn.pad_packed_sequence), "
            "and let the model pack it again"
        )
    if isinstance(inputs, Mapping | tuple | list):
        for one in inputs.values() if isinstance(inputs, Mapping) else inputs:
            check_not_packed(one)


def _are_rows(batch: Sequence[Any]) -> bool:
    """Whether a batch is a list of rows (mappings) that are not collated."""
    return len(batch) > 1 and all(isinstance(one, Mapping) for one in batch)


def _describe(batch: Any) -> str:
    name = type(batch).__name__
    if not isinstance(batch, tuple | list):
        return name
    kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in batch))
    return f"{name} of {len(batch)} items ({kinds})"


def shapes(inputs: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensors in a batch's model inputs, in order."""
    return tuple(tuple(value.shape) for value in tensors(inputs))


def _as_labels(labels: Any) -> Tensor | None:
    if labels is None or isinstance(labels, Tensor):
        return labels
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"labels of type {type(labels).__name__} do not make a tensor ({error}): encode them as "
            f"integer classes, or pass adapter="
        ) from error


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a batch's model inputs, nested to any depth, in order."""
    return [tensor for _, tensor in named(value)]


def own_memory(value: Tensor) -> Tensor:
    """Give a CPU tensor aligned memory of its own, with the rows first; one that has some stays."""
    if value.device.type != "cpu" or value.layout != torch.strided:
        return value
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    if whole and value.is_contiguous() and value.data_ptr() % _ALIGNMENT == 0:
        return value
    return value.clone(memory_format=torch.contiguous_format)


def named(value: Any) -> list[tuple[str, Tensor]]:
    """Names and tensors of a batch's model inputs, in order."""
    found: list[tuple[str, Tensor]] = []

    def collect(name: str, tensor: Tensor) -> Tensor:
        found.append((name, tensor))
        return tensor

    _map_named(value, collect)
    return found


def _map_named(value: Any, function: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    if isinstance(value, Tensor):
        return function(path, value)
    before = f"{path}." if path else ""
    if isinstance(value, Mapping):
        return {k: _map_named(v, function, f"{before}{k}") for k, v in value.items()}
    if isinstance(value, tuple | list):
        items = [_map_named(v, function, f"{before}{i}") for i, v in enumerate(value)]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
