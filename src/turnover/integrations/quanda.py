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
    """Gram with its defaults, on a network as it is."""
    return Influence(model, method="gram")


class TurnoverExplainer(Explainer):  # type: ignore[misc]
    """Turn-over dropout or gram behind quanda's ``explain`` and ``self_influence``.

    quanda makes explainers itself, of models of its own, so this one is told how an
    :class:`~turnover.Influence` is made of a model, and not given one.

    Args:
        model: a trained classifier of tensors.
        train_dataset: map-style, of ``(inputs, label)``.
        task: ``"image_classification"``, which in quanda is any classification of tensors.
        checkpoints: paths; the last one is loaded into the model.
        checkpoints_load_func: how, ``(model, path)``.
        influence: makes the estimator of the model. For turn-over dropout, one that attaches the masks
            that the model was trained under; the default needs none.
        train_ids: int64 (training instances,): ids that it was trained under, in the data set's order. Not
            needed by gram.
        batch_size: training instances in one forward of gram.

    Raises:
        InputError: turn-over without ids, or whatever :meth:`turnover.Influence.fit` refuses.
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
            targets: int64 (test,), the classes whose prediction is explained.

        Raises:
            InputError: whatever :meth:`turnover.Influence.estimate` refuses.
        """
        labels = torch.as_tensor(targets)
        return self._scores.scores(self._train, [Batch(test_data, labels)]).T.to(self.device)

    def self_influence(self, batch_size: int = 32) -> Tensor:  # noqa: ARG002 - quanda's signature
        """Influence of every training instance on itself: float32 (train,).

        Args:
            batch_size: quanda's; batches are those of the constructor.
        """
        return self._scores.self_scores(self._train).to(self.device)
