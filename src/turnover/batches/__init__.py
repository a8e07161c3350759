"""How a user's batch becomes (model inputs, labels, ids)."""

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

_ALIGNED = 64
"""Bytes: where torch lets its own memory begin."""


@dataclass(frozen=True)
class Batch:
    """What the estimators need of a batch.

    Attributes:
        inputs: what the model is called with: a mapping is passed as keywords, a tuple as
            positional arguments, anything else as the one argument.
        labels: whatever the objective needs, rows first; int64 classes for the built-in ones.
        ids: int64 instance ids (rows,), where the batch has them.
        shared: names of inputs that all rows share (class prototypes, a graph), which are never cut
            into rows: the key of a mapping or the place in a tuple, and whatever lies deeper behind
            dots. A tensor that is not as long as the batch is shared without being named.
    """

    inputs: Any
    labels: Tensor | None = None
    ids: Tensor | None = None
    shared: tuple[str, ...] = ()

    def __len__(self) -> int:
        lengths = [len(value) for _, value in self.by_rows()]
        if not lengths:
            raise InputError(
                "the batch's model inputs hold no tensor that has rows, so it has none: pass adapter=, a "
                "function from your batch to turnover.Batch(inputs, labels, ids)"
            )
        if self.labels is not None and self.labels.dim() and len(self.labels) in lengths:
            return len(self.labels)
        return lengths[0]

    def by_rows(self) -> list[tuple[str, Tensor]]:
        """Model inputs that may have rows, with their names."""
        return [(n, v) for n, v in named(self.inputs) if v.dim() and not self.shares(n)]

    def shares(self, name: str) -> bool:
        """Whether an input, or what it lies in, is named as shared."""
        return any(name == one or name.startswith(f"{one}.") for one in self.shared)

    def rows(self, start: int, stop: int) -> Batch:
        """The rows from start to stop, of inputs, labels and ids.

        A tensor whose first axis is not as long as the batch is taken for shared, and kept whole.

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
        """This batch of one row, repeated to ``rows`` rows without copying."""

        def repeat(value: Tensor) -> Tensor:
            if value.dim() and len(value) == 1:
                return value.expand(rows, *value.shape[1:])
            return value

        return self.mapped(repeat)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; ids stay where they are."""

        def move(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=True)

        labels = None if self.labels is None else move(self.labels)
        return replace(self, inputs=_map(self.inputs, move), labels=labels)

    def apart(self) -> Batch:
        """The batch with every tensor of the CPU in memory of its own.

        How a matrix product adds up may depend on where its operands begin, and a view keeps all
        that it is a view of.
        """
        return Batch(
            _map(self.inputs, _own),
            None if self.labels is None else _own(self.labels),
            None if self.ids is None else _own(self.ids),
            self.shared,
        )

    def call(self, model: nn.Module) -> Any:
        """The model's outputs on the inputs."""
        if isinstance(self.inputs, Mapping):
            return model(**self.inputs)
        if isinstance(self.inputs, tuple):
            return model(*self.inputs)
        return model(self.inputs)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with a function of everything but what is shared by name."""

        def of_input(name: str, value: Tensor) -> Tensor:
            return value if self.shared and self.shares(name) else function(value)

        return Batch(
            _map_named(self.inputs, of_input),
            None if self.labels is None else function(self.labels),
            None if self.ids is None else function(self.ids),
            self.shared,
        )


Adapter = Callable[[Any], Batch]
"""Turns a user's batch into a :class:`Batch`."""


class Identified(NamedTuple):
    """An item of a data set, or a batch of them, as it is without turn-over, and the ids beside it."""

    rows: Any
    ids: Any


class WithIds(Dataset[Identified]):
    """A data set whose items carry their ids: ``(item, id)``, collated to ``(batch, ids)``.

    Ids stay with the rows under any sampler, in any order, number of workers and number of processes.

    Args:
        dataset: a data set with rows (``__getitem__`` and ``__len__``).
        ids: int64 (rows,); ``None``: row numbers from 0. Rows of one id are a group.

    Raises:
        InputError: a data set without rows, or not one id >= 0 for each row.
        TypeError: ids that are not integers.
    """

    def __init__(self, dataset: Any, ids: Tensor | Sequence[int] | None = None) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise InputError(
                f"a data set of type {type(dataset).__name__} has no rows to number: let it give "
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
        """Items of a batch, fetched at once where the data set can."""
        items = zip(fetched(self.dataset, rows), self.ids[list(rows)].tolist(), strict=True)
        return [Identified(*item) for item in items]

    @staticmethod
    def collate(collate_fn: Callable[[list[Any]], Any]) -> Callable[[list[Identified]], Identified]:
        """A collate function of items with ids, from one of items without."""
        return partial(_collate, collate_fn)


def fetched(dataset: Any, rows: Sequence[int]) -> Any:
    """Rows of a data set: at once where it can, as a ``DataLoader`` would ask it."""
    at_once = getattr(dataset, "__getitems__", None)
    return at_once(rows) if at_once else [dataset[row] for row in rows]


def _collate(collate_fn: Callable[[list[Any]], Any], items: list[Identified]) -> Identified:
    return Identified(
        collate_fn([item.rows for item in items]), torch.tensor([i.ids for i in items])
    )


def as_batch(batch: Any, *, label_names: Sequence[str] = ("labels", "label")) -> Batch:
    """The default adapter.

    Takes a :class:`Batch` as it is; a batch of a :class:`WithIds`; a tuple or list ``(inputs,)``,
    ``(inputs, labels)`` or ``(inputs, labels, ids)``; a mapping with ``labels`` (or ``label``) and
    ``ids`` (or ``id``) beside the model's keywords, as Hugging Face collators make it.

    Args:
        batch: any of these.
        label_names: keys of a mapping that may hold the labels; the first one that is there does.

    Raises:
        InputError: another kind of batch, or labels that are no numbers: pass an ``adapter``.
        TypeError: ids that are not integers.
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Identified):
        return replace(as_batch(batch.rows, label_names=label_names), ids=check_ids(batch.ids))
    check_not_packed(batch)
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        labels = None
        for name in label_names:
            given = inputs.pop(name, None)
            labels = given if labels is None else labels
        ids = inputs.pop("ids", inputs.pop("id", None))
        return Batch(inputs, _as_labels(labels), None if ids is None else check_ids(ids))
    if isinstance(batch, tuple | list) and 1 <= len(batch) <= 3 and not _are_rows(batch):
        inputs, labels, ids = (*batch, None, None)[:3]
        return Batch(inputs, _as_labels(labels), None if ids is None else check_ids(ids))
    if isinstance(batch, Tensor):
        return Batch(batch)
    raise InputError(
        f"a batch of type {_described(batch)} is not understood: pass adapter=, a function from "
        f"your batch to turnover.Batch(inputs, labels, ids)"
    )


def check_not_packed(inputs: Any) -> None:
    """Refuse sequences that are packed one after another, in any nest of inputs.

    Raises:
        InputError: there is one.
    """
    if isinstance(inputs, PackedSequence):
        raise InputError(
            "a PackedSequence is not laid out by rows: pad it (torch.nn.utils.rnn.pad_packed_sequence), "
            "and let the model pack it again"
        )
    if isinstance(inputs, Mapping | tuple | list):
        for one in inputs.values() if isinstance(inputs, Mapping) else inputs:
            check_not_packed(one)


def _are_rows(batch: Sequence[Any]) -> bool:
    """Whether a list holds one mapping for each row, which nothing collated."""
    return len(batch) > 1 and all(isinstance(one, Mapping) for one in batch)


def _described(batch: Any) -> str:
    name = type(batch).__name__
    if not isinstance(batch, tuple | list):
        return name
    kinds = ", ".join(dict.fromkeys(type(one).__name__ for one in batch))
    return f"{name} of {len(batch)} items ({kinds})"


def shapes(inputs: Any) -> tuple[tuple[int, ...], ...]:
    """Shapes of the tensors in a batch's model inputs, in their order."""
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
    """The tensors in a batch's model inputs, or in any nest of them, in their order."""
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    _map(value, collect)
    return found


def _own(value: Tensor) -> Tensor:
    if value.device.type != "cpu" or value.layout != torch.strided:
        return value
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    if whole and value.is_contiguous() and value.data_ptr() % _ALIGNED == 0:
        return value
    return value.clone(memory_format=torch.contiguous_format)


def named(value: Any) -> list[tuple[str, Tensor]]:
    """The tensors in a batch's model inputs, in their order, with their names."""
    found: list[tuple[str, Tensor]] = []

    def collect(name: str, tensor: Tensor) -> Tensor:
        found.append((name, tensor))
        return tensor

    _map_named(value, collect)
    return found


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return _map_named(value, lambda _, tensor: function(tensor))


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
