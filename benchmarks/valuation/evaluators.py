"""Beside OpenDataVal: LossVal, margins followed along a training, and a budget for Beta-Shapley."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import geomloss
import numpy as np
import torch
from numpy.typing import NDArray
from opendataval.dataval import BetaShapley, GrTMCSampler
from opendataval.dataval.api import DataEvaluator, ModelMixin
from torch import Tensor, nn

import turnover
from turnover.batches import Batch
from turnover.integrations.sklearn import TurnoverClassifier

_LEAST = 1e-8  # keeps the gradient of a logarithm finite


class LossVal(DataEvaluator, ModelMixin):  # type: ignore[misc]
    """LossVal of Wibiral et al. (2024), after its paper (arXiv 2412.04158).

    Every training row has a weight, 1 at the start and learned with the network: the loss of a batch is the
    sum of weight times cross entropy, times the square of the Sinkhorn distance between the batch, under
    its weights, and the validation inputs. The weights are the values.

    Args:
        epochs: of the training, in the place of those that ``train`` is given.
        batch_size: likewise.
        random_state: OpenDataVal's.
    """

    def __init__(self, epochs: int = 30, batch_size: int = 32, random_state: Any = None) -> None:
        super().__init__(random_state)
        self._epochs, self._size = epochs, batch_size

    def train_data_values(self, *, lr: float = 0.01, **__: Any) -> LossVal:
        """Train the network and the weights together by Adam."""
        model: nn.Module = self.pred_model.clone().train()
        self._weights = torch.ones(len(self.x_train), requires_grad=True)
        optimizer = torch.optim.Adam([*model.parameters(), self._weights], lr=lr)
        for _ in range(self._epochs):
            for rows in torch.split(torch.randperm(len(self.x_train)), self._size):
                loss = self._loss(model, rows)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return self

    def _loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        inputs, weights = self.x_train[rows], self._weights[rows]
        costs = -(self.y_train[rows] * (model(inputs) + _LEAST).log()).sum(dim=1)
        reach = torch.cdist(inputs, self.x_valid).max().item()
        distance = geomloss.SamplesLoss("sinkhorn", diameter=1.1 * reach)
        ones = torch.ones(len(self.x_valid))
        apart: Tensor = distance(weights, inputs, ones, self.x_valid)
        loss: Tensor = (weights @ costs) * apart**2
        return loss

    def evaluate_data_values(self) -> NDArray[np.float32]:
        """Return the weights: float32 (train,)."""
        return self._weights.detach().numpy()


class LabelErrors(DataEvaluator):  # type: ignore[misc]
    """Minus the log-odds that a label is wrong, from inputs and labels alone."""

    def train_data_values(self, *_: Any, **__: Any) -> LabelErrors:
        """Judge the labels; nothing is trained by gradients."""
        found = turnover.label_errors(self.x_train, self.y_train.argmax(dim=1))
        self._values = -found.suspicion
        return self

    def evaluate_data_values(self) -> NDArray[np.float64]:
        """Return the values: float64 (train,)."""
        return self._values


class MeanMargin(DataEvaluator, ModelMixin):  # type: ignore[misc]
    """Margin of the label, averaged over the epochs of a training (AUM; Pleiss et al. 2020)."""

    def train_data_values(self, *, epochs: int = 1, **given: Any) -> MeanMargin:
        """Train epoch by epoch; Adam starts anew with each, as ``fit`` ends there."""
        model, labels = self.pred_model.clone(), self.y_train.bool()
        margins = []
        for _ in range(epochs):
            model.fit(self.x_train, self.y_train, epochs=1, **given)
            logs = _log(model.predict(self.x_train))
            others = logs.masked_fill(labels, -torch.inf).amax(dim=1)
            margins.append(logs[labels] - others)
        self._values = torch.stack(margins).mean(dim=0)
        return self

    def evaluate_data_values(self) -> NDArray[np.float32]:
        """Return the mean margins: float32 (train,)."""
        return self._values.numpy()


class Permutations(GrTMCSampler):  # type: ignore[misc]
    """OpenDataVal's sampler of permutations, ended by a number of trainings."""

    def __init__(self, trainings: int, random_state: Any) -> None:
        endless = {"max_mc_epochs": 10**9, "models_per_epoch": 1, "cache_name": None}
        super().__init__(**endless, random_state=random_state)
        self._left = trainings

    def set_evaluator(self, value_func: Callable[..., float]) -> None:
        """Count the trainings; each evaluation is one."""

        def counted(*args: Any, **kwargs: Any) -> float:
            self._left -= 1
            return value_func(*args, **kwargs)

        super().set_evaluator(counted)

    def _compute_gr_statistic(self, *_: Any) -> float:
        return 0.0 if self._left <= 0 else float(self.GR_MAX)


def beta_shapley(trainings: int, random_state: Any) -> DataEvaluator:
    """OpenDataVal's Beta-Shapley by whole permutations, until so many networks are trained."""
    return BetaShapley(Permutations(trainings, random_state))


def wide(seed: int, _: Any, x: Tensor, y: Tensor, **__: Any) -> turnover.Influence:
    """Train turn-over dropout's classifier of tables, in the place of OpenDataVal's network."""
    trained = TurnoverClassifier(random_state=seed).fit(x.numpy(), y.argmax(dim=1).numpy())

    def encoded(rows: tuple[Tensor, Tensor]) -> Batch:
        inputs = trained.encoder_.transform(rows[0].numpy())
        return Batch(torch.from_numpy(inputs).float(), rows[1])

    return turnover.Influence(trained.network_, adapter=encoded)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
