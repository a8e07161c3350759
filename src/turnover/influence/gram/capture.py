"""One forward and one backward of a batch, and the gradients of every row that fall out of them.

Hooks keep what every trained layer was given; the backward of the summed objective gives the gradient
of its output for each row, as long as rows do not mix. What no rule knows goes the general way
(:mod:`turnover.influence.gram.general`), and so does what a rule gets wrong. That is looked at on the first
batch and on every later one in which other layers run, or otherwise than before: some layers run for some
rows alone (experts), twice, or not at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from turnover.batches import Batch, tensors
from turnover.dropout.checkpoints import has_reentrant
from turnover.dropout.modules import device_of, evaluating, in_this_thread
from turnover.dropout.row_order import may_rearrange, out_of_order, reversed_rows
from turnover.errors import InputError
from turnover.influence.gram.directions import Directions, directions
from turnover.influence.gram.factors import Explicit, Factors
from turnover.influence.gram.general import RowGradients
from turnover.influence.gram.parts import Part, agrees, check, divided
from turnover.influence.gram.pulls import REENTRANT, interleaved, pulled_back
from turnover.influence.gram.rules import Call
from turnover.influence.linear import finite
from turnover.objectives import Objective, costs, cross_entropy, logits_and_labels, logits_of

GENERAL = "other parameters"
"""The part that holds parameters without a rule."""


@dataclass(frozen=True)
class Rows:
    """What is known of the rows of a batch.

    Attributes:
        parts: gradients by part of the network; a part that the rows did not come by is left out. Each
            row has one for each of its directions, one below another.
        costs: objective, float32 (rows,).
        residuals: 1 minus the probability of the label, float32 (rows,), where it is asked for.
        weights: float32 (rows, directions), that make the gradient of the margin of those along the
            directions; ``None``: the gradient is that of the objective.
    """

    parts: dict[str, Factors]
    costs: Tensor
    residuals: Tensor | None = None
    weights: Tensor | None = None

    @property
    def gradients(self) -> int:
        """How many there are."""
        return len(self.costs) if self.weights is None else self.weights.numel()


@dataclass(frozen=True)
class _Seen:
    inputs: Tensor
    edge: GradientEdge
    spread: bool


_Layout = tuple[bool, frozenset[tuple[str, tuple[bool, ...]]]]
"""Whether there are several rows, and parts that ran, for each of their calls whether all rows shared it."""


class Capture:
    """Gradients of rows by the trained parameters of a model.

    Args:
        model: in any mode; it is run in eval mode, and left as it was.
        objective: callable (outputs, batch) -> (rows,).
        residuals: whether to find the probability of every label.
        directions: of a training instance; 0: its gradient is that of the objective.
        within: makes a context that every forward is run in.

    Raises:
        InputError: no parameter is trained, or batch statistics are used even in eval mode.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        residuals: bool,
        directions: int = 0,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._within = within
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._objective = objective
        self._residuals = residuals
        self._directions = directions
        check(self._model)
        self._parts, self._general = divided(self._model)
        self._given_up: dict[str, Part] = {}
        self._known: set[_Layout] = set()
        self._rearranges = False
        """Whether the model may bring rows in an order that depends on the batch."""
        self._said: set[str] = set()
        self._checked = False

    @property
    def general(self) -> tuple[str, ...]:
        """Names of the parameters that no rule knows, or that a rule got wrong."""
        given_up = [name for part in self._given_up.values() for name in part.parameters]
        return (*self._general, *given_up)

    def rows(self, batch: Batch, *, training: bool = False) -> Rows:
        """Gradients, costs and probabilities of the rows of a batch.

        Args:
            batch: rows.
            training: whether they are training instances, which have directions.

        Raises:
            InputError: the objective is not finite, has no derivative, does not give one number for
                each row, or one row's depends on other rows.
        """
        batch = batch.to(device_of(self._model))
        with (
            evaluating(self._model),
            self._within(),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            if not self._checked:
                self._check_first(batch)
                self._checked = True
            rows = self._settled(batch, self._directions if training else 0)
        self._say_general()
        finite(rows.costs, "objective")
        for factors in rows.parts.values():
            for name, values in factors.tensors().items():
                if name != "tokens":
                    finite(values, "gradient of the objective")
        return rows

    def _settled(self, batch: Batch, count: int = 0) -> Rows:
        """The rows, once every part of a layout that is new agrees with autograd or is given up."""
        while True:
            try:
                rows, layout, seen = self._captured(batch, count)
                new = layout not in self._known
                bad = self._disordered(batch, seen) if new or self._rearranges else []
                bad = bad or (self._disagreeing(batch) if new else [])
            except _UnknownLayoutError as error:
                self._give_up([error.part])
                continue
            if not bad:
                self._known.add(layout)
                return rows
            self._give_up(bad)

    def _captured(
        self, batch: Batch, count: int = 0
    ) -> tuple[Rows, _Layout, dict[str, list[Tensor]]]:
        """The rows, the layout, and the inputs of the calls that rows do not share."""
        seen: dict[str, list[_Seen]] = {}
        try:
            with self._watched(len(batch), seen):
                outputs = batch.call(self._model)
        except _UnknownLayoutError:
            raise
        except Exception as error:
            # An expert that one row comes by is no layer that all rows share.
            for name, every in seen.items():
                if any(one.spread for one in every):
                    raise _UnknownLayoutError(name) from error
            raise
        values = costs(self._objective, outputs, batch)
        if not values.requires_grad:
            raise InputError(
                "gram differentiates the objective, and this one cannot be differentiated: use an "
                "objective and a model without detach, no_grad or "
                "torch.utils.checkpoint(use_reentrant=True)"
            )
        if len(seen) < len(self._parts) and has_reentrant([values]):
            raise InputError(REENTRANT)
        with torch.no_grad():
            residuals = label_residuals(outputs, batch) if self._residuals else None
        calls = [(name, one) for name, every in seen.items() for one in every]
        given = dict(enumerate(tensors([outputs]))) if self.general else {}
        given = {number: one for number, one in given.items() if one.requires_grad}
        edges = [one.edge for _, one in calls] + [get_gradient_edge(v) for v in given.values()]
        weights, pulled = None, [values.sum()]
        if count:
            along = directions_of(outputs, batch, count)
            weights = along.weights
            logits = logits_of(outputs).float()
            pulled = [(logits * one).sum() for one in along.values.unbind(dim=2)]
        found = pulled_back(pulled, edges)
        parts: dict[str, Factors] = {}
        with torch.no_grad():
            by_part: dict[str, list[Call]] = {}
            for (name, one), back in zip(calls, zip(*found, strict=True), strict=False):
                together = interleaved(back)
                if together is not None:
                    inputs = _real(one.inputs).repeat_interleave(len(pulled), dim=0)
                    by_part.setdefault(name, []).append(Call(inputs, together))
            for name, made in by_part.items():
                part = self._parts[name]
                parts[name] = part.rule.factors(part.module, part.trained, made)
        if self.general:
            pulls = []
            for one_found in found:
                pairs = zip(given, one_found[len(calls) :], strict=True)
                pulls.append({number: back.detach() for number, back in pairs if back is not None})
            parts |= self._generally(batch, pulls)
        calls_of = {name: tuple(one.spread for one in every) for name, every in seen.items()}
        layout = (len(batch) > 1, frozenset(calls_of.items()))
        if layout not in self._known:
            # Of the objective, which picks the logits of labels, nothing goes to a layer.
            held = tensors([outputs]) or [values]
            self._rearranges = self._rearranges or any(map(may_rearrange, held))
        return Rows(parts, values.detach(), residuals, weights), layout, _inputs(seen)

    def _generally(self, batch: Batch, pulls: Sequence[Mapping[int, Tensor]]) -> dict[str, Factors]:
        """Gradients without rules, those of a part given up in the order of its rule's."""
        gradients = RowGradients(self._model, self.general)
        together = interleaved([gradients(batch, one) for one in pulls])
        assert together is not None
        sizes = gradients.sizes
        columns = dict(zip(sizes, torch.split(together, list(sizes.values()), dim=1), strict=True))
        made: dict[str, Factors] = {}
        if self._general:
            made[GENERAL] = Explicit(torch.cat([columns[name] for name in self._general], dim=1))
        for name, part in self._given_up.items():
            own = torch.cat([columns[one] for one in part.parameters], dim=1)
            made[name] = Explicit(own[:, part.order(own.device)])
        return made

    @contextmanager
    def _watched(self, rows: int, seen: dict[str, list[_Seen]]) -> Iterator[None]:
        """What every part is given and gives is kept in ``seen``."""
        handles = []

        def watch(name: str) -> Any:
            def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                inputs = args[0] if args else kwargs.get("input", next(iter(kwargs.values()), None))
                if not isinstance(output, Tensor) or not isinstance(inputs, Tensor):
                    raise _UnknownLayoutError(name)
                if not output.requires_grad:
                    return None
                if not output.dim() or not inputs.dim():
                    raise _UnknownLayoutError(name)
                # What all rows share (position embeddings) gets a gradient for each row.
                spread = len(output) == len(inputs) == 1 < rows
                if spread:
                    output = output.expand(rows, *output.shape[1:])
                    inputs = inputs.expand(rows, *inputs.shape[1:])
                if len(output) != rows or len(inputs) != rows:
                    raise _UnknownLayoutError(name)
                edge = get_gradient_edge(output)
                seen.setdefault(name, []).append(_Seen(inputs.detach(), edge, spread))
                return output if spread else None

            return hook

        try:
            for name, part in self._parts.items():
                hook = in_this_thread(watch(name))
                handles.append(part.module.register_forward_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_first(self, batch: Batch) -> None:
        """Look at a few rows, which is cheaper than at all, and whether they mix."""
        few = batch.rows(0, min(len(batch), 4))
        rows = self._settled(few)
        last = len(few) - 1
        alone = few.rows(last, last + 1)
        cost = costs(self._objective, alone.call(self._model), alone)
        if not torch.allclose(cost.detach(), rows.costs[last:], rtol=1e-2, atol=1e-3):
            raise InputError(
                f"the objective of a row is {rows.costs[last].item():.4g} in a batch and "
                f"{cost.item():.4g} alone: rows of a batch mix (batch statistics, an objective with a "
                f"mean), and no row has a gradient of its own"
            )

    def _disordered(self, batch: Batch, inputs: Mapping[str, Sequence[Tensor]]) -> list[str]:
        """Parts that see the rows in another order than the batch's."""
        if len(batch) == 1 or not inputs:
            return []
        turned: dict[str, list[_Seen]] = {}
        backward = reversed_rows(batch)
        with self._watched(len(batch), turned):
            backward.call(self._model)
        return [name for name in out_of_order(inputs, _inputs(turned)) if name in self._parts]

    def _disagreeing(self, batch: Batch) -> list[str]:
        """Parts whose gradients of some rows are not those of autograd on the row alone."""
        if not self._parts:
            return []
        rows, *_ = self._captured(batch)
        last = len(batch) - 1
        bad: dict[str, None] = {}
        for row in sorted({0, last // 2, last}):
            bad |= dict.fromkeys(self._wrong_for(batch, rows, row))
        return list(bad)

    def _wrong_for(self, batch: Batch, rows: Rows, row: int) -> Iterator[str]:
        alone = batch.rows(row, row + 1)
        # A layer that is given something else than rows may by chance be given as many in a batch.
        with self._watched(1, {}):
            cost = costs(self._objective, alone.call(self._model), alone)
        names = [name for part in self._parts.values() for name in part.parameters]
        wanted = dict(self._model.named_parameters(remove_duplicate=False))
        found = torch.autograd.grad(cost.sum(), [wanted[name] for name in names], allow_unused=True)
        found = tuple(None if g is None else g.to_dense() for g in found)
        truth = dict(zip(names, found, strict=True))
        scale = max((float(g.norm()) for g in found if g is not None), default=0.0)
        for name, part in self._parts.items():
            factors = rows.parts.get(name)
            given = None if factors is None else factors.rows(row, row + 1).explicit()[0]
            if not agrees(given, part, truth, scale):
                yield name

    def _give_up(self, names: Sequence[str]) -> None:
        self._given_up |= {name: self._parts.pop(name) for name in names}

    def _say_general(self) -> None:
        new = [name for name in self.general if name not in self._said]
        if not new:
            return
        self._said.update(new)
        listed = ", ".join(new[:5]) + (", ..." if len(new) > 5 else "")
        warnings.warn(
            f"turnover: gram knows no rule for {len(new)} parameters ({listed}): their "
            f"gradients are computed row by row, which is slow and takes memory; freeze them if "
            f"they do not matter",
            UserWarning,
            stacklevel=2,
        )


def _inputs(seen: Mapping[str, Sequence[_Seen]]) -> dict[str, list[Tensor]]:
    """Inputs of the calls that rows do not share."""
    return {name: [one.inputs for one in every if not one.spread] for name, every in seen.items()}


class _UnknownLayoutError(Exception):
    """A part's inputs or outputs are not laid out by rows."""

    def __init__(self, part: str) -> None:
        super().__init__(part)
        self.part = part


def directions_of(outputs: Any, batch: Batch, count: int) -> Directions:
    """Directions of the rows of a batch.

    Raises:
        InputError: no logits, or no labels that are classes.
    """
    logits, labels = logits_and_labels(outputs, batch)
    return directions(logits, labels, count)


def label_residuals(outputs: Any, batch: Batch) -> Tensor:
    """1 minus the probability of the label: float32 (rows,).

    Raises:
        InputError: no labels that are classes.
    """
    return -torch.expm1(-cross_entropy(outputs, batch))


def _real(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values
