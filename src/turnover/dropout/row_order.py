"""Whether layers see the rows of a batch in the batch's own order.

A model may sort its rows by length, or deal them out to experts, and put them back after. A layer in
between is given as many rows as there are, but row i is not row i. In a batch that happens to be in that
order nothing shows it; in the same batch turned around it shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from turnover.batches import Batch

_FAR, _COARSELY_FAR = 1e-3, 5e-2
"""Share of the largest input that no rounding makes of it."""
_REARRANGING = ("Index", "Gather", "Take", "Sort", "Flip", "Roll", "Scatter")
"""What the names of autograd's nodes begin with, of what may bring rows in another order."""


def reversed_rows(batch: Batch) -> Batch:
    """The batch with its last row first."""
    size = len(batch)
    return batch._mapped(
        lambda value: value.flip(0) if value.dim() and len(value) == size else value
    )


def out_of_order(
    forward: Mapping[str, Sequence[Tensor]], backward: Mapping[str, Sequence[Tensor]]
) -> list[str]:
    """Layers whose inputs in a reversed batch are not their inputs, reversed.

    Args:
        forward: inputs of the calls of layers, by name.
        backward: those in the reversed batch.
    """
    names = dict.fromkeys([*forward, *backward])
    return [n for n in names if not _are_reversed(forward.get(n, ()), backward.get(n, ()))]


def _are_reversed(forward: Sequence[Tensor], backward: Sequence[Tensor]) -> bool:
    if len(forward) != len(backward):
        return False
    return all(_are_close(one.flip(0), other) for one, other in zip(forward, backward, strict=True))


def _are_close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    limit = _FAR if one.dtype in (torch.float32, torch.float64) else _COARSELY_FAR
    one, other = one.float(), other.float()
    same = (one == other) | (one.isnan() & other.isnan())
    apart = torch.where(same, 0.0, (one - other).abs())
    largest = torch.where(one.isfinite(), one.abs(), 0.0).max() if one.numel() else 0.0
    return bool((apart <= limit * largest).all())


def may_rearrange(value: Tensor) -> bool:
    """Whether a value was computed by way of what may bring rows in another order."""
    pending, seen = [value.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith(_REARRANGING):
            return True
        pending.extend(following for following, _ in node.next_functions)
    return False
