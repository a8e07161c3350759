"""Interfaces of a data kind's models: their shape, and how data reach them and their files."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from turnover.data.base import Data, Reader
from turnover.data.encoded import Encoded, batches
from turnover.dropout.head import WideHead
from turnover.dropout.modules import device_of
from turnover.io.bars import slowly

STANDARDIZED_ROWS = 1000


class Described(Protocol):
    """What is known of every model of a run."""

    @property
    def kind(self) -> str:
        """Kind of data: ``"text"`` or ``"image"``."""

    @property
    def saved_as(self) -> str:
        """Kind of the model in ``classifier.json``: a key of :data:`turnover.models.pipeline.KINDS`."""

    @property
    def model(self) -> str:
        """Name or folder of the model."""


class Config(Described, Protocol):
    """Shape of a model that a run trains."""

    @property
    def epochs(self) -> int:
        """Default number of passes over the training data."""

    @property
    def head_units(self) -> int:
        """Mask units of the wide head."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites masked by default: everything that is trained."""

    def reader(self) -> Reader:
        """Function that reads labeled data of this kind, first the training data, then the test data."""


class Pipeline(Protocol):
    """Takes data of one kind to a model's batches, and both to files."""

    @property
    def config(self) -> Described:
        """What is known of the model."""

    @property
    def keeps_pretrained(self) -> bool:
        """Whether the encoder as it was before training is there."""

    def reader(self) -> Reader:
        """Function that reads labeled data to compare with the run's training data."""

    def encode(self, data: Any) -> Encoded:
        """Encode data for the model, or refuse data that it cannot take."""

    def prepare(self, model: nn.Module, training: Encoded) -> None:
        """Prepare the model once before training."""

    def pretrained(self, model: nn.Module) -> AbstractContextManager[Callable[[Any], Tensor]]:
        """Function from a batch's inputs to features (rows, width) of the encoder before training."""

    def save(self, folder: Path, model: nn.Module, classes: int) -> None:
        """Write the model and this pipeline into a folder."""

    def one(self, given: str | Path, label: int, classes: list[str]) -> Data:
        """Make one row of a text, or of an image file."""

    def read(self, folder: Path, name: str, classes: list[str]) -> Data:
        """Read data that ``data.save`` wrote."""


def standardize(
    model: nn.Module, head: WideHead, training: Encoded, features: Callable[[Any], Tensor]
) -> None:
    """Standardize a wide head's input by the features of some training instances."""
    device = device_of(model)
    rows = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    some = batches(training, rows[:STANDARDIZED_ROWS].tolist())
    model.eval()
    with torch.no_grad():
        shown = slowly(some, "features that standardize the head")
        found = [features(batch.to(device).inputs) for batch in shown]
    head.standardize(torch.cat(found))
