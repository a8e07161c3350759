"""Backward passes of several numbers through one graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from turnover.dropout.torch_private import is_reentrant
from turnover.errors import InputError

REENTRANT = (
    "the model runs torch.utils.checkpoint(use_reentrant=True) in eval mode, within which gram sees no "
    "gradients: pass use_reentrant=False, or checkpoint in training mode alone"
)


def pulled_back(
    pulled: Sequence[Tensor], edges: Sequence[GradientEdge]
) -> list[tuple[Tensor | None, ...]]:
    """Gradients of several numbers by the same edges.

    Raises:
        InputError: a reentrant checkpoint on the way.
    """
    if not edges:
        return [() for _ in pulled]
    last = len(pulled) - 1
    try:
        return [
            torch.autograd.grad(one, edges, allow_unused=True, retain_graph=number < last)
            for number, one in enumerate(pulled)
        ]
    except RuntimeError as error:
        if not is_reentrant(error):
            raise
        raise InputError(REENTRANT) from error


def interleaved(values: Sequence[Tensor | None]) -> Tensor | None:
    """The first row of each, then the second row of each; what is not there is 0."""
    there = next((one for one in values if one is not None), None)
    if there is None:
        return None
    full = [torch.zeros_like(there) if one is None else one for one in values]
    return torch.stack([one.detach().float() for one in full], dim=1).flatten(0, 1)
