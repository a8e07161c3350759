"""Compact features: derivatives of the objective by the mask entries of a turn-over network."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from turnover.batches import Batch
from turnover.dropout.modules import device_of, evaluating
from turnover.dropout.network import Network
from turnover.influence.gradients import finite, mask_gradients
from turnover.influence.gram.capture import Learned, Rows, label_residuals
from turnover.influence.gram.directions import directions
from turnover.influence.gram.factors import Explicit
from turnover.objectives import Objective, costs, logits_and_labels, logits_of


class MaskCapture:
    """Like :class:`turnover.influence.gram.capture.Capture`, by mask entries instead of parameters."""

    general: tuple[str, ...] = ()
    learned = Learned()

    def learn(self, learned: Learned) -> None:
        """Learn nothing: gradients do not depend on earlier batches."""

    def __init__(
        self, network: Network, objective: Objective, *, residuals: bool, directions: int = 0
    ) -> None:
        self._network = network
        self._objective = objective
        self._residuals = residuals
        self._directions = directions

    def rows(self, batch: Batch, *, training: bool = False) -> Rows:
        """Derivatives, costs and residuals of the rows of a batch."""
        model = self._network.model
        batch = batch.to(device_of(model))
        with evaluating(model), torch.inference_mode(False):
            with torch.no_grad(), self._network.mean():
                outputs = batch.call(model)
                values = costs(self._objective, outputs, batch)
                residuals = label_residuals(outputs, batch) if self._residuals else None
            objectives: list[Objective] = [self._objective]
            weights = None
            if training and self._directions:
                finite(values, "objective")  # or their eigenvectors are not found
                along, weights = directions(*logits_and_labels(outputs, batch), self._directions)
                objectives = [partial(_along, direction) for direction in along.unbind(dim=2)]
            found = [mask_gradients(self._network, one, batch).float() for one in objectives]
            gradients = finite(torch.stack(found, dim=1).flatten(0, 1), "mask derivative")
        return Rows({"masks": Explicit(gradients)}, finite(values, "objective"), residuals, weights)


def _along(direction: Tensor, outputs: Any, _batch: Batch) -> Tensor:
    """The objective whose gradient by the logits is a direction."""
    return (logits_of(outputs).float() * direction).sum(dim=1)
