"""Gradient checkpointing of the reentrant kind, whose insides autograd does not see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def is_reentrant(error: RuntimeError) -> bool:
    """Whether an error of autograd says that it met a reentrant checkpoint."""
    said = (
        "use_reentrant=True",
        "Checkpointing is not compatible with .grad()",
    )  # newer, older torch
    return any(one in str(error) for one in said)


def has_reentrant(values: Iterable[Tensor]) -> bool:
    """Whether values were computed by way of a reentrant checkpoint."""
    pending: list[Any] = [value.grad_fn for value in values]
    seen: set[Any] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            return True
        pending.extend(following for following, _ in node.next_functions)
    return False
