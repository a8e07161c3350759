"""Private interfaces of torch: autograd's numbers and node names, and functorch's wrapped tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from turnover.errors import InputError

NAMES = (
    "autograd._get_sequence_nr",
    "_C._current_autograd_node",
    "_C._current_graph_task_id",
    "nn.modules.batchnorm._BatchNorm",
    "nn.modules.conv._ConvNd",
    "nn.modules.dropout._DropoutNd",
)
_NODE_NUMBER = "_sequence_nr"
_REENTRANT_MESSAGES = (
    "use_reentrant=True",
    "Checkpointing is not compatible with .grad()",  # older torch
)
_REARRANGING_NODES = ("Index", "Gather", "Take", "Sort", "Flip", "Roll", "Scatter")
_functorch: Any = torch._C._functorch


@cache
def check_torch() -> None:
    """Check that this torch has the private names that masks depend on."""
    missing = [name for name in NAMES if not _has(name)]
    node = torch.ones((), requires_grad=True).clone().grad_fn
    if not hasattr(node, _NODE_NUMBER):
        missing.append(f"autograd.graph.Node.{_NODE_NUMBER}")
    if missing:
        raise InputError(
            f"torch {torch.__version__} has no torch.{missing[0]}, which turn-over dropout needs: pip "
            f"install 'torch>=2.6,<3', or a newer turnover"
        )


def _has(name: str) -> bool:
    try:
        attrgetter(name)(torch)
    except AttributeError:
        return False
    return True


def next_node() -> int:
    """The number that autograd will give to the next node made in this thread."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def running_node() -> int | None:
    """The number of the autograd node that is running in this thread."""
    node: Any = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


def in_backward() -> bool:
    """Whether this thread is computing a backward pass."""
    return torch._C._current_graph_task_id() != -1


def is_reentrant(error: RuntimeError) -> bool:
    """Whether an autograd error reports a reentrant checkpoint."""
    return any(message in str(error) for message in _REENTRANT_MESSAGES)


def has_reentrant(values: Iterable[Tensor]) -> bool:
    """Whether values depend on a reentrant checkpoint, whose inside autograd does not see."""
    return any(node.name() == "CheckpointFunctionBackward" for node in _nodes(values))


def may_rearrange(value: Tensor) -> bool:
    """Whether a value depends on an operation that may reorder rows."""
    return any(node.name().startswith(_REARRANGING_NODES) for node in _nodes([value]))


def _nodes(values: Iterable[Tensor]) -> Iterator[Any]:
    """Nodes of the autograd graph behind values."""
    pending: list[Any] = [value.grad_fn for value in values]
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            yield node
            pending.extend(following for following, _ in node.next_functions)


def is_vmapped_over_rows(output: Tensor, rows: int, parameters: Iterable[Tensor]) -> bool:
    """Whether ``torch.func.vmap`` maps over the rows of the batch.

    Where it maps over the parameters of several models, each model has the whole batch.
    """
    if not _functorch.is_functorch_wrapped_tensor(output):
        return False
    sizes = list(_vmapped_sizes(output))
    if not sizes or any(size for parameter in parameters for size in _vmapped_sizes(parameter)):
        return False
    return rows in sizes or len(output) != rows


def _vmapped_sizes(value: Tensor) -> Iterator[int]:
    """Sizes of the axes that vmap hides."""
    while _functorch.is_functorch_wrapped_tensor(value):
        inner = _functorch.get_unwrapped(value)
        if _functorch.is_batchedtensor(value):
            yield inner.shape[_functorch.maybe_get_bdim(value)]
        value = inner
