"""Objects with large tensors on the way to Ray tasks, and back."""

from __future__ import annotations

import io
import pickle
import socket
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray import cloudpickle
from torch import Tensor, nn

from turnover.errors import InputError
from turnover.parallel.ray import tensor_of


class _Array(NamedTuple):
    """The bytes of a tensor, and how it is made of them."""

    raw: np.ndarray[Any, Any]
    dtype: torch.dtype
    shape: torch.Size
    is_parameter: bool
    requires_grad: bool
    on_gpu: bool

    def tensor(self) -> Tensor:
        """The tensor, on the card of this process if it was on one."""
        values = tensor_of(self.raw).view(self.dtype).reshape(self.shape)
        values = values.to("cuda") if self.on_gpu else values
        if self.is_parameter:
            return nn.Parameter(values, requires_grad=self.requires_grad)
        return values.requires_grad_(self.requires_grad)


Packed = tuple[bytes, list[Any]]
"""A pickle, and what it refers to: arrays, and references to further objects."""


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
    """Replaces parameters by arrays, which all workers of a node read from one memory.

    Buffers are copied: a forward may write into them. On a GPU every tensor is replaced: the card of a worker
    has another number.
    """

    def __init__(self, file: io.BytesIO, *, constant: bool) -> None:
        super().__init__(file)
        self.found: list[Any] = []
        self._constant = constant
        self._seen: dict[int, int] = {}
        self._held: list[Any] = []  # or another object could get the same id

    def persistent_id(self, value: Any) -> int | None:
        """Number of what replaces an object."""
        number = self._seen.get(id(value))
        if number is not None:
            return number
        replaced = value if isinstance(value, ray.ObjectRef) else self._array(value)
        if replaced is None:
            return None
        self._seen[id(value)] = len(self.found)
        self.found.append(replaced)
        self._held.append(value)
        return len(self.found) - 1

    def _array(self, value: Any) -> _Array | None:
        is_parameter = isinstance(value, nn.Parameter)
        on_gpu = isinstance(value, Tensor) and value.device.type == "cuda"
        if type(value) not in (nn.Parameter, Tensor) or value.layout != torch.strided:
            return None
        if not (is_parameter or on_gpu or self._constant):
            return None
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _Array(raw, value.dtype, value.shape, is_parameter, value.requires_grad, on_gpu)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, found: list[Any]) -> None:
        super().__init__(file)
        self._found = found

    def persistent_load(self, pid: int) -> Any:
        """The object of a number."""
        return self._found[pid]


def packed(value: Any, *, constant: bool = False) -> Packed:
    """Pickle an object, and its parameters beside it.

    Args:
        value: may hold references to objects of Ray.
        constant: nobody writes into any of its tensors, and all of them go beside it.

    Raises:
        InputError: it does not pickle.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, constant=constant)
    try:
        pickler.dump(value)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise InputError(
            f'engine="ray" sends networks and objective to other processes, and they do not pickle: {error}'
        ) from error
    return file.getvalue(), pickler.found


def unpacked(sent: Packed) -> Any:
    """Make an object of what :func:`packed` returned.

    Raises:
        InputError: a module is missing in this process, a worker.
    """
    pickled, beside = sent
    found = [one.tensor() if isinstance(one, _Array) else one for one in beside]
    try:
        return _Unpickler(io.BytesIO(pickled), found).load()
    except ImportError as error:
        raise InputError(
            f"a Ray worker on {socket.gethostname()} cannot import {error.name}, required by the network or "
            f"the objective: install it there, or name its folder in PYTHONPATH before Ray starts"
        ) from error
