"""Memorization: the exposed and the hidden loss of every training row after each epoch of training.

The exposed network of a row is trained on it, the hidden one is not. Where both losses fall, the other
rows teach what the row says; where only the exposed one falls, the row is memorized.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from turnover.data.encoded import Encoded
from turnover.dropout.network import Network
from turnover.errors import InputError
from turnover.io.files import replacing, write_csv
from turnover.io.tensors import check_finite, opened
from turnover.runs.run import Run
from turnover.tasks.training import evaluate, under_masks

FILE = "memorization.safetensors"
_SHARE = 0.1
"""Share of the rows in each curve of a part."""


@dataclass(frozen=True)
class Memorization:
    """Losses over training, in nats: float32 (epochs, rows), rows as in the run's training data."""

    exposed: NDArray[np.float32]
    hidden: NDArray[np.float32]

    @property
    def memorization(self) -> NDArray[np.float32]:
        """Hidden minus exposed loss after training (rows,): what only the row itself taught."""
        difference: NDArray[np.float32] = self.hidden[-1] - self.exposed[-1]
        return difference

    def order(self) -> NDArray[np.int64]:
        """Rows, the most memorized first."""
        return np.argsort(-self.memorization, kind="stable")

    def curves(self) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Mean exposed and hidden loss by epoch, of all rows and of three tenths of them.

        ``memorized``: the most memorized rows; ``hard``: of the others those with the largest exposed
        losses after training, which were not even memorized; ``easy``: those with the smallest hidden
        losses after training.
        """
        rows = self.order()
        count = max(1, round(_SHARE * len(rows)))
        others = np.sort(rows[count:])
        parts = {
            "all": np.sort(rows),
            "memorized": rows[:count],
            "hard": others[np.argsort(-self.exposed[-1][others], kind="stable")[:count]],
            "easy": np.argsort(self.hidden[-1], kind="stable")[:count],
        }
        return {
            name: (self.exposed[:, part].mean(axis=1), self.hidden[:, part].mean(axis=1))
            for name, part in parts.items()
        }


class Follower:
    """Records the losses of all training rows after every epoch in a file."""

    def __init__(self, network: Network, training: Encoded, path: Path) -> None:
        self._network, self._training, self._path = network, training, path

    def __call__(self, epoch: int) -> None:
        """Record the losses after ``epoch`` epochs, counted from 1; later ones, left by a try, go."""
        from safetensors.torch import save_file

        rows = range(len(self._training))
        kept = _tensors(self._path) if epoch > 1 else {}
        tensors = {}
        for name, hidden in (("exposed", False), ("hidden", True)):
            bind = under_masks(self._network, self._training, None, hidden=hidden)
            title = f"{name} losses after epoch {epoch}"
            found = evaluate(self._network.model, self._training, rows, bind, title)
            before = [kept[name][: epoch - 1]] if kept else []
            tensors[name] = torch.cat([*before, found.loss[None]])
        with replacing(self._path) as draft:
            save_file(tensors, draft)


def memorization(run: Run) -> Memorization:
    """Read the losses recorded while the run was trained.

    Raises:
        InputError: none were recorded, or the file is damaged or of other training data.
    """
    path = run.folder / FILE
    if not path.exists():
        raise InputError(
            f"{run.folder} has no losses over training: train with `turnover fit --memorization`"
        )
    tensors = _tensors(path)
    shape = tensors["exposed"].shape
    known = all(value.dtype == torch.float32 for value in tensors.values()) and len(shape) == 2
    if not known or 0 in shape or tensors["hidden"].shape != shape or shape[1] != len(run.train):
        raise InputError(f"{path}: damaged, or of other training data than the run's")
    return Memorization(tensors["exposed"].numpy(), tensors["hidden"].numpy())


def write_memorization(run: Run, found: Memorization, out: Path) -> None:
    """Write a CSV, atomically, the most memorized rows first: key, label, and losses by epoch."""
    epochs = range(1, len(found.exposed) + 1)
    columns = [f"{side}_{epoch}" for side in ("exposed", "hidden") for epoch in epochs]
    lines = []
    for row in found.order():
        losses = [*found.exposed[:, row], *found.hidden[:, row]]
        label = run.train.classes[run.train.labels[row]]
        numbers = [f"{value:.4f}" for value in (found.memorization[row], *losses)]
        lines.append([run.train.keys[row], label, *numbers, run.train.shown(row)])
    write_csv(out, ["key", "label", "memorization", *columns, "text"], lines)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    with opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in ("exposed", "hidden")}
    for name, value in tensors.items():
        check_finite(path, name, value)
    return tensors
