"""Test rows as what a run's head takes, so that the encoder runs once for all that is scored by the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from turnover.batches import Batch
from turnover.data.encoded import EVALUATION_ROWS, Encoded, in_order
from turnover.dropout.modules import device_of
from turnover.io.bars import slowly
from turnover.models.text import TextClassifier
from turnover.models.vision import ImageEncoderClassifier
from turnover.tasks.training import autocast

_HEAD = "head."


class Features(Encoded):
    """Rows as features of a frozen network below the head, which its whole network computed.

    Args:
        data: the rows.
        features: float32 (rows, width), on the CPU.
    """

    def __init__(self, data: Encoded, features: Tensor) -> None:
        self.labels, self.ids = data.labels, data.ids
        self._data, self._features = data, features

    def batch(self, rows: Sequence[int]) -> Batch:
        """Some rows as one batch: float32 ``features`` (rows, width)."""
        labels = torch.tensor([self.labels[row] for row in rows])
        return Batch({"features": self._features[list(rows)]}, labels, self.ids[list(rows)])

    def chunks(self, rows: Sequence[int], size: int = EVALUATION_ROWS) -> list[list[int]]:
        """The groups of the rows themselves."""
        return self._data.chunks(rows, size)

    def described(self) -> str:
        """Everything about the rows."""
        return self._data.described()


def features_of(model: nn.Module, data: Encoded, title: str) -> Encoded:
    """Rows as features of the head; as they are for models that do not take these.

    Computed in float32 by the whole network.

    Args:
        model: a run's.
        data: rows for it.
        title: of the bar.
    """
    if not isinstance(model, TextClassifier | ImageEncoderClassifier):
        return data
    features: Any = model.features

    def of(inputs: Any) -> Tensor:
        found: Tensor = features(**inputs) if isinstance(inputs, Mapping) else features(inputs)
        return found

    return Features(data, computed(model, data, of, title))


def computed(
    model: nn.Module, data: Encoded, function: Callable[[Any], Tensor], title: str
) -> Tensor:
    """Compute something of all rows in eval mode and float32: float32 (rows, ...) on the CPU, in their order.

    Args:
        model: in any mode; it is left in eval mode.
        data: rows for it.
        function: from the inputs of a batch, on the model's device, to (rows of the batch, ...).
        title: of the bar.
    """
    rows, device = range(len(data)), device_of(model)
    chunks = data.chunks(rows)
    model.eval()
    with torch.no_grad(), autocast(device, bfloat16=False):
        found = [function(data.batch(chunk).to(device).inputs) for chunk in slowly(chunks, title)]
    return in_order(found, chunks, rows).float().cpu()


def by_head(sites: Sequence[str]) -> bool:
    """Whether all of some sites are in the head."""
    return all(site.startswith(_HEAD) for site in sites)
