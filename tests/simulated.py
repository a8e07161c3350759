"""A second device for tests without one: its tensors say ``card:0``, and lie in the CPU's memory.

Operations compute real numbers, and refuse tensors of two devices as CUDA does. What is registered with torch
stays for the whole process, so tests use it in processes of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

_aten = torch.ops.aten
_BETWEEN = {_aten._to_copy.default, _aten.copy_.default}
_BY_INDEX = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default}
"""Take indexes on the CPU."""


class OnCard(torch.Tensor):
    """A tensor of the simulated device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnCard:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("card:0"),
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        return f"OnCard({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Makes tensors that are asked for on the card."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Module:
    """What torch looks for in ``torch.card``."""

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def get_rng_state(self, device=None):
        return None

    def set_rng_state(self, state, device=None):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def _run(func, args, kwargs):
    found = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    on_card = any(isinstance(one, OnCard) for one in found)
    others = [one for one in found if not isinstance(one, OnCard) and one.dim()]
    if on_card and others and func not in _BETWEEN | _BY_INDEX:
        shapes = [tuple(one.shape) for one in others]
        raise RuntimeError(f"Expected all tensors on one device: {func}, of the CPU {shapes}")
    kwargs = dict(kwargs)
    if kwargs.get("device") is not None:
        asked = torch.device(kwargs["device"])
        on_card = asked.type == "card"
        kwargs["device"] = torch.device("cpu") if on_card else asked
    given = pytree.tree_map_only(OnCard, lambda one: one.inner, (tuple(args), kwargs))
    result = func(*given[0], **given[1])
    if func is _aten.copy_.default:
        return args[0]
    if not on_card:
        return result
    wrapped = pytree.tree_map_only(Tensor, OnCard, result)
    if func in _BETWEEN:
        return wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def simulate() -> TorchDispatchMode:
    """Register the device, and return the mode under which all is to run."""
    backend_registration._setup_privateuseone_for_python_backend("card", _Module())
    return _Mode()
