"""Gradients of single rows by any parameter, through ``torch.func``: right for all, fast for none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from turnover.batches import Batch, named, tensors

_ELEMENTS = 2**24
"""Numbers in the gradients of the rows that are computed at once: 64 MB."""

Parameters = dict[str, Tensor]


class RowGradients:
    """Gradients of each row's objective by some parameters.

    Args:
        model: in eval mode.
        names: of the parameters.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._model = model
        found = dict(model.named_parameters(remove_duplicate=False))
        self._wanted = {name: found[name] for name in names}
        self._step = max(1, _ELEMENTS // max(1, sum(p.numel() for p in self._wanted.values())))

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers in each parameter, in the order of the columns."""
        return {name: parameter.numel() for name, parameter in self._wanted.items()}

    def __call__(self, batch: Batch, back: Mapping[int, Tensor]) -> Tensor:
        """The gradients, float32 (rows, parameters).

        Args:
            batch: rows.
            back: gradients of the objective by tensors of the model's outputs, by their number.
        """
        size = len(batch)
        try:
            starts = range(0, size, self._step)
            return torch.cat([self._together(batch, back, i, i + self._step) for i in starts])
        except (RuntimeError, ValueError, TypeError):
            # A forward that looks at its values, or at its batch size, cannot be vectorised.
            return torch.cat([self._one(batch.rows(i, i + 1), back, i) for i in range(size)])

    def _together(self, batch: Batch, back: Mapping[int, Tensor], start: int, stop: int) -> Tensor:
        size = len(batch)
        values = tensors(batch.inputs)
        by_row = [
            bool(one.dim()) and len(one) == size and not batch.shares(name)
            for name, one in named(batch.inputs)
        ]
        inputs = [v[start:stop] if rowed else v for v, rowed in zip(values, by_row, strict=True)]
        dims = [0 if rowed else None for rowed in by_row]

        def value(parameters: Parameters, row: list[Tensor], pulls: list[Tensor]) -> Tensor:
            whole = iter([v[None] if rowed else v for v, rowed in zip(row, by_row, strict=True)])
            filled = Batch(batch.inputs).mapped(lambda _: next(whole))

            def run(*args: Any, **kwargs: Any) -> Any:
                return torch.func.functional_call(self._model, parameters, args, kwargs)

            outputs = tensors([filled.call(cast(nn.Module, run))])
            by_number = dict(zip(back, [pull[None] for pull in pulls], strict=True))
            return _pulled(outputs, by_number)

        each = torch.func.vmap(torch.func.grad(value), in_dims=(None, dims, 0))
        parameters = {name: value.detach() for name, value in self._wanted.items()}
        found = each(parameters, inputs, [pull[start:stop] for pull in back.values()])
        return torch.cat([found[name].flatten(1).float() for name in self._wanted], dim=1).detach()

    def _one(self, row: Batch, back: Mapping[int, Tensor], index: int) -> Tensor:
        pulls = {number: pull[index : index + 1] for number, pull in back.items()}
        value = _pulled(tensors([row.call(self._model)]), pulls)
        wanted = list(self._wanted.values())
        found = torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found]).float()[None].detach()


def _pulled(outputs: Sequence[Tensor], back: Mapping[int, Tensor]) -> Tensor:
    """A number whose gradient is that of the objective, of which the outputs' gradients are known."""
    terms = [(outputs[number] * pull).sum() for number, pull in back.items()]
    return torch.stack(terms).sum()
