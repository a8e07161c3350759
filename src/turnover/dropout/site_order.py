"""Whether sites see the rows of a batch in the batch's own order, by which ids are bound to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from turnover.batches import Batch
from turnover.dropout.modules import device_of, evaluating, in_this_thread
from turnover.dropout.row_order import out_of_order, reversed_rows
from turnover.errors import InputError

if TYPE_CHECKING:
    from turnover.dropout.network import Network


_ALONE = 64


def check_site_order(network: Network, batch: Batch, sites: Sequence[str] | None = None) -> bool:
    """Refuse sites at which row i of what they give is not row i of the batch.

    Args:
        network: of which the mean network runs, in eval mode.
        batch: on the model's device; a single row has no order.
        sites: that are looked at; ``None``: all of them.

    Returns:
        Whether no later batch needs looking at: a model that sorts rows may have been given sorted ones.

    Raises:
        InputError: the site is named.
    """
    if len(batch) == 1:
        return False
    device = device_of(network.model)
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), evaluating(network.model), torch.random.fork_rng(devices=devices):
        seen = _outputs(network, batch)
        bad = out_of_order(seen, _outputs(network, reversed_rows(batch)))
        bad = [name for name in bad if sites is None or name in sites]
        if not bad:
            return True
        again = {
            name: [o.flip(0) for o in every] for name, every in _outputs(network, batch).items()
        }
        drawn = out_of_order(seen, again)  # a network that draws is never the same twice
        bad = [name for name in bad if name not in drawn]
        moved = next((name for name in bad if _is_moved(network, batch, name, seen)), None)
    if moved is not None:
        raise InputError(
            f"site {moved!r} sees the rows of a batch in another order than the batch has, or another axis "
            f"than the batch on axis 0, so rows would run under the masks of other rows: does the model "
            f"sort rows by length, or route them? Sort them before the model (in the collate function, with "
            f"their ids), or attach sites where rows are in their own order"
        )
    return not bad


def _is_moved(network: Network, batch: Batch, site: str, seen: Mapping[str, list[Tensor]]) -> bool:
    """Whether a row alone gives something else than at its place in the batch."""
    size = len(batch)
    for row in range(0, size, -(-size // _ALONE)):
        alone = _outputs(network, batch.rows(row, row + 1))
        wanted = {site: [o[row : row + 1] for o in seen.get(site, ())]}
        if out_of_order(wanted, {site: alone.get(site, [])}):
            return True
    return False


def _outputs(network: Network, batch: Batch) -> dict[str, list[Tensor]]:
    """What the sites give that has as many rows as the batch."""
    found: dict[str, list[Tensor]] = {}
    with network.mean(), _kept(network, len(batch), found):
        batch.call(_whole(network.model))
    return found


def _whole(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


@contextmanager
def _kept(network: Network, rows: int, found: dict[str, list[Tensor]]) -> Iterator[None]:
    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output
            if isinstance(first, Tensor) and first.dim() and len(first) == rows:
                found.setdefault(name, []).append(first.detach().clone())

        return in_this_thread(hook)

    handles = [s.module.register_forward_hook(keep(n)) for n, s in network.masking.sites.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
