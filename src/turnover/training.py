"""The training loop: one optimizer step for each batch of each epoch, with a callback for its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Rows = TypeVar("Rows")


def train(
    optimizer: Optimizer,
    epochs: Iterable[int],
    batches: Callable[[int], Iterable[Rows]],
    loss_of: Callable[[Rows], Tensor],
    *,
    rates: LRScheduler | None = None,
    after_step: Callable[[Tensor], None] | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """Take one optimizer step for each batch of each epoch.

    Args:
        optimizer: of the parameters that are trained.
        epochs: numbers of the epochs, from 0; a resumed training begins at a later one.
        batches: from the number of an epoch to its batches, called when the epoch begins.
        loss_of: from a batch to its loss, a scalar.
        rates: learning rates, advanced after each step.
        after_step: called with the loss of each step.
        after_epoch: called with the number of finished epochs.
    """
    for epoch in epochs:
        for batch in batches(epoch):
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if rates is not None:
                rates.step()
            if after_step is not None:
                after_step(loss.detach())
        if after_epoch is not None:
            after_epoch(epoch + 1)


def shuffled(rows: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Split rows, int64 (rows,), into batches of a random order."""
    return torch.split(rows[torch.randperm(len(rows), generator=generator)], size)


def mean_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean over rows of cross entropy times weight.

    Dividing by the sum of the weights, as torch does, would make the gradient of a row depend on the
    weights of the rows beside it.

    Args:
        logits: float (rows, classes).
        labels: int64 (rows,).
        weights: float (rows,); ``None``: all 1.
    """
    if weights is None:
        return functional.cross_entropy(logits, labels)
    return (functional.cross_entropy(logits, labels, reduction="none") * weights).mean()
