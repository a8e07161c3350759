"""Instances as a model takes them: batches of any rows, whatever their kind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from turnover.batches import Batch

EVALUATION_ROWS = 64
_AHEAD = 3
"""Batches made ahead of the step that takes them."""


class Encoded:
    """Instances as a model takes them.

    Attributes:
        labels: class index of each row.
        ids: int64 (rows,).
    """

    labels: list[int]
    ids: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Some rows as one batch."""
        raise NotImplementedError

    def training_batch(self, rows: Sequence[int], generator: torch.Generator) -> Batch:  # noqa: ARG002
        """Some rows as one batch for training; kinds that augment draw from the generator."""
        return self.batch(rows)

    def chunks(self, rows: Sequence[int], size: int = EVALUATION_ROWS) -> list[list[int]]:
        """Divide rows into the groups that run best together."""
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]

    def shuffled(self, size: int, generator: torch.Generator) -> list[list[int]]:
        """Rows of every step of one epoch, drawn from the generator."""
        return self.chunks(torch.randperm(len(self), generator=generator).tolist(), size)

    def described(self) -> str:
        """Everything that training depends on: a checkpoint of other instances is not resumed."""
        raise NotImplementedError


def batches(data: Encoded, rows: Sequence[int], size: int = EVALUATION_ROWS) -> list[Batch]:
    """Batches of rows, in the groups that run best together."""
    return [data.batch(chunk) for chunk in data.chunks(rows, size)]


def made_ahead(made: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the same batches, made by a thread while a device computes, in pinned memory for CUDA.

    One thread, and no worker processes: augmentation draws from one generator, batch after batch. A CPU
    computes the steps itself, so batches for it are made when they are taken.
    """
    if device.type == "cpu":
        yield from made
        return
    pinned = device.type == "cuda"

    def following() -> Batch | None:
        batch = next(made, None)
        if batch is None or not pinned:
            return batch
        return batch.mapped(torch.Tensor.pin_memory, shared=True)

    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(following) for _ in range(_AHEAD))
        while (batch := waiting.popleft().result()) is not None:
            waiting.append(thread.submit(following))
            yield batch


def in_order(
    parts: Sequence[Tensor], chunks: Sequence[Sequence[int]], rows: Sequence[int]
) -> Tensor:
    """Join results computed chunk by chunk, (rows of the chunk, ...) each, in the order of the rows."""
    found = torch.cat(list(parts))
    position = {row: index for index, row in enumerate(rows)}
    order = torch.tensor([position[row] for chunk in chunks for row in chunk])
    return torch.empty_like(found).index_copy_(0, order.to(found.device), found)
