"""Training and evaluation of a classifier, with masks or with ordinary dropout in their place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR

from turnover import training
from turnover.batches import Batch
from turnover.data.encoded import Encoded, in_order, made_ahead
from turnover.dropout.head import WideHead
from turnover.dropout.modules import device_of
from turnover.dropout.network import Network
from turnover.dropout.sites import resolve
from turnover.errors import InputError, check_whole
from turnover.io.bars import slowly, tqdm
from turnover.io.files import replacing
from turnover.io.parsing import checksum, damage, parse_json
from turnover.io.tensors import check_finite, opened
from turnover.objectives import logits_of
from turnover.tasks.class_weights import ClassWeights, check_class_weights
from turnover.training import mean_cross_entropy

_CHECK_EVERY = 10
_POINTS = 9
"""Points of a curve, spread over the training, with its end."""
_ADAM = ("step", "exp_avg", "exp_avg_sq")
"""State of AdamW for each parameter."""

PREDICTING = "predictions"

Bind = Callable[[Sequence[int]], AbstractContextManager[Any]]
"""From rows to the context that they are run in."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a classifier is trained.

    Attributes:
        epochs: passes over the training data.
        batch_size: rows in a step.
        learning_rate: learning rate of all but wide heads, with a linear decay to 0.
        head_learning_rate: learning rate of wide heads, with a linear decay to 0.
        seed: seed of initial weights, order and ordinary dropout.
        class_weights: weight of a row in the training loss, by its class: ``"balanced"``, or weights by
            the names of classes; ``None``: all rows weigh the same. Evaluations are never weighted.
    """

    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 1e-3
    head_learning_rate: float = 1e-4
    seed: int = 0
    class_weights: ClassWeights = None

    def __post_init__(self) -> None:
        check_class_weights(self.class_weights)
        for name in ("epochs", "batch_size"):
            check_whole(name, getattr(self, name), 1)
        for name in ("learning_rate", "head_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")

    def steps(self, rows: int) -> int:
        """Steps of a training on some rows."""
        return -(-rows // self.batch_size) * self.epochs


@dataclass(frozen=True)
class Evaluation:
    """Loss in nats, whether the prediction is right, its class and its probability, each (rows,)."""

    loss: Tensor
    correct: Tensor
    predicted: Tensor
    confidence: Tensor

    def of(self, rows: Sequence[int]) -> Evaluation:
        """Return that of some of the rows."""
        at = torch.tensor(rows)
        return Evaluation(self.loss[at], self.correct[at], self.predicted[at], self.confidence[at])

    def mean(self) -> tuple[float, float]:
        """Return the mean loss and the half width of its 95% confidence interval."""
        width = 1.96 * self.loss.std().item() / len(self.loss) ** 0.5 if len(self.loss) > 1 else 0.0
        return self.loss.mean().item(), width

    def accuracy(self) -> tuple[float, float, float]:
        """Return the accuracy and its 95% Wilson interval."""
        count, right, z = len(self.correct), self.correct.float().mean().item(), 1.96
        center = (right + z * z / (2 * count)) / (1 + z * z / count)
        spread = right * (1 - right) / count + z * z / (4 * count * count)
        half = z * spread**0.5 / (1 + z * z / count)
        return right, center - half, center + half


@dataclass
class Curves:
    """Mean losses on fixed rows during training: name to (mean, half width) at each of ``steps``."""

    steps: list[int] = field(default_factory=list)
    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, step: int, losses: dict[str, tuple[float, float]]) -> None:
        """Append a point to every curve."""
        self.steps.append(step)
        for name, value in losses.items():
            self.losses.setdefault(name, []).append(value)


def native_bfloat16(device: torch.device) -> bool:
    """Tell whether the processor has instructions for bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # A private function of torch: without it, training is in float32.
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cpu" and bool(asked())


def autocast(device: torch.device, *, bfloat16: bool) -> AbstractContextManager[Any]:
    """Compute in bfloat16 or float32, whatever the caller's own autocast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


def evaluate(
    model: nn.Module,
    data: Encoded,
    rows: Sequence[int],
    bind: Bind,
    title: str = PREDICTING,
    *,
    bfloat16: bool = False,
) -> Evaluation:
    """Evaluate rows, each batch in the context ``bind(rows of the batch)``.

    Args:
        title: of the bar.
        bfloat16: compute in bfloat16, enough for a mean of losses; otherwise in float32.
    """
    logits = logits_of_rows(model, data, rows, bind, title, bfloat16=bfloat16)
    labels = torch.tensor([data.labels[row] for row in rows])
    loss = functional.cross_entropy(logits, labels, reduction="none")
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    return Evaluation(loss, predicted == labels, predicted, confidence)


def logits_of_rows(
    model: nn.Module,
    data: Encoded,
    rows: Sequence[int],
    bind: Bind,
    title: str = PREDICTING,
    *,
    bfloat16: bool = False,
) -> Tensor:
    """Return logits of rows, float32 (rows, classes) on the CPU, each batch under ``bind(its rows)``.

    Predictions are computed in float32, as influence is: in another precision other rows could be errors.
    """
    device = device_of(model)
    chunks = data.chunks(rows)
    found = []
    model.eval()
    with torch.no_grad():
        for chunk in slowly(chunks, title):
            with bind(chunk), autocast(device, bfloat16=bfloat16):
                found.append(logits_of(data.batch(chunk).to(device).call(model)).float())
    return in_order(found, chunks, rows).cpu()


def train(
    model: nn.Module,
    data: Encoded,
    config: TrainingConfig,
    bind: Callable[[Tensor], AbstractContextManager[Any]],
    *,
    name: str,
    checkpoint: Path,
    identity: str,
    bfloat16: bool | None = None,
    weights: Tensor | None = None,
    measure: Callable[[], dict[str, tuple[float, float]]] | None = None,
    follow: Callable[[int], None] | None = None,
) -> Curves:
    """Train in place, each step in the context ``bind(ids)``; resume from the checkpoint if it exists.

    Args:
        identity: describes what the training depends on beside ``data`` and ``config``; a checkpoint of
            another training is not resumed.
        bfloat16: compute forward and backward in bfloat16, ``None``: where the processor does; weights and
            their updates stay float32.
        weights: weights of the classes in the loss, float (classes,).
        measure: returns losses on fixed rows; called before the first step and at 7 others, which make
            the curves. The end of the curves is left to the caller.
        follow: called after every epoch with the number of finished epochs.

    Raises:
        InputError: the loss is NaN or infinite.
    """
    device = device_of(model)
    bfloat16 = native_bfloat16(device) if bfloat16 is None else bfloat16
    weights = None if weights is None else weights.to(device)
    optimizer = _optimizer(model, config)
    total = config.steps(len(data))
    steps_per_epoch = total // config.epochs
    measured = {round(i * total / (_POINTS - 1)) for i in range(_POINTS)} - {total}
    curves = Curves()
    digest = checksum([identity, repr(config), data.described()])
    kept = _Checkpoint(checkpoint, digest, model, optimizer, curves)
    first_epoch = kept.restore()
    start = first_epoch * steps_per_epoch
    rates = LambdaLR(optimizer, lambda step: 1 - step / total, last_epoch=start - 1)
    bar = tqdm(total=total, initial=start, desc=f"training {name}", unit="step")
    if measure and not curves.steps:
        curves.add(0, measure())

    def batches(epoch: int) -> Iterator[Batch]:
        # Seeded for each epoch, so that a resumed run draws the dropout of an uninterrupted one.
        seed = config.seed * 1_000_003 + epoch
        torch.manual_seed(seed)
        order, augmentation = (torch.Generator().manual_seed(seed) for _ in range(2))
        steps = data.shuffled(config.batch_size, order)
        made = (data.training_batch(rows, augmentation) for rows in steps)
        return made_ahead(made, device)

    def loss_of(batch: Batch) -> Tensor:
        batch = batch.to(device)
        labels = batch.labels
        assert batch.ids is not None and labels is not None
        model.train()
        with bind(batch.ids), autocast(device, bfloat16=bfloat16):
            logits = batch.call(model).float()
            of_rows = None if weights is None else weights[labels]
            return mean_cross_entropy(logits, labels, of_rows)

    def after_step(loss: Tensor) -> None:
        bar.update()
        step = rates.last_epoch
        if step % _CHECK_EVERY == 0 or step == total:
            value = loss.item()
            if not math.isfinite(value):
                raise InputError(
                    f"the training loss became {value} at step {step} ({name}): lower the learning "
                    f"rates, now {config.learning_rate:g} and {config.head_learning_rate:g}"
                )
            bar.set_postfix(loss=f"{value:.3f}")
        if measure and step in measured:
            curves.add(step, measure())

    def after_epoch(epochs: int) -> None:
        if follow:  # before the checkpoint, so that no epoch is missing after it
            follow(epochs)
        kept.store(epochs)

    with bar:
        training.train(
            optimizer,
            range(first_epoch, config.epochs),
            batches,
            loss_of,
            rates=rates,
            after_step=after_step,
            after_epoch=after_epoch,
        )
    model.eval()
    return curves


@contextmanager
def ordinary_dropout(model: nn.Module, sites: Sequence[str], keep: float) -> Iterator[None]:
    """Apply ordinary random dropout at the sites in training mode."""

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return functional.dropout(output, 1 - keep, module.training)

    handles = [site.module.register_forward_hook(drop) for site in resolve(model, sites)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def under_masks(network: Network, data: Encoded, ids: Tensor | None, *, hidden: bool) -> Bind:
    """Return a ``bind`` for :func:`evaluate`: masks of the rows' own ids, or of ``ids`` (rows,)."""
    used = data.ids if ids is None else ids

    def bind(rows: Sequence[int]) -> AbstractContextManager[Any]:
        chosen = used[list(rows)]
        return network.hidden(chosen) if hidden else network.exposed(chosen)

    return bind


def _optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    heads = [module for module in model.modules() if isinstance(module, WideHead)]
    of_heads = {parameter for head in heads for parameter in head.parameters()}
    groups = []
    for in_head, rate in ((False, config.learning_rate), (True, config.head_learning_rate)):
        parameters = [
            p for p in model.parameters() if p.requires_grad and (p in of_heads) == in_head
        ]
        if parameters:
            groups.append({"params": parameters, "lr": rate, "initial_lr": rate})
    # Weight decay would shrink hidden units too, and clipping by norm would leak.
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


@dataclass(frozen=True)
class _Checkpoint:
    """A file with the trained parameters, the state of their optimizer and the curves after an epoch."""

    path: Path
    digest: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    curves: Curves

    def store(self, epochs: int) -> None:
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters():
            tensors[f"value/{name}"] = parameter.detach().cpu().contiguous()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value.cpu().contiguous()
        metadata = {
            "digest": self.digest,
            "epochs": str(epochs),
            "curves": json.dumps([self.curves.steps, self.curves.losses]),
        }
        with replacing(self.path) as draft:
            save_file(tensors, draft, metadata=metadata)

    def restore(self) -> int:
        """Load a checkpoint of the same training; return its epochs, 0 without one."""
        if not self.path.exists():
            return 0
        fix = "delete it to start again"
        try:
            with damage(self.path, fix), opened(self.path) as file:
                metadata = file.metadata() or {}
                if metadata.get("digest") != self.digest:
                    return 0
                for name, parameter in self._parameters():
                    self._restore_one(file, name, parameter)
                steps, losses = parse_json(metadata["curves"], self.path, own=True)
                self.curves.steps[:] = [int(step) for step in steps]
                for name, points in losses.items():
                    self.curves.losses[name] = [(mean + 0.0, half + 0.0) for mean, half in points]
                return int(metadata["epochs"])
        except InputError as error:
            raise InputError(f"{self.path}: damaged checkpoint ({error}); {fix}") from error

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [one for one in self.model.named_parameters() if one[1].requires_grad]

    def _restore_one(self, file: Any, name: str, parameter: nn.Parameter) -> None:
        stepped = f"{_ADAM[0]}/{name}" in file.keys()  # noqa: SIM118 - no dictionary
        of_optimizer = _ADAM if stepped else ()  # a parameter that no row reaches has no state
        kept = {key: file.get_tensor(f"{key}/{name}") for key in ("value", *of_optimizer)}
        for key, value in kept.items():
            if value.shape != (torch.Size() if key == "step" else parameter.shape):
                raise InputError(f"{self.path}: {key}/{name} is {tuple(value.shape)}")
            check_finite(self.path, f"{key}/{name}", value)
        with torch.no_grad():
            parameter.copy_(kept["value"])
        if stepped:
            self.optimizer.state[parameter] = {key: kept[key].to(parameter.device) for key in _ADAM}
