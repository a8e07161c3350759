"""Eval mode for a while, and one thread at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_guard = threading.Lock()
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_paused: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Modules that were in training mode when a thread set them to eval mode, and that thread."""


def _after_fork() -> None:
    """Forget locks that threads of the parent process hold: they do not exist in the child."""
    global _guard
    _guard = threading.Lock()
    _locks.clear()
    _paused.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def exclusive(*models: nn.Module) -> Iterator[None]:
    """Wait until no other thread is in here with a model that shares a module with these.

    Scoring sets modes and puts hooks and methods into modules, which two threads must not do at once.
    Reentrant. Name all models of one computation at once: locks are taken in one order, so that two
    threads with the same models do not wait for each other.
    """
    modules = {module for model in models for module in model.modules()}
    with _guard:
        locks = [_locks.setdefault(one, threading.RLock()) for one in sorted(modules, key=id)]
    held = []
    try:
        for lock in locks:
            lock.acquire()
            held.append(lock)
        yield
    finally:
        for lock in reversed(held):
            lock.release()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, in one thread at a time; every module's own mode is put back after."""
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


def paused_elsewhere(model: nn.Module) -> bool:
    """Whether another thread keeps a model in eval mode that was in training mode before."""
    return _paused.get(model, threading.get_ident()) != threading.get_ident()


class _Mark(threading.local):
    """What torch.compile can trace, unlike the number of a thread."""

    def __init__(self) -> None:
        self.here = False


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that leaves the module's calls in other threads alone."""
    mark = _Mark()
    mark.here = True

    def only(*given: Any) -> Any:
        return hook(*given) if mark.here else None

    return only


def device_of(model: nn.Module) -> torch.device:
    """Device of the model's first parameter (CPU where it has none)."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def is_sharded(value: Tensor) -> bool:
    """Whether a process holds a part of the tensor alone: a DTensor, as FSDP2 makes of parameters."""
    # Not by its class, whose module takes seconds to import.
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """The tensor, gathered from all processes where it is sharded; every process must ask for it."""
    gather = getattr(value, "full_tensor", None)
    return value if gather is None else gather()
