"""Derivatives of objectives by masks, and checks that autograd sees all of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.dropout.network import Network
from turnover.dropout.torch_private import is_reentrant
from turnover.errors import BindingError, InputError
from turnover.influence.halving import Halving
from turnover.objectives import Objective, costs

Run = tuple[str, int]
"""A site, and which of the runs of its module in a forward."""

_GHOST = -(2**41)
"""Its masks show what depends on a site; far from the ghosts of noise floors."""
_NOISE = 1e-6
"""Share of a value that is no dependence."""
_FIXES = (
    "pass use_reentrant=False to torch.utils.checkpoint, checkpoint in training mode alone, or score by "
    'method="exact"'
)


def mask_gradients(
    network: Network,
    objective: Objective,
    batch: Batch,
    sites: Sequence[str] | None = None,
    independent: set[Run] | None = None,
    halving: Halving | None = None,
) -> Tensor:
    """Differentiate each target's objective by the mask entries of the mean network.

    Args:
        sites: by the masks of these sites alone; ``None``: all of them.
        independent: runs of sites that this objective is known not to depend on; more are added.
            ``None``: those without a gradient are checked anew.
        halving: bounds the rows in a forward; ``None``: all rows are in one.

    Returns:
        float32 (rows, mask units), the sites side by side in ``network.sites`` order.
    """
    wanted = network.sites if sites is None else [s for s in network.sites if s in sites]
    independent = set() if independent is None else independent

    def of(rows: Batch) -> Tensor:
        return _of_rows(network, objective, rows, wanted, independent)

    found = [of(batch)] if halving is None else halving.by_rows(batch, of)
    return torch.cat(found) if len(found) > 1 else found[0]


def _of_rows(
    network: Network,
    objective: Objective,
    batch: Batch,
    wanted: Sequence[str],
    independent: set[Run],
) -> Tensor:
    def run() -> Tensor:
        return costs(objective, batch.call(network.model), batch)

    with torch.enable_grad(), network.masking.probing(wanted) as probes:
        values = run()
        check_reached(wanted, probes)
        if not values.requires_grad:
            raise InputError(
                "the linear method differentiates the objective, and this one cannot be "
                'differentiated: use method="exact", or an objective and a model without detach, '
                "no_grad or torch.utils.checkpoint(use_reentrant=True)"
            )
        # Infinity may be a constant, as of a class that is masked, whose derivative is 0.
        finite(values.detach(), "the objective")
        runs = [(site, number) for site in probes for number in range(len(probes[site]))]
        found = differentiate(values, [probes[site][number] for site, number in runs])
    gradients = dict(zip(runs, found, strict=True))
    cut = [one for one in runs if gradients[one] is None and one not in independent]
    if cut:
        _check_independent(network, cut, values, run)
        independent.update(cut)
    columns: dict[str, Tensor] = {}
    for (site, _), gradient in gradients.items():
        if gradient is not None:
            _check_rows(gradient, site, len(values))
            columns[site] = columns[site] + gradient if site in columns else gradient
    for site, units in network.known_units(wanted).items():
        if site not in columns:  # the objective does not depend on it
            columns[site] = values.new_zeros((len(values), units), dtype=torch.float32)
    return torch.cat([columns[site] for site in wanted], dim=1)


def finite(values: Tensor, what: str) -> Tensor:
    """The values, if they are finite."""
    if not bool(torch.isfinite(values).all()):
        rows = (~torch.isfinite(values)).reshape(len(values), -1).any(dim=1).nonzero().flatten()
        raise InputError(
            f"{what} is NaN or infinite for rows {rows[:5].tolist()} of a batch: the network or the "
            f"objective diverged on them, or (on a GPU) their labels are no classes of the network"
        )
    return values


def all_finite(values: Sequence[Tensor], what: str) -> None:
    """As :func:`finite` of each, waiting for the device once."""
    # A sum is finite only if all its numbers are, and is much faster; each is looked at if one is not.
    if values and not bool(torch.isfinite(torch.stack([one.sum() for one in values])).all()):
        for one in values:
            finite(one, what)


def check_reached(wanted: Sequence[str], reached: Collection[str]) -> None:
    """Refuse a forward that reached no site: every influence would be 0."""
    if not reached:
        raise BindingError(
            f"the forward reached none of the sites {list(wanted)}: are these modules called (weights "
            f"merged, or used by name, bypass them), and is the network attached?"
        )


def _check_rows(gradient: Tensor, site: str, rows: int) -> None:
    if len(gradient) != rows:
        raise InputError(
            f"site {site!r} saw {len(gradient)} rows in a batch of {rows}, so its masks do not belong to "
            f"rows: another axis (choices, time, views) is on axis 0 or folded into it, or rows take "
            f"different paths. Attach sites whose outputs have one row for each row of the batch "
            f"(batch_first=True, where the module has it)"
        )


def differentiate(values: Tensor, probes: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Differentiate the sum of some values by the probes of sites."""
    try:
        return torch.autograd.grad(values.sum(), probes, allow_unused=True)
    except RuntimeError as error:
        if not is_reentrant(error):
            raise
        raise InputError(
            f"the model runs torch.utils.checkpoint(use_reentrant=True) in eval mode, through which the "
            f"linear method cannot differentiate: {_FIXES}"
        ) from error


def _check_independent(
    network: Network, cut: Sequence[Run], values: Tensor, run: Callable[[], Tensor]
) -> None:
    """Refuse sites without a derivative on which the values of a run depend."""
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

    # The two together drop each unit once.
    changes = [
        change({one: side(masks[one[0]]).float() * 2 for one in cut})
        for side in (torch.clone, torch.logical_not)
    ]
    least = _NOISE * values.detach().abs()
    if not any(bool((one > least).any()) for one in changes):
        return False
    again = 10 * change({}).max()  # not every computation gives the same numbers twice
    return any(bool((one > least + again).any()) for one in changes)
