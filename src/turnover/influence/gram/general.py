"""Gradients of single rows by any parameter, through ``torch.func``: always right, never fast."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from turnover.batches import Batch, named, tensors

_ELEMENTS = 2**24
"""Numbers in the gradients of the rows that are computed at once: 64 MB."""
_FALLBACK = "There is a performance drop because we have not yet implemented the batching rule"
"""Torch says so for each operation; :class:`~turnover.influence.gram.capture.Capture` warns once."""
_logger = logging.getLogger(__name__)


class RowGradients:
    """Gradients of each row's objective by some parameters.

    Args:
        model: in eval mode.
        names: of the parameters.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._model = model
        found = dict(model.named_parameters(remove_duplicate=False))
        self._parameters = {name: found[name] for name in names}
        self._step = max(1, _ELEMENTS // max(1, sum(self.sizes.values())))

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers in each parameter, in the order of the columns."""
        return {name: parameter.numel() for name, parameter in self._parameters.items()}

    def __call__(self, batch: Batch, back: Mapping[int, Tensor]) -> Tensor:
        """The gradients, float32 (rows, parameters).

        Args:
            batch: rows.
            back: gradients of the objective at tensors of the model's outputs, by their number.
        """
        size = len(batch)
        try:
            starts = range(0, size, self._step)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=_FALLBACK)
                return torch.cat([self._vectorized(batch, back, i, i + self._step) for i in starts])
        except (RuntimeError, ValueError, TypeError) as error:
            # A forward that looks at its values or its batch size.
            _logger.debug("row gradients one by one, as vmap failed: %r", error)
            return torch.cat([self._single(batch.rows(i, i + 1), back, i) for i in range(size)])

    def _vectorized(
        self, batch: Batch, back: Mapping[int, Tensor], start: int, stop: int
    ) -> Tensor:
        size = len(batch)
        by_row = [
            bool(value.dim()) and len(value) == size and not batch.shares(name)
            for name, value in named(batch.inputs)
        ]
        pairs = list(zip(tensors(batch.inputs), by_row, strict=True))
        inputs = [value[start:stop] if rowed else value for value, rowed in pairs]
        dims = [0 if rowed else None for rowed in by_row]

        def objective(
            parameters: dict[str, Tensor], row: list[Tensor], row_back: list[Tensor]
        ) -> Tensor:
            whole = iter([v[None] if rowed else v for v, rowed in zip(row, by_row, strict=True)])
            filled = Batch(batch.inputs).mapped(lambda _: next(whole))

            def run(*args: Any, **kwargs: Any) -> Any:
                return torch.func.functional_call(self._model, parameters, args, kwargs)

            outputs = tensors([filled.call(cast(nn.Module, run))])
            return _weighted(outputs, dict(zip(back, [one[None] for one in row_back], strict=True)))

        each = torch.func.vmap(torch.func.grad(objective), in_dims=(None, dims, 0))
        parameters = {name: value.detach() for name, value in self._parameters.items()}
        found = each(parameters, inputs, [value[start:stop] for value in back.values()])
        return torch.cat([found[n].flatten(1).float() for n in self._parameters], dim=1).detach()

    def _single(self, row: Batch, back: Mapping[int, Tensor], index: int) -> Tensor:
        of_row = {number: value[index : index + 1] for number, value in back.items()}
        value = _weighted(tensors([row.call(self._model)]), of_row)
        parameters = list(self._parameters.values())
        found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found]).float()[None].detach()


def _weighted(outputs: Sequence[Tensor], back: Mapping[int, Tensor]) -> Tensor:
    """A number whose gradient at the outputs is ``back``, as the objective's is."""
    return torch.stack([(outputs[number] * value).sum() for number, value in back.items()]).sum()
