"""Row order: whether sites and layers see the rows of a batch in the order of the batch.

A model may sort its rows by length, or route them to experts, and restore their order afterwards. A layer
in between sees as many rows as the batch has, but its row i is not row i of the batch. Reversing the batch
shows it: the inputs of such a layer are not reversed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from turnover.batches import Batch
from turnover.dropout.modules import in_this_thread, trial, uncompiled
from turnover.errors import InputError

if TYPE_CHECKING:
    from turnover.dropout.network import Network

_SINGLE_ROWS = 64
"""Rows of a batch that are run alone to confirm a wrong order."""
_TOLERANCE, _COARSE_TOLERANCE = 1e-3, 5e-2
"""Differences above these shares of the largest value are not rounding."""


def check_site_order(network: Network, batch: Batch, sites: Sequence[str] | None = None) -> bool:
    """Refuse sites whose output row i is not row i of the batch.

    Args:
        network: runs as the mean network, in eval mode.
        batch: on the model's device; a single row has no order.
        sites: sites to check; ``None``: all.

    Returns:
        Whether the check is conclusive. It is not for a batch of one row.
    """
    if len(batch) == 1:
        return False
    with trial(network.model):
        seen = _site_outputs(network, batch)
        bad = out_of_order(seen, _site_outputs(network, reversed_rows(batch)))
        bad = [name for name in bad if sites is None or name in sites]
        if not bad:
            return True
        again = {
            name: [output.flip(0) for output in outputs]
            for name, outputs in _site_outputs(network, batch).items()
        }
        random = out_of_order(seen, again)  # differs from run to run
        bad = [name for name in bad if name not in random]
        moved = next((name for name in bad if _is_moved(network, batch, name, seen)), None)
    if moved is not None:
        raise InputError(
            f"site {moved!r} sees the rows of a batch in another order than the batch has, or another axis "
            f"than the batch on axis 0, so rows would run under the masks of other rows: does the model "
            f"sort rows by length, or route them? Sort them before the model (in the collate function, with "
            f"their ids), or attach sites where rows are in their own order"
        )
    return not bad


def reversed_rows(batch: Batch) -> Batch:
    """The batch with its last row first."""
    size = len(batch)
    return batch.mapped(
        lambda value: value.flip(0) if value.dim() and len(value) == size else value
    )


def out_of_order(
    forward: Mapping[str, Sequence[Tensor]], backward: Mapping[str, Sequence[Tensor]]
) -> list[str]:
    """Names of layers whose tensors in a reversed batch are not their tensors in the batch, reversed."""
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
    share = _TOLERANCE if one.dtype in (torch.float32, torch.float64) else _COARSE_TOLERANCE
    one, other = one.float(), other.float()
    largest = float(torch.where(one.isfinite(), one.abs(), 0.0).max()) if one.numel() else 0.0
    return largest_difference(one, other) <= share * largest


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference; NaN differs from all numbers by infinity, and from NaN by 0."""
    same = (one == other) | (one.isnan() & other.isnan())
    difference = torch.where(same, 0.0, (one - other).abs())
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


def _is_moved(network: Network, batch: Batch, site: str, seen: Mapping[str, list[Tensor]]) -> bool:
    """Whether a row alone has another output than at its position in the batch."""
    for row in range(0, len(batch), -(-len(batch) // _SINGLE_ROWS)):
        alone = _site_outputs(network, batch.rows(row, row + 1))
        wanted = {site: [output[row : row + 1] for output in seen.get(site, ())]}
        if out_of_order(wanted, {site: alone.get(site, [])}):
            return True
    return False


def _site_outputs(network: Network, batch: Batch) -> dict[str, list[Tensor]]:
    """Outputs of the sites in the mean network that have as many rows as the batch."""
    found: dict[str, list[Tensor]] = {}
    rows = len(batch)

    def record(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor) and first.dim() and len(first) == rows:
            found.setdefault(name, []).append(first.detach().clone())

    with network.mean(), ExitStack() as hooks:
        for name, site in network.masking.sites.items():
            hook = in_this_thread(partial(record, name))
            hooks.enter_context(site.module.register_forward_hook(hook))
        batch.call(uncompiled(network.model))
    return found
