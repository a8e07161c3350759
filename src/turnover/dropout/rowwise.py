"""Row independence: check that a row has the same cost alone as in its batch, before batches are cut.

Tensors whose first axis is as long as the batch are cut into rows. That is a guess: all rows may share such
a tensor, rows may be on another axis, and rows may depend on one another. Computations that cut alike agree
with each other and are wrong together. Running a row alone, and repeated, in the mean network shows the
fault.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain, combinations, islice
from typing import Any

import torch
from torch import Tensor, nn

from turnover.batches import Batch, check_not_packed, named, tensors
from turnover.dropout.modules import device_of, trial, uncompiled
from turnover.dropout.row_order import largest_difference
from turnover.errors import InputError
from turnover.objectives import Objective, costs, logits_of

_log = logging.getLogger(__name__)

_ROWS = 1024
"""Rows of a batch in one forward, if the batch can be cut."""
_FEW = 16
"""Rows in a forward if only one input can have rows."""
_GUESSES = 30
_CLOSE, _FAR = 1e-4, 1e-2
"""Shares of the outputs' scale: the largest rounding error in batches of one size, and a difference that no
rounding explains."""
_COARSE_CLOSE, _COARSE_FAR = 5e-2, 0.25
"""Both, in half precision, quantized, or with coarse matrix products."""
_TINY = 1e-30
_WHOLE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class _Outcome:
    """Costs and logits of the rows of a batch."""

    costs: Tensor
    logits: Tensor | None
    scale: float
    """Of the costs and of the logits behind them."""
    logit_scale: float

    def row(self, row: int) -> _Outcome:
        rows = slice(row, row + 1)
        logits = None if self.logits is None else self.logits[rows]
        return replace(self, costs=self.costs[rows], logits=logits)

    def distance(self, found: _Outcome) -> float:
        """The largest difference of costs, and of logits of the same shape, relative to their scales."""
        distance = largest_difference(found.costs, self.costs) / self.scale
        one, other = found.logits, self.logits
        if one is None or other is None or one.shape[1:] != other.shape[1:]:
            return distance
        # The costs alone of a saturated objective would agree whatever the logits are.
        return max(distance, largest_difference(one, other) / self.logit_scale)


class RowCheck:
    """Finds out which inputs of batches have rows and which are shared by all rows.

    It remembers inputs by name, so that a run takes a few additional forwards of a few rows.

    Args:
        model: the model that runs the batches.
        objective: callable (outputs, batch) -> (rows,).
        within: makes a context for every forward, such as that of the mean network.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        # A compiled model would be compiled anew for every number of rows.
        self._model = uncompiled(model)
        self._within = within
        self._objective = objective
        self._by_row: set[str] = set()
        self._by_single_row: set[str] = set()
        """Inputs checked in batches of one row, where rows cannot depend on one another."""
        self._shared_lengths: set[tuple[str, int]] = set()

    def __call__(self, batch: Batch) -> Batch:
        """Check a batch, and name all inputs that its rows share."""
        check_not_packed(batch.inputs)
        size = len(batch)
        if not size:
            return batch
        inputs = batch.by_rows()
        if any(value.layout != torch.strided or value.is_nested for _, value in inputs):
            return batch
        other = [(name, len(value)) for name, value in inputs if len(value) != size]
        self._shared_lengths.update(other)
        same = [name for name, value in inputs if len(value) == size]
        known = [n for n in same if (n, size) in self._shared_lengths and n not in self._by_row]
        if len(known) == len(same):  # no input would have rows
            known = []
        shared = dict.fromkeys([*batch.shared, *(name for name, _ in other), *known])
        batch = replace(batch, shared=tuple(shared))
        sure = self._by_row if size > 1 else self._by_row | self._by_single_row
        unsure = [name for name in same if name not in known and name not in sure]
        if not unsure:
            return batch
        batch = self._checked(batch, unsure)
        for name in unsure:
            if batch.shares(name):
                self._shared_lengths.add((name, size))
            else:
                (self._by_row if size > 1 else self._by_single_row).add(name)
        return batch

    def _checked(self, batch: Batch, unsure: Sequence[str]) -> Batch:
        """The batch, with those of the unsure inputs shared that make a row alone agree."""
        size = len(batch)
        moved = batch.to(device_of(self._model))
        with trial(self._model), self._within():
            as_long = [name for name, value in batch.by_rows() if len(value) == size]
            if len(as_long) == 1 and size > _FEW:
                few = moved.rows(0, _FEW)
                seen = self._try(few)
                if seen is not None and self._agrees(few, seen):
                    return batch
            seen = self._first(moved if size <= _ROWS else moved.rows(0, _ROWS))
            if self._agrees(moved, seen):
                return batch
            if size > _ROWS:
                seen = self._run(moved)
            if seen.distance(self._run(moved)) > self._limits()[0]:
                return batch  # the network is random: no two runs agree
            subsets = chain.from_iterable(combinations(unsure, n) for n in range(1, len(unsure)))
            for some in islice(subsets, _GUESSES):
                guess = replace(moved, shared=(*moved.shared, *some))
                if self._agrees(guess, seen, strict=True):
                    return replace(batch, shared=guess.shared)
            alone = self._try(moved.rows(size - 1, size))
        raise InputError(_refusal(batch, unsure, seen, alone))

    def _first(self, batch: Batch) -> _Outcome:
        try:
            return self._run(batch)
        except TypeError as error:
            bind: Any = inspect.signature(self._model.forward).bind
            try:
                batch.call(bind)
            except TypeError:
                raise InputError(
                    f"{type(self._model).__name__} does not take the batch's inputs ({error}): pass "
                    f"adapter=, a function from your batch to turnover.Batch(inputs, labels, ids) with the "
                    f"arguments of the model"
                ) from error
            raise

    def _agrees(self, batch: Batch, seen: _Outcome, *, strict: bool = False) -> bool:
        """Whether rows alone, and repeated, agree with the rows in the batch.

        Args:
            strict: also where the model cannot run single rows, or several.
        """
        close, far = self._limits()
        size = len(seen.costs)
        for row in {size - 1, 0}:
            alone = batch.rows(row, row + 1)
            wanted = seen.row(row)
            found = [self._distance(one, wanted) for one in (alone, alone.expanded(2))]
            if all(one is not None and one <= close for one in found):
                continue
            if strict or any(one is not None and not one <= far for one in found):
                return False
            if size == 1:  # some models run only single rows
                return found[0] is not None
            # A batch of the same size has the same rounding; some models cannot run a single row.
            many = self._distance(alone.expanded(size), wanted)
            if many is None or many > close:
                return False
        return True

    def _distance(self, batch: Batch, wanted: _Outcome) -> float | None:
        found = self._try(batch)
        return None if found is None else wanted.distance(found)

    def _try(self, batch: Batch) -> _Outcome | None:
        try:
            return self._run(batch)
        except Exception as error:  # noqa: BLE001 - a user's model or objective may raise anything
            _log.debug("a batch of %d rows cannot be run: %r", len(batch), error)
            return None

    def _run(self, batch: Batch) -> _Outcome:
        outputs = batch.call(self._model)
        values = costs(self._objective, outputs, batch).detach()
        logits = _logits(outputs, len(values))
        # Beside logits, other outputs do not affect the scale: one may be a mask of -1e4.
        floats = [one for one in tensors([outputs]) if one.is_floating_point()]
        largest = max((_largest(one) for one in floats), default=1.0)
        logit_scale = largest if logits is None else _largest(logits)
        finite = values[values.isfinite()].abs()
        scale = logit_scale + (float(finite.max()) if finite.numel() else 0.0)
        return _Outcome(values, logits, scale + _TINY, logit_scale + _TINY)

    def _limits(self) -> tuple[float, float]:
        return (_COARSE_CLOSE, _COARSE_FAR) if _is_coarse(self._model) else (_CLOSE, _FAR)


def _logits(outputs: Any, rows: int) -> Tensor | None:
    try:
        found = logits_of(outputs).detach()
    except InputError:
        return None
    return found.float() if found.dim() and len(found) == rows else None


def _largest(values: Tensor) -> float:
    """The largest magnitude of computed values, without the constants that stand for minus infinity."""
    finite = values.detach().float()
    finite = finite[finite.isfinite()]
    finite = finite[finite.abs() < 1e30]  # the most negative number of a type
    if not finite.numel():
        return 0.0
    # Others are -1e4 or -1e9, in many elements: no computed number occurs twice.
    rest = finite[finite != finite.min()]
    filled = len(rest) < len(finite) - 1 and rest.numel()
    return float((rest if filled else finite).abs().max())


def _is_coarse(model: nn.Module) -> bool:
    if any(one.dtype not in _WHOLE for one in model.parameters()):
        return True
    device = device_of(model).type
    if torch.is_autocast_enabled(device) or torch.get_float32_matmul_precision() != "highest":
        return True
    if device != "cpu" and torch.backends.cuda.matmul.allow_tf32:
        return True
    return any("quantized" in type(module).__module__ for module in model.modules())


def _refusal(batch: Batch, unsure: Sequence[str], seen: _Outcome, alone: _Outcome | None) -> str:
    size = len(batch)
    shown = "cannot be computed" if alone is None else f"is {float(alone.costs[0]):.4g}"
    shapes = {name: tuple(value.shape) for name, value in named(batch.inputs)}
    inputs = ", ".join(f"{name or 'the input'} {shapes[name]}" for name in unsure)
    return (
        f"the objective of row {size - 1} is {float(seen.costs[-1]):.4g} in a batch of {size} rows and "
        f"{shown} alone, so its rows cannot be told apart. Inputs taken for rows: {inputs}. If all rows "
        f"share one of them, name it: adapter= gives turnover.Batch(inputs, labels, ids, shared=(name,)). "
        f"If rows lie on another axis than 0, move it in the adapter or the model. If rows of a batch mix "
        f"(batch statistics, negatives from the batch, an objective with a mean), no row has an influence "
        f"of its own"
    )
