"""The compact features: derivatives of the objective by the mask entries of a turn-over network."""

from __future__ import annotations

import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.dropout.modules import device_of, evaluating
from turnover.dropout.network import Network
from turnover.influence.gram.capture import Rows, directions_of, label_residuals
from turnover.influence.gram.factors import Explicit
from turnover.influence.linear import finite, mask_gradients
from turnover.objectives import Objective, costs, logits_of


class MaskCapture:
    """As :class:`turnover.influence.gram.capture.Capture`, by mask entries in place of parameters."""

    general: tuple[str, ...] = ()

    def __init__(
        self, network: Network, objective: Objective, *, residuals: bool, directions: int = 0
    ) -> None:
        self._network = network
        self._objective = objective
        self._residuals = residuals
        self._directions = directions

    def rows(self, batch: Batch, *, training: bool = False) -> Rows:
        """Derivatives, costs and probabilities of the rows of a batch.

        Raises:
            InputError: the objective is not finite or has no derivative.
        """
        model = self._network.model
        batch = batch.to(device_of(model))
        with evaluating(model), torch.inference_mode(False):
            with torch.no_grad(), self._network.mean():
                outputs = batch.call(model)
                values = costs(self._objective, outputs, batch)
                residuals = label_residuals(outputs, batch) if self._residuals else None
            objectives, weights = [self._objective], None
            if training and self._directions:
                along = directions_of(outputs, batch, self._directions)
                objectives, weights = _along(along.values), along.weights
            found = [mask_gradients(self._network, one, batch).float() for one in objectives]
            gradients = torch.stack(found, dim=1).flatten(0, 1)
        finite(values, "objective")
        return Rows(
            {"masks": Explicit(finite(gradients, "mask derivative"))}, values, residuals, weights
        )


def _along(values: Tensor) -> list[Objective]:
    """For each direction, an objective whose gradient by the logits it is."""

    def objective(direction: Tensor) -> Objective:
        return lambda outputs, _: (logits_of(outputs).float() * direction).sum(dim=1)

    return [objective(one) for one in values.unbind(dim=2)]
