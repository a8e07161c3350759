"""Instances as a model takes them: batches of token ids, or of pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from turnover.batches import Batch

_SORTED_BATCHES = 16
_EVALUATION_ROWS = 64
_SHIFT = 8  # an augmented image is shifted by at most an eighth of its side


class Encoded(Protocol):
    """Instances: class indices, int64 instance ids (rows,), and batches of any of the rows."""

    @property
    def labels(self) -> list[int]:
        """Class index of each row."""

    @property
    def ids(self) -> Tensor:
        """int64 (rows,)."""

    def __len__(self) -> int: ...

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows as one batch."""

    def training_batch(self, rows: Sequence[int], generator: torch.Generator) -> Batch:
        """The rows as they are trained on: augmented, where they are, by draws from the generator."""

    def chunks(self, rows: Sequence[int], size: int = _EVALUATION_ROWS) -> list[list[int]]:
        """The rows in the groups in which they are best run together."""

    def shuffled(self, size: int, generator: torch.Generator) -> list[list[int]]:
        """The rows of every step of one epoch, drawn from the generator."""

    def described(self) -> str:
        """All that a training depends on: a checkpoint of other instances is not resumed."""


def batches(data: Encoded, rows: Sequence[int], size: int = _EVALUATION_ROWS) -> list[Batch]:
    """The rows as batches, in the groups in which they are best run together."""
    return [data.batch(chunk) for chunk in data.chunks(rows, size)]


def in_order(
    parts: Sequence[Tensor], chunks: Sequence[Sequence[int]], rows: Sequence[int]
) -> Tensor:
    """What was found chunk by chunk, (rows of the chunk, ...) each, in the order of the rows."""
    found = torch.cat(list(parts))
    position = {row: index for index, row in enumerate(rows)}
    order = torch.tensor([position[row] for chunk in chunks for row in chunk])
    return torch.empty_like(found).index_copy_(0, order.to(found.device), found)


@dataclass(frozen=True)
class Tokens:
    """Tokenised texts: token ids, class indices, int64 instance ids (rows,) and the padding."""

    tokens: list[list[int]]
    labels: list[int]
    ids: Tensor
    padding: int

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows padded: int64 ``input_ids`` and ``attention_mask`` (rows, tokens)."""
        texts = [self.tokens[row] for row in rows]
        width = max(len(text) for text in texts)
        input_ids = torch.full((len(texts), width), self.padding)
        attention_mask = torch.zeros((len(texts), width), dtype=torch.int64)
        for index, text in enumerate(texts):
            input_ids[index, : len(text)] = torch.tensor(text)
            attention_mask[index, : len(text)] = 1
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        return Batch(inputs, torch.tensor([self.labels[row] for row in rows]), self.ids[list(rows)])

    def training_batch(self, rows: Sequence[int], generator: torch.Generator) -> Batch:  # noqa: ARG002
        """The same: texts are not augmented."""
        return self.batch(rows)

    def chunks(self, rows: Sequence[int], size: int = _EVALUATION_ROWS) -> list[list[int]]:
        """The rows in groups of similar length, so that little of a batch is padding."""
        ordered = sorted(rows, key=lambda row: len(self.tokens[row]))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def shuffled(self, size: int, generator: torch.Generator) -> list[list[int]]:
        """Random rows, of similar length within a batch, in random order."""
        order: list[int] = torch.randperm(len(self), generator=generator).tolist()
        batches: list[list[int]] = []
        for start in range(0, len(order), size * _SORTED_BATCHES):
            batches += self.chunks(order[start : start + size * _SORTED_BATCHES], size)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def described(self) -> str:
        """Tokens, labels and ids."""
        return repr([self.tokens, self.labels, self.ids.tolist()])


@dataclass(frozen=True)
class Pixels:
    """Images of one size.

    Attributes:
        pixels: uint8 (images, size, size, 3), in memory or on disk.
        rows: which of the images each row is.
        labels: class index of each row.
        ids: int64 (rows,).
        mean: of the red, green and blue values in [0, 1] that are trained on.
        deviation: their standard deviation.
        augment: whether training shifts and mirrors the images.
    """

    pixels: NDArray[np.uint8]
    rows: list[int]
    labels: list[int]
    ids: Tensor
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    augment: bool

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The rows standardised: float32 (rows, 3, size, size)."""
        values = np.stack([self.pixels[self.rows[row]] for row in rows])
        images = torch.from_numpy(values).permute(0, 3, 1, 2).float() / 255
        mean, deviation = (
            torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (self.mean, self.deviation)
        )
        labels = torch.tensor([self.labels[row] for row in rows])
        return Batch((images - mean) / deviation, labels, self.ids[list(rows)])

    def training_batch(self, rows: Sequence[int], generator: torch.Generator) -> Batch:
        """The rows, each shifted and, every second one, mirrored; their ids, and so masks, stay."""
        batch = self.batch(rows)
        if not self.augment:
            return batch
        images: Tensor = batch.inputs
        count, _, size, _ = images.shape
        reach = max(1, size // _SHIFT)
        padded = functional.pad(images, (reach, reach, reach, reach), mode="reflect")
        down, right = torch.randint(2 * reach + 1, (2, count, 1), generator=generator)
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        steps = torch.arange(size)
        columns = right + torch.where(mirrored, steps.flip(0), steps)
        at = torch.arange(count)[:, None, None]
        moved = padded.permute(0, 2, 3, 1)[at, (down + steps)[:, :, None], columns[:, None, :]]
        return Batch(moved.permute(0, 3, 1, 2).contiguous(), batch.labels, batch.ids)

    def chunks(self, rows: Sequence[int], size: int = _EVALUATION_ROWS) -> list[list[int]]:
        """The rows in their order."""
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]

    def shuffled(self, size: int, generator: torch.Generator) -> list[list[int]]:
        """Random rows."""
        return self.chunks(torch.randperm(len(self), generator=generator).tolist(), size)

    def described(self) -> str:
        """Labels and ids, which are of the images' contents, and how they are prepared."""
        return repr([self.labels, self.ids.tolist(), self.mean, self.deviation, self.augment])
