"""Networks and targets of the checks: the same numbers on every device, as the CPU draws them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
import turnover
from turnover import Batch, MaskSpec

CPU = torch.device("cpu")
IDS = torch.arange(300) * 7919 + 2**33
ROWS = 12


def _attached(
    model: nn.Module, sites: str | list[str], keep: float, dtype: torch.dtype
) -> turnover.Network:
    return turnover.attach(model.eval().to(dtype), sites, MaskSpec(keep, seed=3))


def perceptron(
    keep: float = 0.5, dtype: torch.dtype = torch.float32
) -> tuple[turnover.Network, Batch]:
    network = _attached(tiny.randomise(tiny.mlp(64)), "mlp", keep, dtype)
    return network, Batch(tiny.features(ROWS).to(dtype), tiny.labels(ROWS), torch.arange(ROWS))


def images(keep: float = 0.5, dtype: torch.dtype = torch.float32) -> tuple[turnover.Network, Batch]:
    network = _attached(tiny.randomise(tiny.ConvNet()), ["channels", "mlp"], keep, dtype)
    inputs = tiny.features(ROWS, 1, 8, 8).to(dtype)
    return network, Batch(inputs, tiny.labels(ROWS), torch.arange(ROWS))


def texts(keep: float = 0.5, dtype: torch.dtype = torch.float32) -> tuple[turnover.Network, Batch]:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    torch.manual_seed(0)
    network = _attached(tiny.bert(), ["lora", "head"], keep, dtype)
    return network, Batch(tiny.texts(ROWS), tiny.labels(ROWS), torch.arange(ROWS))


def head(keep: float = 0.5, dtype: torch.dtype = torch.float32) -> tuple[turnover.Network, Batch]:
    """One masked layer below the logits: exact scores are one product."""
    torch.manual_seed(0)
    network = _attached(tiny.randomise(tiny.FunctionalHead(512)), "head", keep, dtype)
    return network, Batch(tiny.features(ROWS).to(dtype), tiny.labels(ROWS), torch.arange(ROWS))


Make = Callable[..., tuple[turnover.Network, Batch]]
EVERY: list[Make] = [perceptron, images, texts, head]


def on_both(
    make: Make, device: torch.device, **options: object
) -> list[tuple[turnover.Network, Batch]]:
    """The problem on the CPU, and on the device."""
    here, there = make(**options), make(**options)
    there[0].model.to(device)
    return [here, (there[0], there[1].to(device))]


def error(found: np.ndarray | Tensor, expected: np.ndarray | Tensor) -> float:
    """Largest error of a row, as a share of the row's largest number."""
    one, other = (np.atleast_2d(np.asarray(v, dtype=np.float64)) for v in (found, expected))
    assert one.shape == other.shape and np.isfinite(one).all()
    return float((np.abs(one - other).max(axis=1) / np.abs(other).max(axis=1)).max())


def gradients(model: nn.Module) -> Tensor:
    """All of them side by side, on the CPU."""
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([one.detach().float().cpu().flatten() for one in found])


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().cpu().flatten() for p in model.parameters()])
