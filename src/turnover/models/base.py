"""What a run asks of a kind of data: how a model is built, fed and saved."""

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

STANDARDIZED_ROWS = 1000


class Config(Protocol):
    """Shape of a model that a run trains."""

    @property
    def kind(self) -> str:
        """Kind of data it takes: a key of :data:`turnover.models.pipeline.KINDS`."""

    @property
    def model(self) -> str:
        """Name or folder of the model."""

    @property
    def head_units(self) -> int:
        """Mask units of the wide head."""

    def reader(self) -> Reader:
        """Function that reads labeled data of this kind; test data after the training data."""

    @property
    def sites(self) -> tuple[str, ...]:
        """What is masked by default: everything that is trained."""


class Pipeline(Protocol):
    """From data to a model's batches, and both to files."""

    @property
    def config(self) -> Config:
        """Shape of the model."""

    def reader(self) -> Reader:
        """Function that reads labeled data which are compared with the run's training data."""

    def encode(self, data: Any) -> Encoded:
        """Data as the model takes them.

        Raises:
            InputError: data that it cannot take.
        """

    def prepare(self, model: nn.Module, training: Encoded) -> None:
        """What is done once before training."""

    def pretrained(self, model: nn.Module) -> AbstractContextManager[Callable[[Any], Tensor]]:
        """From a batch's inputs to the features (rows, width) of the encoder as it was pretrained.

        Raises:
            InputError: there is none, as the network was trained from scratch.
        """

    def save(self, folder: Path, model: nn.Module, classes: int) -> None:
        """Write the model, and all that this pipeline is, into a folder."""

    def one(self, given: str | Path, label: int, classes: list[str]) -> Data:
        """A text, or the file of an image, as data of one row.

        Raises:
            InputError: an empty text, an unreadable image, or the other of the two.
        """

    def export(self, data: Any, out: Path) -> None:
        """Write data for the user, in a format that can be read again, atomically.

        Raises:
            InputError: another format, or a folder that does not exist.
        """

    def write(self, folder: Path, name: str, data: Any) -> None:
        """Write data into a run's folder."""

    def read(self, folder: Path, name: str, classes: list[str]) -> Data:
        """Read what :meth:`write` wrote.

        Raises:
            InputError: a missing or damaged file.
        """


def standardize(
    model: nn.Module, head: WideHead, training: Encoded, features: Callable[[Any], Tensor]
) -> None:
    """Standardize a wide head's input on the features of some training instances."""
    device = device_of(model)
    rows = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    some = batches(training, rows[:STANDARDIZED_ROWS].tolist())
    model.eval()
    with torch.no_grad():
        found = [features(batch.to(device).inputs) for batch in some]
    head.standardise(torch.cat(found))
