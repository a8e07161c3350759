"""Gradients of every row of a batch, from one forward and one backward.

Hooks record the inputs of every trained layer; the backward of the summed objective gives the gradients
at its outputs for each row, as long as rows do not mix. Parameters without a rule take the general way
(:mod:`turnover.influence.gram.general`), as do layers whose rule disagrees with autograd. This is checked
on the first batch and on every later one in which other layers run, or otherwise than before: some layers
run for some rows only (experts), twice, or not at all.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from turnover.batches import Batch, tensors
from turnover.dropout.modules import device_of, evaluating
from turnover.dropout.row_order import out_of_order, reversed_rows
from turnover.dropout.torch_private import has_reentrant, may_rearrange
from turnover.errors import InputError
from turnover.influence.gradients import all_finite, finite
from turnover.influence.gram.directions import directions
from turnover.influence.gram.factors import Explicit, Factors
from turnover.influence.gram.general import RowGradients
from turnover.influence.gram.hooks import (
    REENTRANT,
    Calls,
    LayerCall,
    UnknownLayoutError,
    gradients_at,
    inputs_by_row,
    interleaved,
    recorded,
)
from turnover.influence.gram.parts import Part, check_model, parts_of, tolerance_of
from turnover.influence.gram.rules import Call
from turnover.influence.gram.samples import sampled_costs
from turnover.objectives import Objective, costs, cross_entropy, logits_and_labels, logits_of

GENERAL = "other parameters"
"""The part that holds parameters without a rule."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Gradients and costs of the rows of a batch.

    Attributes:
        parts: gradients by part of the network, without parts that did not run. Each row has one
            gradient for each of its directions, next to one another.
        costs: objective, float32 (rows,).
        residuals: 1 minus the probability of the label, float32 (rows,), if wanted.
        weights: float32 (rows, directions): the gradient of the margin, or of the objective where the
            others are those of drawn labels, is the sum of those along the directions, multiplied by
            these; ``None``: the gradient is that of the objective.
    """

    parts: dict[str, Factors]
    costs: Tensor
    residuals: Tensor | None = None
    weights: Tensor | None = None

    @property
    def gradients(self) -> int:
        """Number of gradients."""
        return len(self.costs) if self.weights is None else self.weights.numel()

    def cheapest(self) -> Rows:
        """The same, in the form that holds the fewest numbers."""
        return replace(self, parts={name: one.cheapest() for name, one in self.parts.items()})


_Layout = tuple[bool, frozenset[tuple[str, tuple[int, ...]]]]
"""Whether there are several rows; each part that ran, and how each of its calls has the rows."""


@dataclass(frozen=True)
class Learned:
    """What a capture has learned of a model from the batches so far, on which gradients of later ones depend.

    Attributes:
        rejected: layers whose rules are not used.
        rearranges: whether the model may reorder rows depending on the batch.
        verified: layouts in which layers ran.
    """

    rejected: tuple[str, ...] = ()
    rearranges: bool = False
    verified: frozenset[_Layout] = frozenset()

    def agrees(self, other: Learned) -> bool:
        """Whether batches in known layouts have the same gradients."""
        return (self.rejected, self.rearranges) == (other.rejected, other.rearranges)


class Capture:
    """Gradients of rows by the trained parameters of a model.

    Args:
        model: in any mode; runs in eval mode, and is left as it was.
        objective: callable (outputs, batch) -> (rows,).
        residuals: whether to compute 1 minus the probability of every label.
        directions: of a training instance; 0: its gradient is that of the objective.
        samples: labels that are drawn for a training instance.
        within: makes a context that every forward runs in.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        residuals: bool,
        directions: int = 0,
        samples: int = 0,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._within = within
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._objective = objective
        self._residuals = residuals
        self._directions = directions
        self._samples = samples
        check_model(self._model)
        self._parts, self._without_rule = parts_of(self._model)
        self._every = dict(self._parts)
        self._rejected: dict[str, Part] = {}
        self._verified: set[_Layout] = set()
        self._may_rearrange = False
        """Whether the model may reorder rows depending on the batch."""
        self._warned: set[str] = set()
        self._independent = False
        """Whether rows were found not to mix."""

    @property
    def general(self) -> tuple[str, ...]:
        """Names of the parameters whose gradients are computed without a rule."""
        rejected = [name for part in self._rejected.values() for name in part.names.values()]
        return (*self._without_rule, *rejected)

    @property
    def learned(self) -> Learned:
        """What was learned from the batches so far."""
        return Learned(tuple(self._rejected), self._may_rearrange, frozenset(self._verified))

    def learn(self, learned: Learned) -> None:
        """Go on as the capture of another process, that has seen at least one batch."""
        rejected = learned.rejected
        self._parts = {name: one for name, one in self._every.items() if name not in rejected}
        self._rejected = {name: self._every[name] for name in rejected}
        self._may_rearrange, self._verified = learned.rearranges, set(learned.verified)
        self._independent = True
        self._warn_general()

    def rows(self, batch: Batch, *, training: bool = False) -> Rows:
        """Gradients, costs and residuals of the rows of a batch.

        Args:
            batch: rows.
            training: whether they are training instances, which have directions or drawn labels, these
                by their ids.
        """
        batch = batch.to(device_of(self._model))
        with (
            evaluating(self._model),
            self._within(),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            if not self._independent:
                self._check_independent(batch)
                self._independent = True
            rows = self._verified_rows(batch, training=training)
        self._warn_general()
        finite(rows.costs, "objective")
        found = [v for f in rows.parts.values() for v in f.tensors().values()]
        all_finite([v for v in found if v.is_floating_point()], "gradient of the objective")
        return rows

    def _verified_rows(self, batch: Batch, *, training: bool = False) -> Rows:
        """The rows, once every part agrees with autograd, or is rejected, in their layout."""
        while True:
            try:
                rows, layout, calls = self._captured(batch, training=training)
                new = layout not in self._verified
                bad = self._reordered(batch, calls) if new or self._may_rearrange else []
                bad = bad or (self._disagreeing(batch) if new else [])
                reason = "row order or gradients"
            except UnknownLayoutError as error:
                bad, reason = [error.part], "layout"
            if not bad:
                self._verified.add(layout)
                return rows
            _logger.debug("without their rules, by their %s: %s", reason, bad)
            self._rejected |= {name: self._parts.pop(name) for name in bad}

    def _captured(self, batch: Batch, *, training: bool = False) -> tuple[Rows, _Layout, Calls]:
        outputs, calls = self._forward(batch)
        values = costs(self._objective, outputs, batch)
        if not values.requires_grad:
            raise InputError(
                "gram differentiates the objective, and this one cannot be differentiated: use an "
                "objective and a model without detach, no_grad or "
                "torch.utils.checkpoint(use_reentrant=True)"
            )
        if len(calls) < len(self._parts) and has_reentrant([values]):
            raise InputError(REENTRANT)
        with torch.no_grad():
            residuals = label_residuals(outputs, batch) if self._residuals else None
        weights, sums = None, [values.sum()]
        if training and self._directions:
            finite(values.detach(), "objective")  # or their eigenvectors are not found
            along, weights = directions(*logits_and_labels(outputs, batch), self._directions)
            logits = logits_of(outputs).float()
            sums = [(logits * direction).sum() for direction in along.unbind(dim=2)]
        elif training and self._samples:
            sums += sampled_costs(self._objective, outputs, batch, self._samples)
            weights = values.detach().new_zeros((len(values), len(sums)))
            weights[:, 0] = 1
        parts = self._gradients(batch, outputs, calls, sums)
        layout = _layout_of(batch, calls)
        if layout not in self._verified:
            # The objective gathers the logits of labels, which reorders no rows.
            ends = tensors([outputs]) or [values]
            self._may_rearrange = self._may_rearrange or any(map(may_rearrange, ends))
        return Rows(parts, values.detach(), residuals, weights), layout, calls

    def _forward(self, batch: Batch) -> tuple[Any, Calls]:
        with recorded(self._parts, len(batch)) as calls:
            try:
                return batch.call(self._model), calls
            except (UnknownLayoutError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                # A layer that runs for a single row is no layer that all rows share.
                for name, every in calls.items():
                    if any(call.broadcast for call in every):
                        _logger.debug("forward failed with %r broadcast: %r", name, error)
                        raise UnknownLayoutError(name) from error
                raise

    def _gradients(
        self, batch: Batch, outputs: Any, calls: Calls, sums: Sequence[Tensor]
    ) -> dict[str, Factors]:
        """Gradients of each of the sums, row by row, for each part."""
        flat, count = [(name, call) for name, every in calls.items() for call in every], len(sums)
        ends = dict(enumerate(tensors([outputs]))) if self.general else {}
        ends = {number: value for number, value in ends.items() if value.requires_grad}
        edges = [call.edge for _, call in flat] + [get_gradient_edge(v) for v in ends.values()]
        found = gradients_at(sums, edges)
        parts: dict[str, Factors] = {}
        with torch.no_grad():
            by_part: dict[str, list[Call]] = {}
            for (name, call), back in zip(flat, zip(*found, strict=True), strict=False):
                together = interleaved([call.by_row(value) for value in back])
                if together is not None:
                    inputs = call.inputs
                    inputs = inputs.float() if inputs.is_floating_point() else inputs
                    inputs = inputs if count == 1 else inputs.repeat_interleave(count, dim=0)
                    made = Call(inputs, together, call.dtype, call.makes(outputs))
                    by_part.setdefault(name, []).append(made)
            for name, every in by_part.items():
                part = self._parts[name]
                try:
                    parts[name] = part.rule.factors(part.module, frozenset(part.names), every)
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, ValueError, IndexError, TypeError) as error:
                    # A subclass of a layer that has a rule may take other inputs than its own.
                    raise UnknownLayoutError(name) from error
        if self.general:
            backs = []
            for gradients in found:
                pairs = zip(ends, gradients[len(flat) :], strict=True)
                backs.append({number: back.detach() for number, back in pairs if back is not None})
            parts |= self._general_gradients(batch, backs)
        return parts

    def _general_gradients(
        self, batch: Batch, backs: Sequence[Mapping[int, Tensor]]
    ) -> dict[str, Factors]:
        """Gradients without rules; those of a rejected part in the order of its rule."""
        gradients = RowGradients(self._model, self.general)
        together = interleaved([gradients(batch, back) for back in backs])
        assert together is not None
        sizes = gradients.sizes
        columns = dict(zip(sizes, torch.split(together, list(sizes.values()), dim=1), strict=True))
        parts: dict[str, Factors] = {}
        if self._without_rule:
            parts[GENERAL] = Explicit(torch.cat([columns[n] for n in self._without_rule], dim=1))
        for name, part in self._rejected.items():
            own = torch.cat([columns[one] for one in part.names.values()], dim=1)
            parts[name] = Explicit(own[:, part.order(own.device)])
        return parts

    def _check_independent(self, batch: Batch) -> None:
        """Check with a few rows that they do not mix."""
        few = batch.rows(0, min(len(batch), 4))
        rows = self._verified_rows(few)
        last = len(few) - 1
        alone = few.rows(last, last + 1)
        cost = costs(self._objective, alone.call(self._model), alone)
        if not torch.allclose(cost.detach(), rows.costs[last:], rtol=1e-2, atol=1e-3):
            raise InputError(
                f"the objective of a row is {rows.costs[last].item():.4g} in a batch and "
                f"{cost.item():.4g} alone: rows of a batch mix (batch statistics, an objective with a "
                f"mean), and no row has a gradient of its own"
            )

    def _reordered(self, batch: Batch, calls: Calls) -> list[str]:
        """Parts that get the rows in another order than the batch's."""
        inputs = inputs_by_row(calls)
        if len(batch) == 1 or not inputs:
            return []
        with recorded(self._parts, len(batch)) as turned:
            reversed_rows(batch).call(self._model)
        return [name for name in out_of_order(inputs, inputs_by_row(turned)) if name in self._parts]

    def _disagreeing(self, batch: Batch) -> list[str]:
        """Parts whose gradients of some rows are not autograd's for the row alone."""
        if not self._parts:
            return []
        rows, _, calls = self._captured(batch)
        tolerance = tolerance_of(self._model, (c.dtype for every in calls.values() for c in every))
        last = len(batch) - 1
        checked = sorted({0, last // 2, last})
        bad = [n for row in checked for n in self._disagreeing_for(batch, rows, row, tolerance)]
        return list(dict.fromkeys(bad))

    def _disagreeing_for(
        self, batch: Batch, rows: Rows, row: int, tolerance: float
    ) -> Iterator[str]:
        alone = batch.rows(row, row + 1)
        # Hooks check the layout of the row alone too: in a batch it may have matched by chance.
        with recorded(self._parts, 1):
            cost = costs(self._objective, alone.call(self._model), alone)
        names = [name for part in self._parts.values() for name in part.names.values()]
        parameters = dict(self._model.named_parameters(remove_duplicate=False))
        found = torch.autograd.grad(
            cost.sum(), [parameters[name] for name in names], allow_unused=True
        )
        found = tuple(None if g is None else g.to_dense() for g in found)
        truth = dict(zip(names, found, strict=True))
        scale = max((float(g.norm()) for g in found if g is not None), default=0.0)
        for name, part in self._parts.items():
            factors = rows.parts.get(name)
            gradient = None if factors is None else factors.rows(row, row + 1).explicit()[0]
            if not part.agrees(gradient, truth, scale, tolerance):
                yield name

    def _warn_general(self) -> None:
        new = [name for name in self.general if name not in self._warned]
        if not new:
            return
        self._warned.update(new)
        listed = ", ".join(new[:5]) + (", ..." if len(new) > 5 else "")
        warnings.warn(
            f"turnover: gram knows no rule for {len(new)} parameters ({listed}): their "
            f"gradients are computed row by row, which is slow and takes memory; freeze them if "
            f"they do not matter",
            UserWarning,
            stacklevel=2,
        )


def _layout_of(batch: Batch, calls: Calls) -> _Layout:
    """As long as every row has all its tokens on the first axis, their number does not matter."""
    texts = [v for v in tensors(batch.inputs) if v.dim() > 1 and not v.is_floating_point()]
    lengths = {value.shape[1] for value in texts}

    def place(call: LayerCall) -> int:
        return -1 if call.broadcast else 0 if call.folded in lengths else call.folded

    places = {name: tuple(map(place, every)) for name, every in calls.items()}
    return len(batch) > 1, frozenset(places.items())


def label_residuals(outputs: Any, batch: Batch) -> Tensor:
    """1 minus the probability of the label: float32 (rows,)."""
    return -torch.expm1(-cross_entropy(outputs, batch))
