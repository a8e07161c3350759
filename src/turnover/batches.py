"""How a user's batch becomes (model inputs, labels, ids)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from turnover.errors import InputError
from turnover.masks import check_ids


@dataclass(frozen=True)
class Batch:
    """What the estimators need of a batch.

    Attributes:
        inputs: what the model is called with: a mapping is passed as keywords, a tuple as
            positional arguments, anything else as the one argument.
        labels: whatever the objective needs, rows first; int64 classes for the built-in ones.
        ids: int64 instance ids (rows,), where the batch has them.
    """

    inputs: Any
    labels: Tensor | None = None
    ids: Tensor | None = None

    def __len__(self) -> int:
        for value in tensors(self.inputs):
            if value.dim():
                return len(value)
        raise InputError("the batch's model inputs hold no tensor, so it has no rows")

    def rows(self, start: int, stop: int) -> Batch:
        """The rows from start to stop, of inputs, labels and ids.

        A tensor whose first axis is not as long as the batch is taken for shared, and kept whole.
        """
        size = len(self)

        def cut(value: Tensor) -> Tensor:
            return value[start:stop] if value.dim() and len(value) == size else value

        return self._mapped(cut)

    def expanded(self, rows: int) -> Batch:
        """This batch of one row, repeated to ``rows`` rows without copying."""

        def repeat(value: Tensor) -> Tensor:
            if value.dim() and len(value) == 1:
                return value.expand(rows, *value.shape[1:])
            return value

        return self._mapped(repeat)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; ids stay where they are."""
        moved = self._mapped(lambda value: value.to(device, non_blocking=True))
        return replace(moved, ids=self.ids)

    def call(self, model: nn.Module) -> Any:
        """The model's outputs on the inputs."""
        if isinstance(self.inputs, Mapping):
            return model(**self.inputs)
        if isinstance(self.inputs, tuple):
            return model(*self.inputs)
        return model(self.inputs)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            _map(self.inputs, function),
            None if self.labels is None else function(self.labels),
            None if self.ids is None else function(self.ids),
        )


Adapter = Callable[[Any], Batch]
"""Turns a user's batch into a :class:`Batch`."""


def as_batch(batch: Any) -> Batch:
    """The default adapter.

    Takes a :class:`Batch` as it is; a tuple or list ``(inputs,)``, ``(inputs, labels)`` or
    ``(inputs, labels, ids)``; a mapping with ``labels`` (or ``label``) and ``ids`` (or ``id``) beside
    the model's keywords, as Hugging Face collators make it.

    Raises:
        InputError: another kind of batch, or labels that are no numbers: pass an ``adapter``.
        TypeError: ids that are not integers.
    """
    if isinstance(batch, Batch):
        return batch
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        labels = inputs.pop("labels", inputs.pop("label", None))
        ids = inputs.pop("ids", inputs.pop("id", None))
        return Batch(inputs, _as_labels(labels), None if ids is None else check_ids(ids))
    if isinstance(batch, tuple | list) and 1 <= len(batch) <= 3:
        inputs, labels, ids = (*batch, None, None)[:3]
        return Batch(inputs, _as_labels(labels), None if ids is None else check_ids(ids))
    if isinstance(batch, Tensor):
        return Batch(batch)
    raise InputError(
        f"a batch of type {type(batch).__name__} is not understood: pass adapter=, a function from "
        f"your batch to turnover.Batch(inputs, labels, ids)"
    )


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


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map(item, function) for key, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_map(item, function) for item in value]
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
