"""CIFAR-10 images with the labels that people gave them (CIFAR-10N, Wei et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.fidelity.problems import cifar, decoded

ANNOTATORS = ("random1", "random2", "random3")
HUMAN = {
    "aggregate": "n_aggre_label",
    "random1": "n_random_label1",
    "random2": "n_random_label2",
    "random3": "n_random_label3",
    "worse": "n_worse_label",
}
"""Columns of the file: the majority of three annotators, each of the three, and a wrong one where
there was any."""


@dataclass(frozen=True)
class Images:
    """Standardised images and their labels.

    Attributes:
        x: float32 (rows, 3, 32, 32).
        y: int64 (rows,), the right classes.
        test_x: float32 (test rows, 3, 32, 32).
        test_y: int64 (test rows,).
        human: name to int64 (rows,), the classes that people saw in the training images.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    human: dict[str, Tensor]


def load(data: Path | None, rows: int, test_rows: int) -> Images:
    """The first images of the file, which are in random order.

    Args:
        data: the file or its folder; ``None``: what the environment's ``TURNOVER_DATA`` says.
        rows: training images.
        test_rows: test images.

    Raises:
        InputError: the file is not there.
    """
    with np.load(cifar(data), allow_pickle=False) as file:

        def images(part: str, count: int) -> Tensor:
            pixels = decoded(file[f"{part}_jpeg"], file[f"{part}_off"], np.arange(count))
            return torch.from_numpy((pixels - 127.5) / 64)

        def classes(name: str, count: int) -> Tensor:
            return torch.from_numpy(file[name][:count].astype(np.int64))

        return Images(
            images("train", rows),
            classes("y_train", rows),
            images("test", test_rows),
            classes("y_test", test_rows),
            {name: classes(column, rows) for name, column in HUMAN.items()},
        )
