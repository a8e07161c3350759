"""Whether a row of a batch is the same alone as in the batch, before anything is cut into rows.

A batch is cut where a tensor's first axis is as long as the batch. That is a guess: a tensor that all
rows share may be as long by chance, rows may lie on another axis, and rows may depend on one another.
Ways of computing that cut alike agree with each other and are wrong alike. What shows the fault is a
row alone, and repeated, beside the row in its batch, in the mean network.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor, nn

from turnover.batches import Batch, check_not_packed, named, tensors
from turnover.dropout.modules import device_of, evaluating
from turnover.errors import InputError
from turnover.objectives import Objective, costs, logits_of

_ROWS = 1024
"""Rows of a batch that are run at once, where the batch can be cut to them."""
_FEW = 16
"""Rows that are run where only one input can have rows."""
_GUESSES = 30
_CLOSE, _FAR = 1e-4, 1e-2
"""Shares of the scale of outputs: what rounding may make of a row in batches of one size, and what no
rounding makes of it."""
_COARSE_CLOSE, _COARSE_FAR = 5e-2, 0.25
"""Both, in half precision, quantized, or with coarse matrix products."""
_TINY = 1e-30
_WHOLE = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@dataclass(frozen=True)
class _Seen:
    """What the network gives for the rows of a batch."""

    costs: Tensor
    logits: Tensor | None
    scale: float
    """Of the costs, and of what they are computed from."""
    logit_scale: float


class RowCheck:
    """Tells which inputs of batches are cut into rows and which are shared.

    What it learns of an input by its name serves later batches, so that a run takes a few forwards of
    few rows more.

    Args:
        model: what the batches are for.
        objective: callable (outputs, batch) -> (rows,).
        within: makes a context that every forward is run in: that of the mean network.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        # A compiled model would be compiled anew for every number of rows.
        self._model: nn.Module = getattr(model, "_orig_mod", model)
        self._within = within
        self._objective = objective
        self._rowed: set[str] = set()
        self._single: set[str] = set()
        """Inputs looked at in batches of one row, in which rows cannot mix."""
        self._lengths: set[tuple[str, int]] = set()

    def __call__(self, batch: Batch) -> Batch:
        """The batch, with the names of all inputs that its rows share.

        Raises:
            InputError: the model does not take the inputs, or a row alone costs something else than in
                its batch whatever is taken for shared.
        """
        check_not_packed(batch.inputs)
        size = len(batch)
        if not size:
            return batch
        rowed = batch.by_rows()
        if any(value.layout != torch.strided or value.is_nested for _, value in rowed):
            return batch
        other = [(name, len(value)) for name, value in rowed if len(value) != size]
        self._lengths.update(other)
        same = [name for name, value in rowed if len(value) == size]
        known = [n for n in same if (n, size) in self._lengths and n not in self._rowed]
        shared = [*batch.shared, *(name for name, _ in other), *known]
        if len(known) == len(same):  # nothing would have rows
            shared, known = shared[: -len(known)], []
        batch = replace(batch, shared=tuple(dict.fromkeys(shared)))
        sure = self._rowed if size > 1 else self._rowed | self._single
        unsure = [name for name in same if name not in known and name not in sure]
        if not unsure:
            return batch
        batch = self._checked(batch, unsure)
        for name in unsure:
            if batch.shares(name):
                self._lengths.add((name, size))
            else:
                (self._rowed if size > 1 else self._single).add(name)
        return batch

    def _first(self, batch: Batch) -> _Seen:
        try:
            return self._run(batch)
        except TypeError as error:
            if self._takes(batch):
                raise
            raise InputError(
                f"{type(self._model).__name__} does not take the batch's inputs ({error}): pass adapter=, "
                f"a function from your batch to turnover.Batch(inputs, labels, ids) with what the model "
                f"is called with"
            ) from error

    def _takes(self, batch: Batch) -> bool:
        bind: Any = inspect.signature(self._model.forward).bind
        try:
            batch.call(bind)
        except TypeError:
            return False
        return True

    def _checked(self, batch: Batch, unsure: Sequence[str]) -> Batch:
        """The batch as it is, or with some of the unsure inputs shared: what a row alone agrees with."""
        size = len(batch)
        moved = batch.to(device_of(self._model))
        with self._quiet():
            as_long = [name for name, value in batch.by_rows() if len(value) == size]
            if len(as_long) == 1 and size > _FEW and self._agrees_in_few(moved.rows(0, _FEW)):
                return batch
            seen = self._first(moved if size <= _ROWS else moved.rows(0, _ROWS))
            if self._agrees(moved, seen):
                return batch
            if size > _ROWS:
                seen = self._run(moved)
            again = self._run(moved)
            if _difference(again, seen) > self._limits[0]:
                return batch  # the network draws: no two runs agree
            for some in islice(_subsets(unsure), _GUESSES):
                guess = replace(moved, shared=(*moved.shared, *some))
                if self._agrees(guess, seen, surely=True):
                    return replace(batch, shared=guess.shared)
            alone = self._tried(moved.rows(size - 1, size))
        raise InputError(_refusal(batch, unsure, seen, alone))

    def _agrees_in_few(self, few: Batch) -> bool:
        """Whether some rows agree: enough where the one input that may have rows has them."""
        seen = self._tried(few)
        return seen is not None and self._agrees(few, seen)

    def _agrees(self, batch: Batch, seen: _Seen, *, surely: bool = False) -> bool:
        """Whether rows alone, and repeated, are what they are in the batch.

        Args:
            surely: models that cannot run single rows, or several, get no benefit of the doubt.
        """
        close, far = self._limits
        size = len(seen.costs)
        for row in {size - 1, 0}:
            alone = batch.rows(row, row + 1)
            found = [self._apart(one, seen, row) for one in (alone, alone.expanded(2))]
            if all(one is not None and one <= close for one in found):
                continue
            if surely or any(one is not None and not one <= far for one in found):
                return False
            if size == 1:
                # A model may be made for single rows alone.
                return found[0] is not None
            # In a batch as large the rounding is the same. Some models cannot run a single row.
            many = self._apart(alone.expanded(size), seen, row)
            if many is None or many > close:
                return False
        return True

    def _apart(self, batch: Batch, seen: _Seen, row: int) -> float | None:
        """How far the rows of a batch are from a row seen before; ``None`` where they do not run."""
        found = self._tried(batch)
        if found is None:
            return None
        rows = slice(row, row + 1)
        logits = None if seen.logits is None else seen.logits[rows]
        return _difference(found, replace(seen, costs=seen.costs[rows], logits=logits))

    def _tried(self, batch: Batch) -> _Seen | None:
        try:
            return self._run(batch)
        except Exception:  # noqa: BLE001 - whatever a foreign model or objective raises
            return None

    def _run(self, batch: Batch) -> _Seen:
        outputs = batch.call(self._model)
        values = costs(self._objective, outputs, batch).detach()
        logits = _logits(outputs, len(values))
        # Beside logits, whatever else the model gives says nothing of them: it may be a mask of -1e4.
        held = [one for one in tensors([outputs]) if one.is_floating_point()]
        largest = max((_largest(one) for one in held), default=1.0)
        logit_scale = largest if logits is None else _largest(logits)
        finite = values[values.isfinite()].abs()
        scale = logit_scale + (float(finite.max()) if finite.numel() else 0.0)
        return _Seen(values, logits, scale + _TINY, logit_scale + _TINY)

    @property
    def _limits(self) -> tuple[float, float]:
        return (_COARSE_CLOSE, _COARSE_FAR) if _is_coarse(self._model) else (_CLOSE, _FAR)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """The mean network in eval mode; what it draws does not move the generators."""
        device = device_of(self._model)
        devices = [device] if device.type == "cuda" else []
        with (
            torch.no_grad(),
            evaluating(self._model),
            torch.random.fork_rng(devices=devices),
            self._within(),
        ):
            yield


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Some of the names, few first; never all."""
    for size in range(1, len(names)):
        yield from combinations(names, size)


def _logits(outputs: Any, rows: int) -> Tensor | None:
    try:
        found = logits_of(outputs).detach()
    except InputError:
        return None
    return found.float() if found.dim() and len(found) == rows else None


def _difference(found: _Seen, wanted: _Seen) -> float:
    """The largest difference of costs, and of logits where both have them in one shape, in their scales."""
    apart = _largest_apart(found.costs, wanted.costs) / wanted.scale
    one, other = found.logits, wanted.logits
    if one is None or other is None or one.shape[1:] != other.shape[1:]:
        return apart
    # An objective that is saturated would let anything pass.
    return max(apart, _largest_apart(one, other) / wanted.logit_scale)


def _largest_apart(found: Tensor, wanted: Tensor) -> float:
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    difference = torch.where(same, 0.0, (found - wanted).abs())
    return float(difference.nan_to_num(nan=float("inf")).max()) if difference.numel() else 0.0


def _largest(values: Tensor) -> float:
    finite = values.detach().float()
    finite = finite[finite.isfinite()]
    # Masks are often the most negative number that there is.
    finite = finite[finite.abs() < 1e30]
    if not finite.numel():
        return 0.0
    # So is what stands for it, -1e4 or -1e9, in many places: no computed number comes twice.
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


def _refusal(batch: Batch, unsure: Sequence[str], seen: _Seen, alone: _Seen | None) -> str:
    size = len(batch)
    shown = "cannot be computed" if alone is None else f"is {float(alone.costs[0]):.4g}"
    shapes = {name: tuple(value.shape) for name, value in named(batch.inputs)}
    inputs = ", ".join(f"{name or 'the input'} {shapes[name]}" for name in unsure)
    return (
        f"the objective of row {size - 1} is {float(seen.costs[-1]):.4g} in a batch of {size} rows and "
        f"{shown} alone, so its rows cannot be told apart. Inputs taken for rows: {inputs}. If all rows "
        f"share one of them, name it: adapter= gives turnover.Batch(inputs, labels, ids, shared=(name,)). "
        f"If rows lie on another axis than 0, turn it in the adapter or the model. If rows of a batch mix "
        f"(batch statistics, negatives from the batch, an objective with a mean), no row has an influence "
        f"of its own"
    )
