"""Small heads on features of a pretrained encoder: cheap enough to train many times.

The encoder has its pretrained weights: the LoRA components of a run were trained on every row, and so
still know the rows that are removed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler

from turnover.data.base import Data
from turnover.dropout.head import WideHead
from turnover.dropout.masks import MaskSpec
from turnover.dropout.network import Network, attach
from turnover.errors import InputError
from turnover.runs.run import Run
from turnover.tasks.class_weights import weights_of_run
from turnover.tasks.features import computed
from turnover.training import mean_cross_entropy, shuffled, train

# Chosen on held-out rows of the training domain (docs/cleanse.md). Without the decay of the learning rate
# to 0, the last few steps decide how many rows a head calls positive, and two seeds differ by several points.
_UNITS = 512
_EPOCHS, _LEAST_STEPS = 10, 400
_BATCH = 50
_SCORED_BATCH = 250
_RATE = 0.01
_DECAY = 0.03
# The recipe under masks, as docs/cleanse.md measured it.
MASKED_UNITS = 8192
_MASKED_EPOCHS, _LEAST_MASKED_STEPS = 4, 480
_MASKED_RATE = 5e-5
_PENALTY = 1e-3
_LARGEST_LOG_SCALE = 30.0
"""Bound that keeps the line search finite."""


@dataclass(frozen=True)
class Frozen:
    """Features and labels of rows, and weights of the classes in training."""

    features: Tensor  # float32 (rows, width)
    labels: Tensor  # int64 (rows,)
    classes: int
    weights: Tensor | None = None  # float (classes,)

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Split features, labels and row numbers, as ids, into batches."""
        columns = (self.features, self.labels, torch.arange(len(self)))
        return list(zip(*(torch.split(one, _SCORED_BATCH) for one in columns), strict=True))


def frozen(run: Run, data: Data) -> Frozen:
    """Return pooled features of texts or images by the run's encoder with its pretrained weights.

    The classes weigh as much as in the run's training.
    """
    with run.whole(), run.pipeline.pretrained(run.model) as encoder:
        title = "features of the pretrained encoder"
        features = computed(run.model, run.encode(data), encoder, title)
    return Frozen(features, torch.tensor(data.labels), len(data.classes), weights_of_run(run))


def train_head(
    data: Frozen,
    rows: Sequence[int] | Tensor,
    seed: int,
    *,
    epochs: int | None = None,
    weight_decay: float = _DECAY,
) -> WideHead:
    """Train a head on some of the rows, without masks; the features of all rows standardize its input.

    Args:
        epochs: ``None``: 10, and at least 400 steps.
        weight_decay: factor of the L2 penalty in the gradient.
    """
    head = _new_head(data, _UNITS, seed, gain=1.0)
    optimizer = torch.optim.SGD(
        head.parameters(), _RATE, momentum=0.9, weight_decay=weight_decay, fused=True
    )
    chosen = torch.arange(len(data))[rows]
    steps = -(-len(chosen) // _BATCH)
    epochs = epochs or max(_EPOCHS, -(-_LEAST_STEPS // steps))
    rates = LinearLR(optimizer, 1.0, 0.0, epochs * steps)
    _train(head, data, chosen, optimizer, epochs, seed, rates=rates)
    return head


def train_masked_head(data: Frozen, seed: int) -> Network:
    """Train a wide head on all rows under masks, with row numbers as ids."""
    head = _new_head(data, MASKED_UNITS, seed)
    network = attach(head, ["activation"], MaskSpec(seed=seed))
    optimizer = torch.optim.Adam(head.parameters(), _MASKED_RATE, fused=True)
    epochs = max(_MASKED_EPOCHS, -(-_LEAST_MASKED_STEPS * _BATCH // len(data)))
    _train(head, data, torch.arange(len(data)), optimizer, epochs, seed, network.exposed)
    return network


def _new_head(data: Frozen, units: int, seed: int, gain: float | None = None) -> WideHead:
    with torch.random.fork_rng(devices=[]):  # heads are on the CPU
        torch.manual_seed(seed)
        head = WideHead(data.features.shape[1], units, data.classes, gain=gain)
    head.standardize(data.features)
    return head


def _train(
    head: WideHead,
    data: Frozen,
    rows: Tensor,
    optimizer: Optimizer,
    epochs: int,
    seed: int,
    bind: Callable[[Tensor], AbstractContextManager[Any]] = nullcontext,
    rates: LRScheduler | None = None,
) -> None:
    """Train a head on rows, each batch under ``bind(its rows)``, and leave it in eval mode."""
    generator = torch.Generator().manual_seed(seed)

    def loss_of(batch: Tensor) -> Tensor:
        labels = data.labels[batch]
        with bind(batch):
            logits = head(data.features[batch])
        weights = None if data.weights is None else data.weights[labels]
        return mean_cross_entropy(logits, labels, weights)

    def batches(_: int) -> tuple[Tensor, ...]:
        return shuffled(rows, _BATCH, generator)

    train(optimizer, range(epochs), batches, loss_of, rates=rates)
    head.eval()
    if not bool(logits_of(head, data).isfinite().all()):
        raise InputError(
            "a head trained on the encoder's features has outputs that are not finite: check the "
            "features for NaN and infinity"
        )


def logits_of(head: nn.Module, data: Frozen) -> Tensor:
    """Return logits of all rows, float32 (rows, classes)."""
    with torch.no_grad():
        logits: Tensor = head(data.features)
    return logits


class Calibrated(nn.Module):
    """A model with its logits scaled and shifted to fit some labels (rows,) best.

    It is fitted on its logits (rows, classes) there: no threshold and no temperature lowers their loss.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, logits: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.model = model
        values = torch.zeros(1 + logits.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([values], max_iter=100, line_search_fn="strong_wolfe")

        def scale() -> Tensor:
            return values[0].clamp(-_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE).exp()

        def loss() -> Tensor:
            optimizer.zero_grad()
            fitted = functional.cross_entropy(scale() * logits + values[1:], labels)
            # Without a penalty the scale would grow without bound where all rows are right.
            cost = fitted + _PENALTY * values.square().sum()
            torch.autograd.backward(cost)
            return cost

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        self.register_buffer("scale", scale().detach())
        self.register_buffer("shift", values[1:].detach())

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """Return calibrated logits (rows, classes)."""
        return self.of(self.model(*inputs, **keywords))

    def of(self, logits: Tensor) -> Tensor:
        """Calibrate logits of the model."""
        return self.scale * logits + self.shift
