"""Whether what the linear method differentiates came to it whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turnover.dropout.network import Network
from turnover.dropout.torch_private import is_reentrant
from turnover.errors import BindingError, InputError

Run = tuple[str, int]
"""A site, and which of the runs of its module in a forward."""

_GHOST = -(2**41)
"""Whose masks show what depends on a site; far from the ghosts of noise floors."""
_NOISE = 1e-6
"""Share of a value that is no dependence."""
_FIXES = (
    "pass use_reentrant=False to torch.utils.checkpoint, checkpoint in training mode alone, or score by "
    'method="exact"'
)


def differentiate(values: Tensor, probes: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Derivatives of the sum of some values by the probes of sites.

    Raises:
        InputError: gradient checkpointing of the kind that gives no such derivatives.
    """
    try:
        return torch.autograd.grad(values.sum(), probes, allow_unused=True)
    except RuntimeError as error:
        if not is_reentrant(error):
            raise
        raise InputError(
            f"the model runs torch.utils.checkpoint(use_reentrant=True) in eval mode, through which the "
            f"linear method cannot differentiate: {_FIXES}"
        ) from error


def check_independent(
    network: Network, cut: Sequence[Run], values: Tensor, run: Callable[[], Tensor]
) -> None:
    """Refuse sites that an objective depends on although it has no derivative by their masks.

    Args:
        cut: runs of sites that have no derivative.
        values: the objective under the mean network (rows,).
        run: computes it anew, in the context that is open.

    Raises:
        BindingError: a site that the objective depends on.
    """
    with torch.no_grad():
        if not _depends(network, cut, values, run):
            return
        site, number = next((one for one in cut if _depends(network, [one], values, run)), cut[0])
    raise BindingError(
        f"the objective depends on site {site!r} (run {number + 1} of its module), but no gradient comes "
        f"back to it, so the linear method would report no influence: the model runs it under "
        f"torch.no_grad(), detaches its output, or runs it in "
        f"torch.utils.checkpoint(use_reentrant=True): {_FIXES}"
    )


def _depends(
    network: Network, cut: Sequence[Run], values: Tensor, run: Callable[[], Tensor]
) -> bool:
    units = network.known_units(sorted({site for site, _ in cut}))
    masks = {site: network.spec.exposed([_GHOST], site, width)[0] for site, width in units.items()}

    def change(moved: dict[Run, Tensor]) -> Tensor:
        with network.masking.probing([site for site, _ in cut], moved):
            return (run() - values.detach()).abs()

    # Of the two together each unit is dropped once.
    changes = [
        change({one: side(masks[one[0]]).float() * 2 for one in cut})
        for side in (torch.clone, torch.logical_not)
    ]
    least = _NOISE * values.detach().abs()
    if not any(bool((one > least).any()) for one in changes):
        return False
    again = 10 * change({}).max()  # not every computation gives the same numbers twice
    return any(bool((one > least + again).any()) for one in changes)
