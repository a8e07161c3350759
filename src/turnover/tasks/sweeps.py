"""Heads on frozen features, many of them: trained in this process, or as Ray tasks.

What each is trained on is told by :mod:`turnover.tasks.cleanse`, how by :mod:`turnover.tasks.linear_probe`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from turnover.dropout.head import WideHead
from turnover.dropout.network import Network
from turnover.parallel.jobs import Sweep, Work, here
from turnover.tasks.linear_probe import Frozen, logits_of, train_head, train_masked_head

_RANKING_HEADS = 5
MASKED_HEADS = 2
_RANKING_SEED = 2**20
"""Heads that rank are not those that are trained without what they ranked."""

Figures = tuple[float, float]
"""Accuracy, and mean cross entropy in nats."""


def ranking_heads(train: Frozen, sweep: Sweep = here) -> list[WideHead]:
    """Heads trained on all rows, of other seeds than any that is trained without some."""
    return _trained(_plain_head, train, "heads for ranking", _RANKING_HEADS, sweep)


def masked_heads(train: Frozen, sweep: Sweep = here) -> list[Network]:
    """Wide heads trained on all rows under masks, each row's number being its id."""
    return _trained(_masked_head, train, "masked heads", MASKED_HEADS, sweep)


def figures_without(
    gone: Sequence[tuple[NDArray[np.int64], int]],
    train: Frozen,
    held: Frozen,
    test: Frozen,
    sweep: Sweep = here,
) -> list[tuple[Figures, Figures]]:
    """Figures of heads trained without rows: on the validation and on the test rows.

    Args:
        gone: of each head, int64 rows it is not trained on, and its seed.
        train: all training rows.
        held: the validation rows.
        test: the test rows.
        sweep: what trains the heads.
    """
    data = [values for one in (train, held, test) for values in (one.features, one.labels)]
    return _collected(
        partial(_without, train.classes, train.weights), data, gone, "cleansing", sweep
    )


def _trained(work: Work, train: Frozen, name: str, count: int, sweep: Sweep) -> list[Any]:
    seeds = range(_RANKING_SEED, _RANKING_SEED + count)
    data = (train.features, train.labels)
    return _collected(partial(work, train.classes, train.weights), data, seeds, name, sweep)


def _collected(
    work: Work, data: Sequence[Tensor], jobs: Sequence[Any], name: str, sweep: Sweep
) -> list[Any]:
    """Results in the jobs' order, under a bar."""
    found = dict(tqdm(sweep(work, data, jobs), desc=name, total=len(jobs), unit="head"))
    return [found[number] for number in range(len(jobs))]


def _plain_head(
    classes: int, weights: Tensor | None, features: Tensor, labels: Tensor, seed: int
) -> WideHead:
    return train_head(Frozen(features, labels, classes, weights), range(len(labels)), seed)


def _masked_head(
    classes: int, weights: Tensor | None, features: Tensor, labels: Tensor, seed: int
) -> Network:
    return train_masked_head(Frozen(features, labels, classes, weights), seed)


def _without(
    classes: int,
    weights: Tensor | None,
    features: Tensor,
    labels: Tensor,
    held_features: Tensor,
    held_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    job: tuple[NDArray[np.int64], int],
) -> tuple[Figures, Figures]:
    """Figures of a head trained without rows: on the validation and on the test rows."""
    rows, seed = job
    kept = np.delete(np.arange(len(labels)), rows)
    head = train_head(Frozen(features, labels, classes, weights), torch.from_numpy(kept), seed)
    held = Frozen(held_features, held_labels, classes)
    test = Frozen(test_features, test_labels, classes)
    return _figures(head, held), _figures(head, test)


def _figures(head: WideHead, data: Frozen) -> Figures:
    logits = logits_of(head, data)
    loss = functional.cross_entropy(logits, data.labels)
    return float((logits.argmax(dim=1) == data.labels).float().mean()), float(loss)
