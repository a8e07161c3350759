"""Calls of layers, recorded by forward hooks, and gradients at their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from turnover.batches import tensors
from turnover.dropout.modules import in_this_thread
from turnover.dropout.torch_private import is_reentrant
from turnover.errors import InputError
from turnover.influence.gram.parts import Part

REENTRANT = (
    "the model runs torch.utils.checkpoint(use_reentrant=True) in eval mode, and gram cannot see the "
    "gradients inside: pass use_reentrant=False, or checkpoint in training mode only"
)


class UnknownLayoutError(Exception):
    """The inputs or outputs of a part do not have the rows of the batch first."""

    def __init__(self, part: str) -> None:
        super().__init__(part)
        self.part = part


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Attributes:
        inputs: its first input, rows first.
        edge: of its output in the autograd graph.
        dtype: of its output.
        broadcast: whether one call was made for all rows (position embeddings).
        folded: for each row, the number of tokens that follow one another on the first axis; 1: that
            axis has the rows.
    """

    inputs: Tensor
    edge: GradientEdge
    dtype: torch.dtype
    broadcast: bool
    folded: int

    def by_row(self, back: Tensor | None) -> Tensor | None:
        """A gradient of the output, rows first."""
        if back is None or self.folded == 1:
            return back
        return back.reshape(-1, self.folded, *back.shape[1:])

    def makes(self, outputs: Any) -> bool:
        """Whether the layer's output is one of the model's, as it is."""
        ends = (get_gradient_edge(v) for v in tensors([outputs]) if v.requires_grad)
        return any(end[:2] == self.edge[:2] for end in ends)


Calls = dict[str, list[LayerCall]]
"""Calls by part."""


@contextmanager
def recorded(parts: Mapping[str, Part], rows: int) -> Iterator[Calls]:
    """Record the calls of parts while the body runs the model on a batch of ``rows`` rows."""
    calls: Calls = {}

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            inputs = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
            if not isinstance(output, Tensor) or not isinstance(inputs, Tensor):
                raise UnknownLayoutError(name)
            if not output.requires_grad:
                return None
            if not output.dim() or not inputs.dim():
                raise UnknownLayoutError(name)
            broadcast = len(output) == len(inputs) == 1 < rows
            if broadcast:  # a gradient for each row
                output = output.expand(rows, *output.shape[1:])
                inputs = inputs.expand(rows, *inputs.shape[1:])
            folded, rest = divmod(len(output), rows)
            if rest or not folded or len(inputs) != len(output):
                raise UnknownLayoutError(name)
            if folded > 1:
                inputs = inputs.reshape(rows, folded, *inputs.shape[1:])
            edge = get_gradient_edge(output)
            call = LayerCall(inputs.detach(), edge, output.dtype, broadcast, folded)
            calls.setdefault(name, []).append(call)
            return output if broadcast else None

        return hook

    handles = []
    try:
        for name, part in parts.items():
            hook = in_this_thread(hook_of(name))
            modules = part.module, *part.also
            handles += [one.register_forward_hook(hook, with_kwargs=True) for one in modules]
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def inputs_by_row(calls: Calls) -> dict[str, list[Tensor]]:
    """Inputs of the calls that are not broadcast."""
    return {name: [c.inputs for c in every if not c.broadcast] for name, every in calls.items()}


def gradients_at(
    values: Sequence[Tensor], edges: Sequence[GradientEdge]
) -> list[tuple[Tensor | None, ...]]:
    """Gradients of several numbers at the same edges: for each number, one gradient an edge."""
    if not edges:
        return [() for _ in values]
    last = len(values) - 1
    try:
        return [
            torch.autograd.grad(value, edges, allow_unused=True, retain_graph=number < last)
            for number, value in enumerate(values)
        ]
    except RuntimeError as error:
        if not is_reentrant(error):
            raise
        raise InputError(REENTRANT) from error


def interleaved(values: Sequence[Tensor | None]) -> Tensor | None:
    """The first row of each, then the second row of each, and so on; zeros for what is missing."""
    found = next((value for value in values if value is not None), None)
    if found is None:
        return None
    if len(values) == 1:
        return found.detach().float()
    full = [torch.zeros_like(found) if value is None else value for value in values]
    return torch.stack([value.detach().float() for value in full], dim=1).flatten(0, 1)
