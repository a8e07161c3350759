"""Rank correlation of linear with exact scores, on a sample of a run's errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from turnover.batches import Batch
from turnover.data.encoded import Encoded
from turnover.influence.estimator import Influence
from turnover.results.result import Result
from turnover.runs.run import Run

EXACT_GHOSTS = 64
TARGETS, IDS = 8, 256


def agreement(
    run: Run,
    influence: Influence,
    test: Encoded,
    wrong: list[int],
    ids: torch.Tensor,
    errors: Result,
) -> dict[str, Any]:
    """Spearman correlation of linear with exact scores of a sample of pairs; empty for other methods."""
    if influence.method != "linear":
        return {}
    generator = torch.Generator().manual_seed(0)
    targets = torch.randperm(len(wrong), generator=generator)[:TARGETS].tolist()
    columns = torch.randperm(len(ids), generator=generator)[:IDS]
    exact = Influence(
        run.network,
        influence.objective,
        "exact",
        ghosts=EXACT_GHOSTS,
        sites=influence.sites,
        progress=True,
    )
    single: Iterator[Batch] = (test.batch([wrong[target]]) for target in targets)
    result = exact.estimate(single, ids[columns])
    correlations = [
        _spearman(row, errors.scores[target][columns.numpy()])
        for row, target in zip(result.scores, targets, strict=True)
    ]
    return {
        "spearman_exact_linear": float(np.mean(correlations)),
        "exact_pairs": int(result.scores.size),
    }


def _spearman(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    ranks = np.stack([np.argsort(np.argsort(values)) for values in (first, second)])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    return float((centred[0] @ centred[1]) / (centred[0] @ centred[0]))  # no ties: equal variances
