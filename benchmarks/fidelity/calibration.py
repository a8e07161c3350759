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

    As many fresh ghosts as training instances are mixed into the ids. If no instance mattered, half of
    all false discoveries would be ghosts, so their part of a list, mean over lists, should not exceed
    half of what q promises.

    Args:
        task: turn-over networks.
        pairs: at least so many pairs of a target and a fresh ghost, over all networks.
        ghosts: of the noise floor.
    """
    targets, real = batches(task.problem.test), torch.arange(len(task.problem.train))
    each = -(-pairs // (len(task.problem.test) * len(task.models)))
    fresh = turnover.ghost_ids(max(each, len(real)), start=ghosts)
    values, shares, listed = [], [], 0
    with attached(task, len(task.models)) as networks:
        for network in networks:
            influence = turnover.Influence(network, ghosts=ghosts)
            values.append(influence.estimate(targets, fresh).p.ravel())
            mixed = influence.estimate(targets, torch.cat([real, fresh[: len(real)]]))
            chosen = mixed.q <= _FALSE_RATE
            false = chosen[:, len(real) :].sum(axis=1)
            shares.append(false / np.maximum(chosen.sum(axis=1), 1))
            listed += int(chosen.sum())
    p, share = np.concatenate(values), np.concatenate(shares)
    # Lists of one network share its masks, so networks are what is independent.
    means = [float(one.mean()) for one in shares]
    return {
        "networks": len(means),
        "pairs": int(p.size),
        "below": {str(edge): float((p < edge).mean()) for edge in _EDGES},
        "histogram": np.histogram(p, np.linspace(0, 1, 21))[0].tolist(),
        "lists": len(share),
        "listed": listed,
        "ghosts_share_of_lists": float(share.mean()),
        "ghosts_share_error": float(np.std(means, ddof=1) / np.sqrt(len(means))),
        "promised": _FALSE_RATE / 2,
    }
