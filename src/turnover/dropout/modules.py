"""Modules of a model: eval mode for a while, one thread at a time, devices, and sharded weights."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from turnover.errors import InputError

_guard = threading.Lock()
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_paused: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Modules in training mode that a thread has set to eval mode, and that thread."""


def _after_fork() -> None:
    """Forget locks held by threads of the parent process: they do not exist in the child."""
    global _guard
    _guard = threading.Lock()
    _locks.clear()
    _paused.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def exclusive(*models: nn.Module) -> Iterator[None]:
    """Keep other threads out while the body changes modes, hooks or methods of these models' modules.

    Reentrant. Name all models of a computation in one call: locks are taken in a fixed order, so that
    two threads with the same models cannot deadlock.
    """
    modules = {module for model in models for module in model.modules()}
    with _guard:
        locks = [_locks.setdefault(one, threading.RLock()) for one in sorted(modules, key=id)]
    with ExitStack() as held:
        for lock in locks:
            held.enter_context(lock)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode in one thread at a time; restores the mode of every module."""
    with exclusive(model):
        modes = {module: module.training for module in model.modules()}
        paused = [module for module, mode in modes.items() if mode]
        _paused.update(dict.fromkeys(paused, threading.get_ident()))
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module in paused:
                _paused.pop(module, None)


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, for forwards that leave no trace: restores modes and generators."""
    with torch.no_grad(), evaluating(model), random_state_kept(device_of(model)):
        yield


def random_state_kept(device: torch.device) -> AbstractContextManager[None]:
    """Restore torch's generators, of the CPU and of a CUDA device, when the body ends."""
    # Without a list torch would initialize every card of the machine.
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def paused_elsewhere(model: nn.Module) -> bool:
    """Whether another thread keeps a model in eval mode that was in training mode before."""
    return _paused.get(model, threading.get_ident()) != threading.get_ident()


class _Mark(threading.local):
    """Marks a thread; torch.compile can trace it, unlike the number of a thread."""

    def __init__(self) -> None:
        self.here = False


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Restrict a hook to calls of the module in this thread."""
    mark = _Mark()
    mark.here = True

    def only(*given: Any) -> Any:
        return hook(*given) if mark.here else None

    return only


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside the wrapper of ``torch.compile``."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter; CPU without parameters."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device of a name, if this machine has it.

    Args:
        name: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` (the second card) or ``"mps"``; ``"auto"``: CUDA where it is
            available, else the CPU. MPS is taken by name alone: it has no float64, which calibration, means
            over targets and gram use.

    Raises:
        InputError: an unknown name, or a device that this machine does not have.

    Example::

        model.to(choose_device("auto"))
    """
    kind, _, number = str(name).partition(":")
    if kind == "auto" and not number:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdecimal()):
        raise InputError(f"unknown device {str(name)!r}: give auto, cpu, cuda, cuda:1 or mps")
    has = {"cpu": lambda: 1, "cuda": torch.cuda.device_count, "mps": torch.mps.device_count}
    count = has[kind]()
    if int(number or 0) >= count:
        there = f"{count} {kind} devices" if count else f"no {kind} device that torch can use"
        raise InputError(f"device {str(name)!r}: this machine has {there}; give another, or auto")
    return torch.device(str(name))


def is_sharded(value: Tensor) -> bool:
    """Whether the tensor is a DTensor, as FSDP2 makes of parameters."""
    # Not by its class, whose module takes seconds to import.
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """The tensor, gathered from all processes if it is sharded; every process must call it."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()


def weights_digest(weights: Mapping[str, Any], prefix: str = "") -> str:
    """Hash of names, types, shapes and bytes of the tensors in a state dict, and of a prefix.

    If the weights are sharded over processes, every process must call it.
    """
    digest = hashlib.blake2b(prefix.encode(), digest_size=16)
    for name, value in sorted(weights.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}".encode())
            flat = whole(value.detach()).contiguous().cpu().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
