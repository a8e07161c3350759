"""The linear estimator: one backward pass per target, then codes times gradients.

Influence is linearised in the mask at the mean network: the derivative of the objective by every mask
entry, times (hidden mask - exposed mask). Kobayashi et al. 2020, equation 6, to first order.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from turnover.batches import Batch
from turnover.dropout.masks import MaskSpec
from turnover.dropout.network import Network
from turnover.errors import BindingError, InputError
from turnover.influence.reach import Run, check_independent, differentiate
from turnover.objectives import Objective, costs

_TABLE_ROWS = 16
"""Rows in one look-up table: wider ones fall out of the cache."""
_FEW_ROWS = 32
"""Up to here looking bytes up is faster than a matrix product (measured on 2 cores)."""
_BYTES = 2**22
"""Packed draws of one pass by tables."""
_PRODUCT_IDS = 512
"""Ids in one matrix product; more of them would fall out of the cache."""


def mask_gradients(
    network: Network,
    objective: Objective,
    batch: Batch,
    sites: Sequence[str] | None = None,
    independent: set[Run] | None = None,
) -> Tensor:
    """Derivative of each target's objective by the mask entries of the mean network.

    Args:
        sites: by the masks of these sites alone; ``None``: all of them.
        independent: runs of sites that this objective is known not to depend on; more are added.
            ``None``: those without a gradient are looked at anew.

    Returns:
        float32 (rows, mask units), the sites side by side in ``network.sites`` order.

    Raises:
        BindingError: no site was reached by the forward, or the objective depends on a site in a way that
            autograd does not see.
        InputError: the objective does not give one number for each row, is not finite, or has no
            derivative; a site that does not see the rows of the batch.
    """
    wanted = network.sites if sites is None else [s for s in network.sites if s in sites]

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
    known = set() if independent is None else independent
    cut = [one for one in runs if gradients[one] is None and one not in known]
    if cut:
        check_independent(network, cut, values, run)
        known.update(cut)
    units = network.known_units(wanted)
    columns = []
    for site in wanted:
        column = None
        for one in runs:
            gradient = gradients[one]
            if one[0] == site and gradient is not None:
                _check_rows(gradient, site, len(values))
                column = gradient if column is None else column + gradient
        # By a site that the objective does not depend on the derivative is 0.
        nothing = values.new_zeros((len(values), units[site]), dtype=torch.float32)
        columns.append(nothing if column is None else column)
    return torch.cat(columns, dim=1)


def finite(values: Tensor, what: str) -> Tensor:
    """The values, if they are finite.

    Raises:
        InputError: NaN or infinite; the rows are named.
    """
    if not bool(torch.isfinite(values).all()):
        rows = (~torch.isfinite(values)).reshape(len(values), -1).any(dim=1).nonzero().flatten()
        raise InputError(
            f"{what} is NaN or infinite for rows {rows[:5].tolist()} of a batch: the network or the "
            f"objective diverged on them"
        )
    return values


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


def _check_rows(gradient: Tensor, site: str, rows: int) -> None:
    """Refuse masks of something else than rows.

    Raises:
        InputError: a site that saw more or fewer rows than the batch has.
    """
    if len(gradient) != rows:
        raise InputError(
            f"site {site!r} saw {len(gradient)} rows in a batch of {rows}, so its masks do not belong to "
            f"rows: another axis (choices, time, views) is on axis 0 or folded into it, or rows take "
            f"different paths. Attach sites whose outputs have one row for each row of the batch "
            f"(batch_first=True, where the module has it)"
        )


class LinearScorer:
    """Rows of coefficients, ready to be multiplied by (hidden mask - exposed mask) of any ids.

    The masks are never expanded to numbers in memory, but for a block of ids that fits the cache. For
    few rows even that is too much work: eight draws at a time are looked up in tables of their sums.

    Args:
        coefficients: float32 (rows, mask units): derivatives by the mask entries.
        spec: the masks.
        units: mask units by site, in the order of the columns.
    """

    def __init__(self, coefficients: Tensor, spec: MaskSpec, units: Mapping[str, int]) -> None:
        self._spec = spec
        self._units = dict(units)
        keep = spec.keep
        # With a draw b the hidden minus the exposed mask is (1 - b) / (1 - p) - b / p: the mean of both
        # draws, plus or minus half their difference.
        self._base = coefficients.sum(dim=1) * (0.5 / (1 - keep) - 0.5 / keep)
        step = coefficients * (-0.5 / (keep * (1 - keep)))
        self._steps = torch.cat([self._by_draw(part) for part in self._split(step)], dim=1)
        self._tables: list[Tensor] = []
        if len(coefficients) <= _FEW_ROWS:
            self._tables = [_sums_by_byte(rows) for rows in torch.split(self._steps, _TABLE_ROWS)]

    def scores(self, ids: Tensor) -> Tensor:
        """Every row times (hidden - exposed mask) of every id: float32 (rows, ids)."""
        scores = self._steps.new_empty((len(self._steps), len(ids)))
        start = 0
        for packed in self._blocks(ids):
            block = scores[:, start : start + len(packed)]
            if self._tables:
                block.copy_(self._looked_up(packed).T)
            else:
                torch.mm(self._steps, _signs(packed).T, out=block)
            start += len(packed)
        return scores.add_(self._base[:, None]) if self._spec.keep != 0.5 else scores

    def by_id(self, ids: Tensor) -> Tensor:
        """:meth:`scores` with the ids first: float32 (ids, rows)."""
        scores = self._steps.new_empty((len(ids), len(self._steps)))
        start = 0
        for packed in self._blocks(ids):
            block = scores[start : start + len(packed)]
            if self._tables:
                block.copy_(self._looked_up(packed))
            else:
                torch.mm(_signs(packed), self._steps.T, out=block)
            start += len(packed)
        return scores.add_(self._base) if self._spec.keep != 0.5 else scores

    def _blocks(self, ids: Tensor) -> Iterator[Tensor]:
        size = _PRODUCT_IDS
        if self._tables:
            size = max(_PRODUCT_IDS, _BYTES * 8 // self._steps.shape[1])
        for part in torch.split(ids.to(self._steps.device), size):
            yield self._packed(part)

    def own(self, ids: Tensor) -> Tensor:
        """Row i times (hidden - exposed mask) of ``ids[i]`` alone: float32 (rows,)."""
        signs = _signs(self._packed(ids.to(self._steps.device)))
        return torch.einsum("ru,ru->r", self._steps, signs) + self._base

    def _packed(self, ids: Tensor) -> Tensor:
        return torch.cat([self._spec.packed(ids, s, units) for s, units in self._units.items()], 1)

    def _split(self, columns: Tensor) -> Sequence[Tensor]:
        return torch.split(columns, list(self._units.values()), dim=1)

    def _by_draw(self, columns: Tensor) -> Tensor:
        """What each draw of a site moves: columns of a pair cancel; whole bytes, filled up with 0."""
        rows, units = columns.shape
        draws = self._spec.draws(units)
        padded = columns.new_zeros((rows, -(-draws // 8) * 8))
        if self._spec.balanced:
            padded[:, :draws] = columns[:, 0::2]
            padded[:, : units // 2] -= columns[:, 1::2]
        else:
            padded[:, :draws] = columns
        return padded

    def _looked_up(self, packed: Tensor) -> Tensor:
        offsets = torch.arange(packed.shape[1], dtype=torch.int32, device=packed.device) * 256
        entries = packed.to(torch.int32) + offsets
        parts = [functional.embedding_bag(entries, t, mode="sum") for t in self._tables]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _sums_by_byte(steps: Tensor) -> Tensor:
    """For every byte of draws and each of its 256 values, the sum it adds: (bytes * 256, rows)."""
    by_byte = steps.T.reshape(-1, 8, len(steps))  # (bytes, bit, rows)
    sums = torch.zeros_like(by_byte[:, :1])
    for bit in range(8):
        step = by_byte[:, bit : bit + 1]
        sums = torch.cat([sums - step, sums + step], dim=1)
    return sums.flatten(0, 1)


def _signs(packed: Tensor) -> Tensor:
    """Draws as +1 and -1: float32 (ids, 8 * bytes)."""
    table = _sums_by_byte(torch.eye(8, device=packed.device))  # (256, 8)
    return table.index_select(0, packed.flatten().to(torch.int32)).view(len(packed), -1)
