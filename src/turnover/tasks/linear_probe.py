"""Small heads on what the pretrained encoder makes of texts or images: cheap enough to train many times.

The encoder is taken as it was pretrained. The LoRA components of a run were trained on every row, so
that they still know the rows that are taken out.
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
from turnover.data.encoded import in_order
from turnover.dropout.head import WideHead
from turnover.dropout.masks import MaskSpec
from turnover.dropout.modules import device_of
from turnover.dropout.network import Network, attach
from turnover.errors import InputError
from turnover.runs.run import Run
from turnover.tasks.class_weights import weights_of_run
from turnover.tasks.training import autocast
from turnover.training import mean_cross_entropy, shuffled, train

# Chosen on held-out rows of the training domain (docs/cleanse.md). Without the decay to 0, the last
# few steps decide how many rows a head calls positive, and two seeds differ by several points.
_UNITS = 512
_EPOCHS = 10
_STEPS = 400  # at least: ten epochs of few rows teach nothing
_BATCH = 50
_RATE = 0.01
_DECAY = 0.03
_PENALTY = 1e-3
_LARGEST_SCALE = 30.0
"""Of the logarithm: a step of the line search beyond it would make numbers that are none."""
# Under masks: the recipe that docs/cleanse.md measured; of fewer rows as many steps.
MASKED_UNITS = 8192
_MASKED_EPOCHS = 4
_MASKED_STEPS = 480
_MASKED_RATE = 5e-5


@dataclass(frozen=True)
class Frozen:
    """Data as heads take them.

    Attributes:
        features: float32 (rows, width).
        labels: int64 (rows,).
        classes: number of classes.
        weights: of the classes in training, float (classes,); ``None``: all weigh the same.
    """

    features: Tensor
    labels: Tensor
    classes: int
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


def frozen(run: Run, data: Data) -> Frozen:
    """Pooled features of texts or images by the run's encoder as it was pretrained.

    The classes weigh what they weighed when the run was trained.

    Raises:
        InputError: the run's network was trained from scratch.
    """
    encoded, device = run.encode(data), device_of(run.model)
    rows = range(len(encoded))
    chunks = encoded.chunks(rows)
    run.model.eval()
    in_float32 = autocast(device, bfloat16=False)
    with (
        torch.no_grad(),
        in_float32,
        run.network.mean(),
        run.pipeline.pretrained(run.model) as encoder,
    ):
        found = [encoder(encoded.batch(chunk).to(device).inputs) for chunk in chunks]
    features = in_order(found, chunks, rows).float().cpu()
    return Frozen(features, torch.tensor(data.labels), len(data.classes), weights_of_run(run))


def train_head(
    data: Frozen,
    rows: Sequence[int] | Tensor,
    seed: int,
    *,
    epochs: int | None = None,
    weight_decay: float = _DECAY,
) -> WideHead:
    """A head trained on some of the rows, plainly.

    Args:
        data: all rows; their features, without labels, are what the input is standardised by.
        rows: those that are trained on.
        seed: of weights and order.
        epochs: ``None``: 10, and at least 400 steps.
        weight_decay: factor of the L2 penalty in the gradient.

    Returns:
        The head in eval mode.

    Raises:
        InputError: a loss that is NaN or infinite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = WideHead(data.features.shape[1], _UNITS, data.classes, gain=1.0)
    head.standardize(data.features)
    optimizer = torch.optim.SGD(
        head.parameters(), _RATE, momentum=0.9, weight_decay=weight_decay, fused=True
    )
    chosen = torch.arange(len(data))[rows]
    steps = -(-len(chosen) // _BATCH)
    epochs = epochs or max(_EPOCHS, -(-_STEPS // steps))
    rates = LinearLR(optimizer, 1.0, 0.0, epochs * steps)
    _train(head, data, chosen, optimizer, epochs, seed, rates=rates)
    return head


def train_masked_head(data: Frozen, seed: int) -> Network:
    """A wide head trained on all rows under masks, each row's number being its id.

    Args:
        data: all rows.
        seed: of weights, order and masks.

    Raises:
        InputError: a loss that is NaN or infinite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = WideHead(data.features.shape[1], MASKED_UNITS, data.classes)
    head.standardize(data.features)
    network = attach(head, ["activation"], MaskSpec(seed=seed))
    optimizer = torch.optim.Adam(head.parameters(), _MASKED_RATE, fused=True)
    epochs = max(_MASKED_EPOCHS, -(-_MASKED_STEPS * _BATCH // len(data)))
    _train(head, data, torch.arange(len(data)), optimizer, epochs, seed, network.exposed)
    return network


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

    train(
        optimizer, range(epochs), lambda _: shuffled(rows, _BATCH, generator), loss_of, rates=rates
    )
    head.eval()
    if not bool(logits_of(head, data).isfinite().all()):
        raise InputError(
            "a head trained on the encoder's features has outputs that are not finite: check the "
            "features for NaN and infinity"
        )


def logits_of(head: nn.Module, data: Frozen) -> Tensor:
    """Logits of all rows, float32 (rows, classes)."""
    with torch.no_grad():
        logits: Tensor = head(data.features)
    return logits


class Calibrated(nn.Module):
    """Logits of a model, scaled and shifted so that they fit some labels best.

    What is left of the loss is what neither a threshold nor a temperature mends.

    Args:
        model: what the logits are of.
        logits: float (rows, classes), of rows with known labels.
        labels: int64 (rows,).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, logits: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.model = model
        values = torch.zeros(1 + logits.shape[1], requires_grad=True)
        optimizer = torch.optim.LBFGS([values], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            scale = values[0].clamp(-_LARGEST_SCALE, _LARGEST_SCALE).exp()
            fitted = functional.cross_entropy(scale * logits + values[1:], labels)
            # Where all are right the scale would grow without end.
            cost = fitted + _PENALTY * values.square().sum()
            torch.autograd.backward(cost)
            return cost

        optimizer.step(loss)  # type: ignore[no-untyped-call]
        self.register_buffer(
            "scale", values[0].detach().clamp(-_LARGEST_SCALE, _LARGEST_SCALE).exp()
        )
        self.register_buffer("shift", values[1:].detach())

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """Calibrated logits (rows, classes)."""
        return self.of(self.model(*inputs, **keywords))

    def of(self, logits: Tensor) -> Tensor:
        """Likewise, of the model's logits."""
        return self.scale * logits + self.shift
