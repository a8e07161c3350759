"""Labels drawn from the model itself, whose gradients make up the Fisher matrix.

The curvature at the trained weights is the expectation over labels of the model, not over those in the data
(Kunstner et al. 2019): gradients of labels from the data shrink where the model has learned them, those of
drawn labels do not. An instance's labels are drawn by its id, whatever batch it comes in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from turnover.batches import Batch
from turnover.objectives import Objective, completion, cross_entropy, logits_and_labels, logits_of

OBJECTIVES: tuple[Objective, ...] = (completion, cross_entropy)
"""Those whose labels can be drawn."""
_ELEMENTS = 2**22
"""Probabilities of labels at once: 32 MB."""


def sampled_costs(objective: Objective, outputs: Any, batch: Batch, count: int) -> list[Tensor]:
    """Sums over rows of the loss of drawn labels: ``count`` numbers.

    Args:
        objective: of :data:`OBJECTIVES`.
        outputs: of the model.
        batch: rows with ids and labels.
        count: draws.
    """
    if objective is completion:
        assert batch.labels is not None
        labeled = batch.labels[:, 1:] != -100
        logits = logits_of(outputs)[:, :-1][labeled].float()
        tokens = labeled.sum(dim=1).tolist()
    else:
        logits, _ = logits_and_labels(outputs, batch)
        tokens = [1] * len(logits)
    assert batch.ids is not None
    drawn = _drawn(logits.detach(), _uniform(batch.ids.tolist(), tokens, count)).unbind(dim=1)
    return [functional.cross_entropy(logits, labels, reduction="sum") for labels in drawn]


def _uniform(ids: Sequence[int], tokens: Sequence[int], count: int) -> Tensor:
    """Numbers in [0, 1) by id: float64 (all tokens, count)."""
    found = []
    for one, size in zip(ids, tokens, strict=True):
        generator = np.random.Generator(np.random.Philox(key=one % 2**64))
        found.append(torch.from_numpy(generator.random((size, count))))
    return torch.cat(found)


def _drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    """Labels (tokens, count) by the inverse of their distribution."""
    step = max(1, _ELEMENTS // logits.shape[1])
    found = []
    for part, numbers in zip(torch.split(logits, step), torch.split(uniform, step), strict=True):
        reached = part.cpu().double().softmax(dim=1).cumsum(dim=1)
        index = torch.searchsorted(reached, numbers * reached[:, -1:], right=True)
        found.append(index.clamp_max(logits.shape[1] - 1).to(logits.device))
    return torch.cat(found)
