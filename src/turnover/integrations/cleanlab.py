"""Label issues by cleanlab, from the hidden networks' predictions in place of k trainings.

:func:`label_issues` needs ``pip install cleanlab``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover.batches import Adapter, Batch, as_batch
from turnover.dropout.hidden import HiddenPredictions, hidden_predictions
from turnover.dropout.network import Network
from turnover.errors import InputError, needing

if TYPE_CHECKING:
    from pandas import DataFrame


def labels_and_pred_probs(
    network: Network,
    train_batches: Iterable[Any],
    held_out: Iterable[Any] | None = None,
    *,
    adapter: Adapter = as_batch,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """What ``find_label_issues``, ``get_label_quality_scores``, ``Datalab`` and the rest of cleanlab take.

    Args:
        network: a classifier trained under masks.
        train_batches: batches with labels and the ids they were trained under.
        held_out: batches that calibrate (:func:`turnover.hidden_predictions`).
        adapter: how a batch becomes model inputs, labels and ids.

    Returns:
        Labels int64 (train,) and out-of-sample probabilities float32 (train, classes), rows in the order
        of the batches.

    Raises:
        InputError: batches without labels, or whatever :func:`turnover.hidden_predictions` refuses.
    """
    labels, found = _predicted(network, train_batches, held_out, adapter)
    return labels, found.probabilities


def label_issues(
    network: Network,
    train_batches: Iterable[Any],
    held_out: Iterable[Any],
    *,
    adapter: Adapter = as_batch,
) -> DataFrame:
    """Which labels cleanlab doubts, by confident learning (Northcutt et al. 2021).

    Arguments as in :func:`labels_and_pred_probs`. ``held_out`` is needed: confident learning decides by
    how sure the predictions are, and hidden networks as they are it takes for a reason to doubt far too
    much (docs/integrations.md has how much); the order of ``label_quality`` hardly changes.

    Returns:
        What ``CleanLearning.find_label_issues`` gives, indexed by training id in the order of the batches:
        ``is_label_issue``, ``label_quality`` (0 to 1, low = doubtful), ``given_label`` and
        ``predicted_label``.

    Raises:
        InputError: cleanlab is not installed, or as in :func:`labels_and_pred_probs`.
    """
    with needing("label_issues", "cleanlab"):
        from cleanlab.classification import CleanLearning
    labels, found = _predicted(network, train_batches, held_out, adapter)
    issues: DataFrame = CleanLearning().find_label_issues(
        labels=labels, pred_probs=found.probabilities
    )
    return issues.set_axis(found.train_ids).rename_axis("id")


def _predicted(
    network: Network,
    train_batches: Iterable[Any],
    held_out: Iterable[Any] | None,
    adapter: Adapter,
) -> tuple[NDArray[np.int64], HiddenPredictions]:
    labels: list[Tensor] = []

    def batches() -> Iterable[Batch]:
        for given in train_batches:
            batch = adapter(given)
            if batch.labels is None:
                raise InputError("cleanlab judges labels, and a training batch has none")
            labels.append(batch.labels.cpu())
            yield batch

    held = None if held_out is None else map(adapter, held_out)
    found = hidden_predictions(network, batches(), held)
    return torch.cat(labels).numpy(), found
