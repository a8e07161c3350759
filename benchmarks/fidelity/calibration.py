"""Ghosts that the noise floor never saw: are their p-values what they say?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import turnover

from .methods import Attribution
from .ours import attached, batches

_PAIRS = 1_000_000
_EDGES = (0.5, 0.1, 0.05, 0.01, 1e-3, 1e-4)
_FALSE_RATE = 0.1


def fresh_ghosts(task: Attribution, pairs: int = _PAIRS, ghosts: int = 1000) -> dict[str, Any]:
    """Shares of fresh ghost pairs below some p-values, and false discoveries among mixed-in ghosts.

    Args:
        task: turn-over networks; the first is looked at.
        pairs: at least so many pairs of a target and a fresh ghost.
        ghosts: of the noise floor.
    """
    targets = batches(task.problem.test)
    count = -(-pairs // len(task.problem.test))
    fresh = turnover.ghost_ids(count, start=ghosts)
    real = torch.arange(len(task.problem.train))
    with attached(task, 1) as networks:
        influence = turnover.Influence(networks, ghosts=ghosts)
        p = influence.estimate(targets, fresh).p
        # As many ghosts as instances, so that half of all that is listed could be false.
        mixed = influence.estimate(targets, torch.cat([real, fresh[: len(real)]]))
    listed = mixed.q <= _FALSE_RATE
    false = int(listed[:, len(real) :].sum())
    edges, values = np.linspace(0, 1, 21), p.ravel()
    return {
        "pairs": int(values.size),
        "below": {str(edge): float((values < edge).mean()) for edge in _EDGES},
        "histogram": np.histogram(values, edges)[0].tolist(),
        "listed": int(listed.sum()),
        "false": false,
        "false_rate": false / max(int(listed.sum()), 1),
    }
