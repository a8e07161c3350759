"""The linear estimator: one backward pass per target, then codes times gradients.

Influence is linearised in the mask at the mean network: the derivative of the objective by every mask
entry, times (hidden mask - exposed mask).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.errors import BindingError, InputError
from turnover.masks import MaskSpec
from turnover.network import Network
from turnover.objectives import Objective, costs

_ID_BLOCK = 1024


def mask_gradients(
    network: Network, objective: Objective, batch: Batch, sites: Sequence[str] | None = None
) -> Tensor:
    """Derivative of each target's objective by the mask entries of the mean network.

    Args:
        sites: by the masks of these sites alone; ``None``: all of them.

    Returns:
        float32 (rows, mask units), the sites side by side in ``network.sites`` order.

    Raises:
        BindingError: no site was reached by the forward.
        InputError: the objective does not give one number for each row, or has no derivative.
    """
    wanted = network.sites if sites is None else [s for s in network.sites if s in sites]
    with torch.enable_grad(), network._probing(wanted) as probes:
        values = costs(objective, batch.call(network.model), batch)
        check_reached(wanted, probes)
        if not values.requires_grad:
            raise InputError(
                "the linear method differentiates the objective, and this one cannot be "
                'differentiated: use method="exact", or an objective without detach or no_grad'
            )
        used = [probes[site] for site in wanted if site in probes]
        gradients = torch.autograd.grad(values.sum(), used, allow_unused=True)
    by_site = dict(zip([s for s in wanted if s in probes], gradients, strict=True))
    units = network.known_units()
    columns = []
    for site in wanted:
        gradient = by_site.get(site)
        # A site that the objective does not depend on has derivative 0.
        columns.append(
            values.new_zeros((len(values), units[site]), dtype=torch.float32)
            if gradient is None
            else gradient
        )
    return torch.cat(columns, dim=1)


def check_reached(wanted: Sequence[str], reached: Collection[str]) -> None:
    """Refuse a forward that came by no site at all: every influence would be 0.

    Raises:
        BindingError: ``reached`` is empty.
    """
    if not reached:
        raise BindingError(
            f"the forward reached none of the sites {list(wanted)}: are these modules called (weights "
            f"merged, or used by name, bypass them), and is the network attached?"
        )


def codes(spec: MaskSpec, units: dict[str, int], ids: Tensor) -> Tensor:
    """Exposed masks of all sites side by side: bool (ids, mask units)."""
    return torch.cat([spec.exposed(ids, site, width) for site, width in units.items()], dim=1)


def linear_scores(gradients: Tensor, spec: MaskSpec, units: dict[str, int], ids: Tensor) -> Tensor:
    """Linear influence of ids on targets, in blocks of ids.

    With bits b and keep p, the hidden minus the exposed mask is ``(1 - b) / (1 - p) - b / p``.

    Args:
        gradients: float32 (targets, mask units) from :func:`mask_gradients`.
        ids: int64 (ids,).

    Returns:
        float32 (targets, ids).
    """
    keep = spec.keep
    total = gradients.sum(dim=1, keepdim=True) / (1 - keep)
    ids = ids.to(gradients.device)
    scores = gradients.new_empty((len(gradients), len(ids)))
    for start in range(0, len(ids), _ID_BLOCK):
        bits = codes(spec, units, ids[start : start + _ID_BLOCK]).to(gradients.dtype)
        kept = gradients @ bits.T
        scores[:, start : start + _ID_BLOCK] = total - kept / (keep * (1 - keep))
    return scores


def own_linear_scores(
    gradients: Tensor, spec: MaskSpec, units: dict[str, int], ids: Tensor
) -> Tensor:
    """Linear influence of ``ids[i]`` on target i alone: float32 (targets,)."""
    keep = spec.keep
    bits = codes(spec, units, ids.to(gradients.device))
    kept = torch.where(bits, gradients, 0).sum(dim=1)
    return gradients.sum(dim=1) / (1 - keep) - kept / (keep * (1 - keep))
