"""Bindings of ids to a network's sites, and which thread has which of them open."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from turnover.dropout.modules import paused_elsewhere
from turnover.errors import BindingError

_REMEMBERED_BINDINGS = 256


@dataclass(eq=False)
class Binding:
    """The ids of a batch, and what the sites do with them."""

    ids: Tensor | None = None
    hidden: bool | Tensor = False
    broadcast: bool = False
    """One row may become as many rows as there are ids (how exact influence shares work)."""
    of_site: dict[str, Tensor] = field(default_factory=dict)
    """Ids of single sites, in place of ``ids``."""
    every_row: bool = False
    """The one id is that of every row, however many there are."""
    sites: frozenset[str] | None = None
    """The sites that are masked or probed; at others the network runs whole. ``None``: all."""
    probes: dict[str, list[Tensor]] | None = None
    """If given, sites multiply by ones that require a gradient, and leave them here: one for each time that
    the site's module runs, since a model may cut off the gradient of one of them."""
    moved: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    """With ``probes``, what single runs of sites multiply by in place of ones."""
    masks: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[tuple[str, torch.dtype], Tensor] | None = None
    """If given, rows are the ids exposed and, behind them, hidden; and masks as scaled numbers are kept
    here, for the next forward under the same binding."""
    split: str | None = None
    """With ``factors``, the site that lets only the exposed rows pass."""
    whole: Tensor | None = None
    """What came to that site, before the mask."""
    exposed: Tensor | None = None
    """What that site let pass."""
    first_node: int = 0
    last_node: int | None = None
    thread: weakref.ref[Any] | None = None
    """The thread that opened it."""

    @property
    def of_rows(self) -> bool:
        """Whether what a row is multiplied by depends on its place in the batch."""
        return (self.ids is not None and not self.every_row) or self.probes is not None

    def probe(self, site: str, ones: Tensor) -> Tensor:
        """What a site multiplies by, with ``probes``."""
        assert self.probes is not None
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return ones.requires_grad_()  # repeated in backward(), for the sake of what was saved
        runs = self.probes.setdefault(site, [])
        moved = self.moved.get((site, len(runs)))
        runs.append(ones.requires_grad_() if moved is None else ones * moved.to(ones.device))
        return runs[-1]


class _Thread:
    """A thread, as long as it runs; its number may be given to another one later."""


class _Here(threading.local):
    """What each thread has open, of all networks."""

    def __init__(self) -> None:
        self._thread = _Thread()
        self.thread = weakref.ref(self._thread)
        self.training: tuple[str, ...] = ()
        """Families of the networks that are bound to the ids of a training batch."""


_HERE = _Here()


class _Current(threading.local):
    def __init__(self) -> None:
        self.binding: Binding | None = None


@dataclass
class Opened:
    """A binding that was opened, and what was open in its thread before."""

    binding: Binding
    before: Binding | None
    training: tuple[str, ...]


class Contexts:
    """The bindings that are open on one network, each in the thread that opened it.

    A deep or pickled copy has nothing open, and is of the same family.
    """

    def __init__(self, family: str | None = None) -> None:
        self.family = family or uuid4().hex
        self.copied = family is not None
        self.used = False
        self.current = _Current()
        self.open: list[Binding] = []
        """Those of all threads."""
        self.past: deque[Binding] = deque(maxlen=_REMEMBERED_BINDINGS)
        self.alone: weakref.ref[_Thread] | None = None
        """The thread without which the network may not run for now."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.family,)

    def enter(self, binding: Binding, *, training: bool) -> Opened:
        """Open a binding in this thread."""
        binding.thread, binding.first_node = _HERE.thread, _next_node()
        opened = Opened(binding, self.current.binding, _HERE.training)
        others = tuple(family for family in _HERE.training if family != self.family)
        bound = training and binding.ids is not None
        _HERE.training = (*others, self.family) if bound else others
        self.used = True
        self.open.append(binding)
        self.current.binding = binding
        return opened

    def leave(self, opened: Opened) -> None:
        """Close a binding; what was open before is open again."""
        binding = opened.binding
        self.open.remove(binding)
        if binding.thread is not _HERE.thread:
            raise BindingError(
                "a context of a network was entered in one thread and left in another, and stays open in "
                "the first: enter and leave it in the thread that runs the model"
            )
        self.current.binding, _HERE.training = opened.before, opened.training
        binding.last_node = _next_node()
        # Probes are as large as a batch of masks, and their backward runs within the context.
        if binding.probes is None and binding.last_node > binding.first_node:
            binding.masks.clear()  # a recomputation makes them again from the ids
            self.past.append(binding)

    def original_is_bound(self) -> bool:
        """Whether ids of a training batch are bound in this thread to what this is a copy of."""
        return self.family in _HERE.training and self.current.binding is None

    def is_held_elsewhere(self) -> bool:
        """Whether another thread needs the network for itself."""
        return self.alone is not None and self.alone is not _HERE.thread

    def hold(self) -> None:
        """Have the network run in this thread alone, until :meth:`release`."""
        self.alone = _HERE.thread

    def release(self) -> None:
        """Let the network run in every thread again."""
        self.alone = None

    def of_replica(self, site: str) -> Binding:
        """The binding of the thread that runs a copy of the model on each of its devices.

        ``nn.DataParallel`` makes the copies, runs each in a thread, and gives it some of the rows.

        Raises:
            BindingError: what a replica multiplies by depends on its rows.
        """
        every = list(self.open)
        if len(every) > 1 or every[0].of_rows:
            raise BindingError(
                f"site {site!r} ran in a replica of nn.DataParallel, which does not say which rows of "
                f"the batch it has: use DistributedDataParallel, or one device"
            )
        return every[0]

    def of_recomputation(self, site: str, *, training: bool) -> Binding | None:
        """The binding of the forward that gradient checkpointing is repeating in ``backward()``.

        The context has usually ended by then, and several forwards may share one backward. Autograd
        numbers its nodes in order of creation, so the node that asks for the recomputation tells
        which context it was made in.

        Raises:
            BindingError: it is not known, in training.
        """
        candidates = [*self.past, *self.open]
        if candidates and not torch.is_grad_enabled():
            # The inner checkpoint's node is made now, in backward(), and belongs to no context.
            raise BindingError(
                f"site {site!r} lies in gradient checkpoints within one another, which lose the ids "
                f"of its forward: pass use_reentrant=False to torch.utils.checkpoint"
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
        self._opened: list[Opened] = []

    def __enter__(self) -> None:
        model = self._model
        if self._binding.of_rows and torch.is_grad_enabled() and paused_elsewhere(model):
            raise BindingError(
                "another thread scores with this network, whose model it keeps in eval mode for that "
                "time: train before or after it"
            )
        # A binding of its own for each entry: each has its own range of autograd nodes.
        binding = replace(self._binding, masks=dict(self._binding.masks), last_node=None)
        self._opened.append(self._contexts.enter(binding, training=model.training))

    def __exit__(self, *exception: object) -> None:
        mine = [
            index
            for index, opened in enumerate(self._opened)
            if opened.binding.thread is _HERE.thread
        ]
        self._contexts.leave(self._opened.pop(mine[-1] if mine else -1))


def _next_node() -> int:
    """The number that autograd will give to the next node made in this thread."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def _made_in(candidates: Iterable[Binding]) -> Binding | None:
    """The binding under which the autograd node that is running now was made, if it is known.

    Autograd numbers its nodes in order of creation, in each thread from 0. ``backward()`` runs in the
    thread that calls it, and on other devices than the CPU in threads of autograd's own.

    Raises:
        BindingError: the node may be of either of two threads.
    """
    node: Any = torch._C._current_autograd_node()
    if node is None:
        return None
    every = list(candidates)
    number = node._sequence_nr()
    mine = [b for b in every if b.thread is _HERE.thread]
    found = [
        binding
        for binding in sorted(mine or every, key=lambda b: b.first_node, reverse=True)
        if binding.first_node <= number
        and (binding.last_node is None or number < binding.last_node)
    ]
    if len({id(binding.thread) for binding in found}) > 1:
        raise BindingError(
            "gradient checkpointing repeats a forward in backward(), and contexts of two threads may "
            "be its own: train one network in one thread, or without checkpointing"
        )
    return found[0] if found else None
