"""Influence as an OpenDataVal ``DataEvaluator``. Needs ``pip install opendataval``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset

from turnover.errors import InputError, needing
from turnover.influence.estimator import Influence
from turnover.integrations.loaders import LoaderInfluence

with needing("the evaluator", "opendataval"):
    from opendataval.dataval.api import DataEvaluator, ModelMixin

_ROWS = 256
_VALUES = ("validation", "self")


class _LogProbabilities(nn.Module):
    """Log-probabilities, as logits, of OpenDataVal's classifiers, which end in a softmax."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        probabilities: Tensor = self.model(x)
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()


def gram(pred_model: Any, x: Any, y: Tensor, *args: Any, **kwargs: Any) -> Influence:
    """Train a copy of OpenDataVal's own network by its own ``fit``, and explain it by gram."""
    if not isinstance(pred_model, nn.Module):
        raise InputError(
            f"gram needs a torch model, and pred_model is a {type(pred_model).__name__}: use one of "
            f"opendataval's torch models, or pass train="
        )
    # Experiments such as remove_high_low begin every training from the evaluator's own network.
    trained: Any = copy.deepcopy(pred_model)
    trained.fit(x, y, *args, **kwargs)
    return Influence(_LogProbabilities(trained), method="gram")


class TurnoverEvaluator(DataEvaluator, ModelMixin):  # type: ignore[misc]
    """Data values by influence: high = valuable.

    Args:
        train: trains a network on ``(pred_model, x_train, y_train, *args, **kwargs)``, with OpenDataVal's
            labels, and returns its estimator; ``pred_model`` itself stays untrained. Under masks the id of
            a row is its position in the training data. Default: a copy's ``fit``, and gram.
        values: ``"validation"``, influence on the mean objective of the validation data; or ``"self"``,
            minus the influence of an instance on itself, low for memorized instances.
        random_state: OpenDataVal's; not used.

    Raises:
        InputError: other values.
    """

    def __init__(
        self,
        train: Callable[..., Influence] = gram,
        values: str = "validation",
        random_state: Any = None,
    ) -> None:
        if values not in _VALUES:
            raise InputError(f"values must be one of {', '.join(_VALUES)}, got {values!r}")
        super().__init__(random_state)
        self._train = train
        self._of = values

    def train_data_values(self, *args: Any, **kwargs: Any) -> TurnoverEvaluator:
        """Train, and compute the values.

        Args:
            *args: passed on to ``train`` after the data.
            **kwargs: likewise, for instance ``epochs`` and ``batch_size`` of ``pred_model.fit``.

        Raises:
            InputError: labels that are not classes, or as in :class:`turnover.Influence`.
        """
        train, valid = _loader(self.x_train, self.y_train), _loader(self.x_valid, self.y_valid)
        influence = self._train(self.pred_model, self.x_train, self.y_train, *args, **kwargs)
        scores = LoaderInfluence(influence, torch.arange(len(self.y_train)))
        scores.fit(train)
        if self._of == "self":
            self._values = -scores.self_scores(train)
        else:
            self._values = scores.mean_scores(train, valid)
        return self

    def evaluate_data_values(self) -> NDArray[np.float32]:
        """Values of the training instances: float32 (train,), in nats."""
        return self._values.numpy()


def _loader(x: Any, y: Tensor) -> DataLoader[Any]:
    """Inputs and class numbers of one-hot labels."""
    if y.dim() != 2 or y.shape[1] < 2:
        raise InputError(
            f"labels must be one-hot (rows, classes >= 2), as OpenDataVal's of classification, got "
            f"{tuple(y.shape)}"
        )
    labels: Any = y.argmax(dim=1)  # a tensor is a data set of its rows
    return DataLoader(StackDataset(x, labels), batch_size=_ROWS)
