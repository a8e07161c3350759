"""Bindings of ids to a network's sites, and the threads in which they are open."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from turnover.dropout.modules import paused_elsewhere
from turnover.dropout.torch_private import in_backward, next_node, running_node
from turnover.errors import BindingError

_REMEMBERED_BINDINGS = 256


@dataclass(eq=False)
class Binding:
    """The ids of a batch, and what the sites do with them. Neither ids nor probes: the mean network."""

    ids: Tensor | None = None
    hidden: bool | Tensor = False
    broadcast: bool = False
    """One row may become as many rows as there are ids (exact influence shares work this way)."""
    site_ids: dict[str, Tensor] = field(default_factory=dict)
    """Ids of single sites, in place of ``ids``."""
    every_row: bool = False
    """The single id applies to every row of batches of any size."""
    sites: frozenset[str] | None = None
    """Masked or probed sites; at others the network runs whole. ``None``: all."""
    probes: dict[str, list[Tensor]] | None = None
    """If given, sites multiply by ones that require a gradient, and append them here: one for each run of
    the site's module, since a model may cut off the gradient of a single run."""
    moved: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    """With ``probes``, masks of single runs in place of ones."""
    masks: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[tuple[str, torch.dtype], Tensor] | None = None
    """If given, rows are the ids exposed and, after them, hidden; caches scaled masks for the next forward
    under the same binding."""
    split: str | None = None
    """With ``factors``, the site whose output holds the exposed rows alone."""
    whole: Tensor | None = None
    """Output of that site before the mask."""
    exposed: Tensor | None = None
    """Output of that site after the mask."""
    first_node: int = 0
    last_node: int | None = None
    thread: weakref.ref[Any] | None = None
    """The thread that opened it."""
    outer: tuple[Binding | None, tuple[str, ...]] = (None, ())
    """The binding and the training families that were current before it."""

    @property
    def by_row(self) -> bool:
        """Whether the mask of a row depends on the row's position in the batch."""
        return (self.ids is not None and not self.every_row) or self.probes is not None

    def covers(self, site: str) -> bool:
        """Whether a site is masked or probed."""
        return self.sites is None or site in self.sites

    def probe(self, site: str, ones: Tensor) -> Tensor:
        """The mask of a site's run, with ``probes``."""
        assert self.probes is not None
        if not torch.compiler.is_compiling() and in_backward():
            return ones.requires_grad_()  # checkpointing repeats the forward for its saved tensors
        runs = self.probes.setdefault(site, [])
        moved = self.moved.get((site, len(runs)))
        runs.append(ones.requires_grad_() if moved is None else ones * moved.to(ones.device))
        return runs[-1]


class _ThreadKey:
    """Identifies a running thread; thread numbers are used again."""


class _ThreadState(threading.local):
    """State of this thread, over all networks."""

    def __init__(self) -> None:
        self._thread = _ThreadKey()
        self.thread = weakref.ref(self._thread)
        self.training: tuple[str, ...] = ()
        """Families of the networks that are bound to the ids of a training batch."""


_THIS_THREAD = _ThreadState()


class _Current(threading.local):
    def __init__(self) -> None:
        self.binding: Binding | None = None


class Contexts:
    """The open bindings of one network, each in the thread that opened it.

    A deep or pickled copy has none open, and belongs to the same family.
    """

    def __init__(self, family: str | None = None) -> None:
        self.family = family or uuid4().hex
        self.copied = family is not None
        self.used = False
        self.current = _Current()
        self.open: list[Binding] = []
        """Of all threads."""
        self.past: deque[Binding] = deque(maxlen=_REMEMBERED_BINDINGS)
        self._holder: weakref.ref[_ThreadKey] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.family,)

    def enter(self, binding: Binding, *, training: bool) -> None:
        """Open a binding in this thread."""
        binding.thread, binding.first_node = _THIS_THREAD.thread, next_node()
        binding.outer = self.current.binding, _THIS_THREAD.training
        others = tuple(family for family in _THIS_THREAD.training if family != self.family)
        bound = training and binding.ids is not None
        _THIS_THREAD.training = (*others, self.family) if bound else others
        self.used = True
        self.open.append(binding)
        self.current.binding = binding

    def leave(self, binding: Binding) -> None:
        """Close a binding and restore the one before."""
        self.open.remove(binding)
        if binding.thread is not _THIS_THREAD.thread:
            raise BindingError(
                "a context of a network was entered in one thread and left in another, and stays open in "
                "the first: enter and leave it in the thread that runs the model"
            )
        (self.current.binding, _THIS_THREAD.training), binding.outer = binding.outer, (None, ())
        binding.last_node = next_node()
        # Probes are as large as a batch of masks, and their backward runs within the context.
        if binding.probes is None and binding.last_node > binding.first_node:
            binding.masks.clear()  # a recomputation makes them again from the ids
            self.past.append(binding)

    def original_is_bound(self) -> bool:
        """Whether this thread has ids of a training batch bound to the original of this copy."""
        return self.family in _THIS_THREAD.training and self.current.binding is None

    def is_held_elsewhere(self) -> bool:
        """Whether another thread has the network to itself."""
        return self._holder is not None and self._holder is not _THIS_THREAD.thread

    @contextmanager
    def held(self) -> Iterator[None]:
        """Refuse runs of the network in other threads."""
        self._holder = _THIS_THREAD.thread
        try:
            yield
        finally:
            self._holder = None

    def of_replica(self, site: str) -> Binding:
        """The binding for a replica of ``nn.DataParallel``, which runs unknown rows in its own thread."""
        bindings = list(self.open)
        if len(bindings) > 1 or bindings[0].by_row:
            raise BindingError(
                f"site {site!r} ran in a replica of nn.DataParallel, which does not say which rows of "
                f"the batch it has: use DistributedDataParallel, or one device"
            )
        return bindings[0]

    def of_recomputation(self, site: str, *, training: bool) -> Binding | None:
        """The binding of the forward that gradient checkpointing repeats in ``backward()``.

        The context has usually ended by then, and several forwards may share one backward. Autograd
        numbers its nodes in order of creation, so the number of the running node identifies the context.
        """
        candidates = [*self.past, *self.open]
        if candidates and not torch.is_grad_enabled():
            # The inner checkpoint's node is made now, in backward(), and belongs to no context.
            raise BindingError(
                f"site {site!r} is inside nested gradient checkpoints, which lose the ids of its forward: "
                f"pass use_reentrant=False to torch.utils.checkpoint"
            )
        binding = _made_in(candidates)
        if binding is None and training:
            raise BindingError(
                f"site {site!r} is recomputed in backward() (gradient checkpointing), and the ids of "
                f"its forward are no longer known: call backward() inside the `with` block"
            )
        return binding


class Context:
    """Opens a binding for the body of a ``with``, in its thread; contexts nest."""

    def __init__(self, contexts: Contexts, binding: Binding, model: nn.Module) -> None:
        self._contexts = contexts
        self._binding = binding
        self._model = model
        self._opened: list[Binding] = []

    def __enter__(self) -> None:
        model = self._model
        if self._binding.by_row and torch.is_grad_enabled() and paused_elsewhere(model):
            raise BindingError(
                "another thread scores with this network and keeps its model in eval mode meanwhile: "
                "train before or after it"
            )
        # Each entry has its own range of autograd nodes.
        binding = replace(self._binding, masks=dict(self._binding.masks), last_node=None)
        self._contexts.enter(binding, training=model.training)
        self._opened.append(binding)

    def __exit__(self, *exception: object) -> None:
        mine = [
            i for i, binding in enumerate(self._opened) if binding.thread is _THIS_THREAD.thread
        ]
        self._contexts.leave(self._opened.pop(mine[-1] if mine else -1))


def _made_in(candidates: Sequence[Binding]) -> Binding | None:
    """The binding under which the running autograd node was made, if known.

    Numbers of nodes begin at 0 in each thread. ``backward()`` runs in the thread that calls it, and on
    other devices than the CPU in autograd's own threads.
    """
    number = running_node()
    if number is None:
        return None
    mine = [binding for binding in candidates if binding.thread is _THIS_THREAD.thread]
    found = [
        binding
        for binding in sorted(mine or candidates, key=lambda b: b.first_node, reverse=True)
        if binding.first_node <= number
        and (binding.last_node is None or number < binding.last_node)
    ]
    if len({id(binding.thread) for binding in found}) > 1:
        raise BindingError(
            "gradient checkpointing repeats a forward in backward(), and the forward may belong to either "
            "of two threads: train one network in one thread, or without checkpointing"
        )
    return found[0] if found else None
