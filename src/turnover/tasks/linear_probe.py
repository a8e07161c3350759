"""Small heads on what the pretrained encoder makes of texts or images: cheap enough to train many times.

The encoder is taken as it was pretrained. The LoRA components of a run were trained on every row, so
that they still know the rows that are taken out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from turnover.data.base import Data
from turnover.data.encoded import in_order
from turnover.dropout.head import WideHead
from turnover.dropout.masks import MaskSpec
from turnover.dropout.modules import device_of
from turnover.dropout.network import Network, attach
from turnover.errors import InputError
from turnover.runs.run import Run
from turnover.tasks.class_weights import weights_of_run
from turnover.tasks.training import autocast, weighted_loss

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
    head.standardise(data.features)
    optimiser = torch.optim.SGD(
        head.parameters(), _RATE, momentum=0.9, weight_decay=weight_decay, fused=True
    )
    chosen = torch.arange(len(data))[rows]
    steps = -(-len(chosen) // _BATCH)
    epochs = epochs or max(_EPOCHS, -(-_STEPS // steps))
    rates = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, epochs * steps)
    for batch in _batches(chosen, epochs, seed):
        _step(head, data, batch, optimiser)
        rates.step()
    return _finished(head, data)


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
    head.standardise(data.features)
    network = attach(head, ["activation"], MaskSpec(seed=seed))
    optimiser = torch.optim.Adam(head.parameters(), _MASKED_RATE, fused=True)
    epochs = max(_MASKED_EPOCHS, -(-_MASKED_STEPS * _BATCH // len(data)))
    for batch in _batches(torch.arange(len(data)), epochs, seed):
        with network.exposed(batch):
            _step(head, data, batch, optimiser)
    _finished(head, data)
    return network


def _batches(rows: Tensor, epochs: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.split(rows[torch.randperm(len(rows), generator=generator)], _BATCH)


def _step(head: WideHead, data: Frozen, rows: Tensor, optimiser: torch.optim.Optimizer) -> None:
    loss = weighted_loss(head(data.features[rows]), data.labels[rows], data.weights)
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    optimiser.step()


def _finished(head: WideHead, data: Frozen) -> WideHead:
    head.eval()
    if not bool(logits_of(head, data).isfinite().all()):
        raise InputError(
            "the outputs of a head on the encoder's features are not finite: look for features that "
            "are not"
        )
    return head


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
        optimiser = torch.optim.LBFGS([values], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            scale = values[0].clamp(-_LARGEST_SCALE, _LARGEST_SCALE).exp()
            fitted = functional.cross_entropy(scale * logits + values[1:], labels)
            # Where all are right the scale would grow without end.
            cost = fitted + _PENALTY * values.square().sum()
            torch.autograd.backward(cost)
            return cost

        optimiser.step(loss)  # type: ignore[no-untyped-call]
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
