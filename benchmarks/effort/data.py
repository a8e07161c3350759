"""Handwritten digits, a tenth of whose training labels are wrong."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

TRAIN, TEST = 500, 100
_WRONG = TRAIN // 10


def digits() -> tuple[TensorDataset, TensorDataset]:
    """500 training and 100 test rows: inputs float32 (rows, 64) in sixteenths, labels int64 (rows,)."""
    train, test, _ = _drawn()
    return train, test


def wrong() -> Tensor:
    """Which training labels are: bool (500,)."""
    return _drawn()[2]


def _drawn() -> tuple[TensorDataset, TensorDataset, Tensor]:
    pixels, classes = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(pixels), generator=generator)[: TRAIN + TEST]
    x = torch.tensor(pixels[rows] / 16, dtype=torch.float32)
    y = torch.tensor(classes[rows])
    # The rows are in random order already.
    y[:_WRONG] = (y[:_WRONG] + torch.randint(1, 10, (_WRONG,), generator=generator)) % 10
    bad = torch.arange(TRAIN) < _WRONG
    return (
        TensorDataset(x[:TRAIN], y[:TRAIN]),
        TensorDataset(x[TRAIN:], y[TRAIN:]),
        bad,
    )
