"""Influence as a quanda explainer, for quanda's metrics and benchmarks. Needs ``pip install quanda``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from turnover.batches import Batch
from turnover.errors import needing
from turnover.influence.estimator import Influence
from turnover.integrations.loaders import LoaderInfluence

with needing("the explainer", "quanda"):
    from quanda.explainers.base import Explainer


def gram(model: nn.Module) -> Influence:
    """Gram with its defaults."""
    return Influence(model, method="gram")


class TurnoverExplainer(Explainer):  # type: ignore[misc]
    """Turn-over dropout or gram behind quanda's ``explain`` and ``self_influence``.

    quanda creates explainers itself, for models of its own, so this one takes a function that makes an
    :class:`~turnover.Influence` of a model.

    Args:
        model: a trained classifier of tensors.
        train_dataset: map-style, of ``(inputs, label)``.
        task: ``"image_classification"``, which in quanda is any classification of tensors.
        checkpoints: paths; the last one is loaded into the model.
        checkpoints_load_func: loads one, ``(model, path)``.
        influence: makes the estimator of the model. For turn-over dropout it attaches the masks that the
            model was trained under; the default, gram, needs none.
        train_ids: int64 (training instances,): ids that the model was trained under, in the data set's
            order. Not needed by gram.
        batch_size: training instances in one forward of gram.

    Raises:
        InputError: turn-over without ids, or as in :meth:`turnover.Influence.fit`.
        ValueError: another task (quanda's own).
    """

    accepted_tasks = ("image_classification",)

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any],
        task: str = "image_classification",
        checkpoints: str | list[str] | None = None,
        checkpoints_load_func: Callable[..., Any] | None = None,
        *,
        influence: Callable[[nn.Module], Influence] = gram,
        train_ids: Tensor | None = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__(model, train_dataset, task, checkpoints, checkpoints_load_func)
        if self.checkpoints:
            self.load_last_checkpoint()
        self._train = DataLoader(self.train_dataset, batch_size=batch_size)
        self._scores = LoaderInfluence(influence(model), train_ids)
        self._scores.fit(self._train)

    def explain(self, test_data: Tensor, targets: Tensor | Sequence[int]) -> Tensor:
        """Influence on some predictions: float32 (test, train), positive = helpful.

        Args:
            test_data: model inputs (test, ...).
            targets: int64 (test,), the predicted classes to explain.

        Raises:
            InputError: as in :meth:`turnover.Influence.estimate`.
        """
        labels = torch.as_tensor(targets)
        return self._scores.scores(self._train, [Batch(test_data, labels)]).T.to(self.device)

    def self_influence(self, batch_size: int = 32) -> Tensor:  # noqa: ARG002 - quanda's signature
        """Influence of every training instance on itself: float32 (train,).

        Args:
            batch_size: ignored; the constructor has one.
        """
        return self._scores.self_scores(self._train).to(self.device)
