"""Label issues by cleanlab, from hidden predictions instead of k trainings.

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
    """The labels and ``pred_probs`` that cleanlab's functions and ``Datalab`` take.

    Args:
        network: a classifier trained under masks.
        train_batches: batches with labels and the ids that they were trained under.
        held_out: batches to calibrate with (:func:`turnover.hidden_predictions`).
        adapter: turns a batch into model inputs, labels and ids.

    Returns:
        Labels int64 (train,) and out-of-sample probabilities float32 (train, classes), rows in the order
        of the batches.

    Raises:
        InputError: batches without labels, or as in :func:`turnover.hidden_predictions`.
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
    """Labels that cleanlab doubts, by confident learning (Northcutt et al. 2021).

    Arguments as in :func:`labels_and_pred_probs`. ``held_out`` is required: confident learning relies on
    the confidence of the predictions, and flags far too many labels if hidden networks are not calibrated
    (docs/integrations.md has numbers); the order of ``label_quality`` hardly changes.

    Returns:
        The data frame of ``CleanLearning.find_label_issues``, indexed by training id in the order of the
        batches: ``is_label_issue``, ``label_quality`` (0 to 1, low = doubtful), ``given_label`` and
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
