"""The compact features: derivatives of the objective by the mask entries of a turn-over network."""

from __future__ import annotations

import torch

from turnover.batches import Batch
from turnover.influence.engine import finite
from turnover.influence.gram.capture import Rows, evaluating, wrongness
from turnover.influence.gram.factors import Explicit
from turnover.influence.linear import mask_gradients
from turnover.network import Network
from turnover.objectives import Objective, costs
from turnover.sites import device_of


class MaskCapture:
    """As :class:`turnover.influence.gram.capture.Capture`, by mask entries in place of parameters."""

    general: tuple[str, ...] = ()

    def __init__(self, network: Network, objective: Objective, *, wrong: bool) -> None:
        self._network = network
        self._objective = objective
        self._wrong = wrong

    def rows(self, batch: Batch) -> Rows:
        """Derivatives, costs and probabilities of the rows of a batch.

        Raises:
            InputError: the objective is not finite or has no derivative.
        """
        model = self._network.model
        batch = batch.to(device_of(model))
        with evaluating(model), torch.inference_mode(False):
            gradients = mask_gradients(self._network, self._objective, batch).float()
            with torch.no_grad(), self._network.mean():
                outputs = batch.call(model)
                values = costs(self._objective, outputs, batch)
                wrong = wrongness(outputs, batch) if self._wrong else None
        finite(values, "objective")
        return Rows({"masks": Explicit(finite(gradients, "mask derivative"))}, values, wrong)
