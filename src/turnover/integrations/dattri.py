"""Influence as a dattri attributor, for dattri's metrics and benchmarks. Needs ``pip install dattri``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from turnover.errors import needing
from turnover.influence.estimator import Influence
from turnover.integrations.loaders import LoaderInfluence

with needing("the attributor", "dattri"):
    from dattri.algorithm.base import BaseAttributor


class TurnoverAttributor(BaseAttributor):  # type: ignore[misc]
    """Turn-over dropout or gram behind dattri's ``cache`` and ``attribute``.

    Scores have the sign of dattri's own attributors with a loss as target: positive = helpful, as
    ``dattri.metric.lds`` and ``loo_corr`` expect.

    Args:
        influence: the estimator, by any method.
        train_ids: int64 (rows of the training data set,): ids that the network was trained under, in the
            data set's order. Not needed if batches are ``(inputs, labels, ids)``, or by gram.

    Raises:
        InputError: ids that are not those of training instances.
    """

    def __init__(self, influence: Influence, *, train_ids: Tensor | None = None) -> None:
        self._scores = LoaderInfluence(influence, train_ids)

    def cache(self, full_train_dataloader: Iterable[Any]) -> None:
        """Take in the training set; gram computes its gradients.

        Raises:
            InputError: as in :meth:`attribute`.
        """
        self._scores.fit(full_train_dataloader)

    def attribute(self, train_dataloader: Iterable[Any], test_dataloader: Iterable[Any]) -> Tensor:
        """Influence of training instances on test instances: float32 (train, test), on the CPU.

        Args:
            train_dataloader: the training set, or a part of it by a sampler; not shuffled.
            test_dataloader: not shuffled.

        Raises:
            InputError: a loader that shuffles, rows whose ids are not known, gram without ``cache``.
        """
        return self._scores.scores(train_dataloader, test_dataloader)

    def self_attribute(self, train_dataloader: Iterable[Any]) -> Tensor:
        """Influence of training instances on themselves: float32 (train,), on the CPU.

        High for memorized instances, as ``dattri.metric.mislabel_detection_auc`` expects.

        Raises:
            InputError: as in :meth:`attribute`.
        """
        return self._scores.self_scores(train_dataloader)
