"""Training and evaluating a classifier, with masks or with ordinary dropout in their place."""

from __future__ import annotations

import hashlib
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
from tqdm.auto import tqdm

from turnover import training
from turnover.batches import Batch
from turnover.data.encoded import Encoded, in_order
from turnover.dropout.head import WideHead
from turnover.dropout.modules import device_of
from turnover.dropout.network import Network
from turnover.dropout.sites import resolve
from turnover.errors import InputError
from turnover.io.files import replacing
from turnover.io.parsing import damage, parse_json
from turnover.io.tensors import check_finite, opened
from turnover.tasks.class_weights import ClassWeights, check_class_weights
from turnover.training import mean_cross_entropy

_CHECK_EVERY = 10
_KEPT = ("step", "exp_avg", "exp_avg_sq")
"""Of AdamW, for each parameter."""


@dataclass(frozen=True)
class TrainingConfig:
    """How a classifier is trained.

    Attributes:
        epochs: passes over the training data.
        batch_size: rows in a step.
        learning_rate: learning rate of all but wide heads, with a linear decay to 0.
        head_learning_rate: learning rate of wide heads, with a linear decay to 0.
        seed: of initial weights, order and ordinary dropout.
        class_weights: what a row counts in the training loss, by its class: ``"balanced"``, or weights by
            the names of classes; ``None``: all rows count the same. What is measured is never weighted.
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
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("learning_rate", "head_learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a finite number >= 0, got {getattr(self, name)}")


@dataclass
class Evaluation:
    """Loss in nats (rows,) and whether the prediction is right (rows,), in the order of the rows."""

    loss: Tensor
    correct: Tensor
    predicted: Tensor
    confidence: Tensor

    def mean(self) -> tuple[float, float]:
        """Mean loss and the half width of its 95% confidence interval."""
        width = 1.96 * self.loss.std().item() / len(self.loss) ** 0.5 if len(self.loss) > 1 else 0.0
        return self.loss.mean().item(), width

    def accuracy(self) -> tuple[float, float, float]:
        """Accuracy and its 95% Wilson interval."""
        count, right, z = len(self.correct), self.correct.float().mean().item(), 1.96
        centre = (right + z * z / (2 * count)) / (1 + z * z / count)
        spread = right * (1 - right) / count + z * z / (4 * count * count)
        half = z * spread**0.5 / (1 + z * z / count)
        return right, centre - half, centre + half


@dataclass
class Curves:
    """Mean losses on fixed rows over training: name to (mean, half width) at each of ``steps``."""

    steps: list[int] = field(default_factory=list)
    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, step: int, losses: dict[str, tuple[float, float]]) -> None:
        """Append one point of every curve."""
        self.steps.append(step)
        for name, value in losses.items():
            self.losses.setdefault(name, []).append(value)


def native_bfloat16(device: torch.device) -> bool:
    """Whether the processor computes in bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Private: where a torch lacks it, training is in float32.
    asked = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return device.type == "cpu" and bool(asked())


def autocast(device: torch.device, *, bfloat16: bool) -> AbstractContextManager[Any]:
    """Compute in bfloat16, or in float32 whatever the caller's own autocast is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16)


def evaluate(
    model: nn.Module,
    data: Encoded,
    rows: Sequence[int],
    bind: Callable[[Sequence[int]], AbstractContextManager[Any]],
) -> Evaluation:
    """Loss and predictions of rows, each batch under ``bind(rows of the batch)``."""
    logits = logits_of_rows(model, data, rows, bind)
    labels = torch.tensor([data.labels[row] for row in rows])
    loss = functional.cross_entropy(logits, labels, reduction="none")
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    return Evaluation(loss, predicted == labels, predicted, confidence)


def logits_of_rows(
    model: nn.Module,
    data: Encoded,
    rows: Sequence[int],
    bind: Callable[[Sequence[int]], AbstractContextManager[Any]],
) -> Tensor:
    """Logits of rows, float32 (rows, classes) on the CPU, each batch under ``bind(its rows)``.

    Computed in float32, as influence is: of two precisions, some rows would be errors in one alone.
    """
    device = device_of(model)
    chunks = data.chunks(rows)
    found = []
    model.eval()
    with torch.no_grad():
        for chunk in chunks:
            with bind(chunk), autocast(device, bfloat16=False):
                found.append(data.batch(chunk).to(device).call(model).float())
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
    points: int = 9,
    follow: Callable[[int], None] | None = None,
) -> Curves:
    """Train in place, each step under ``bind(ids)``; resumes from the checkpoint where there is one.

    Args:
        bind: what every step runs under: masks of its ids, or nothing.
        name: shown in the progress bar.
        checkpoint: file written after every epoch.
        identity: says all that decides this training beside the data and ``config``; a checkpoint of
            another one is not resumed.
        weights: of the classes in the loss, float (classes,); ``None``: all weigh the same.
        bfloat16: forward and backward compute in bfloat16, ``None``: where the processor does; weights and
            their updates stay float32.
        measure: losses on fixed rows, called at ``points`` steps.
        follow: called after every epoch with the number of epochs done.

    Returns:
        the curves (empty without ``measure``).

    Raises:
        InputError: the loss is NaN or infinite.
    """
    device = device_of(model)
    bfloat16 = native_bfloat16(device) if bfloat16 is None else bfloat16
    weights = None if weights is None else weights.to(device)
    optimizer = _optimizer(model, config)
    steps_per_epoch = -(-len(data) // config.batch_size)
    total = steps_per_epoch * config.epochs
    measured = {round(i * total / (points - 1)) for i in range(points)} if measure else set()
    curves = Curves()
    digest = _digest(identity, config, data)
    first_epoch = _restore(checkpoint, model, optimizer, curves, digest)
    if measure and not curves.steps and 0 in measured:
        curves.add(0, measure())
    start = first_epoch * steps_per_epoch
    rates = LambdaLR(optimizer, lambda step: 1 - step / total, last_epoch=start - 1)
    bar = tqdm(total=total, initial=start, desc=f"training {name}", unit="step")

    def batches(epoch: int) -> Iterator[Batch]:
        # Seeded for each epoch, so that a resumed run draws the dropout of an uninterrupted one.
        seed = config.seed * 1_000_003 + epoch
        torch.manual_seed(seed)
        order, augmentation = (torch.Generator().manual_seed(seed) for _ in range(2))
        for rows in data.shuffled(config.batch_size, order):
            yield data.training_batch(rows, augmentation)

    def loss_of(batch: Batch) -> Tensor:
        assert batch.ids is not None and batch.labels is not None
        model.train()
        labels = batch.labels.to(device)
        with bind(batch.ids), autocast(device, bfloat16=bfloat16):
            logits = batch.to(device).call(model).float()
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
        _store(checkpoint, model, optimizer, curves, digest, epochs)

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
    """Ordinary random dropout at the sites, in training mode: what turn-over dropout replaces."""

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return functional.dropout(output, 1 - keep, module.training)

    handles = [site.module.register_forward_hook(drop) for site in resolve(model, sites)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def under_masks(
    network: Network, data: Encoded, ids: Tensor | None, *, hidden: bool
) -> Callable[[Sequence[int]], AbstractContextManager[Any]]:
    """A ``bind`` for :func:`evaluate`: masks of the rows' own ids, or of ``ids`` in their place."""
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
    # Weight decay would shrink hidden units too, and clipping by norm would leak; neither is used.
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


def _digest(identity: str, config: TrainingConfig, data: Encoded) -> str:
    text = json.dumps([identity, repr(config), data.described()])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _store(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    curves: Curves,
    digest: str,
    epochs: int,
) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"value/{name}"] = parameter.detach().contiguous()
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}/{name}"] = value.contiguous()
    metadata = {
        "digest": digest,
        "epochs": str(epochs),
        "curves": json.dumps([curves.steps, curves.losses]),
    }
    with replacing(path) as draft:
        save_file(tensors, draft, metadata=metadata)


def _restore(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    curves: Curves,
    digest: str,
) -> int:
    """Put a checkpoint of the same training back; epochs done, 0 where there is none."""
    if not path.exists():
        return 0
    mend = "delete it to start again"
    try:
        with damage(path, mend), opened(path) as file:
            metadata = file.metadata() or {}
            if metadata.get("digest") != digest:
                return 0
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    _restore_one(path, file, name, parameter, optimizer)
            steps, losses = parse_json(metadata["curves"], path, own=True)
            curves.steps = [int(step) for step in steps]
            curves.losses = {name: [(m + 0.0, h + 0.0) for m, h in v] for name, v in losses.items()}
            return int(metadata["epochs"])
    except InputError as error:
        raise InputError(f"{path}: damaged checkpoint ({error}); {mend}") from error


def _restore_one(
    path: Path, file: Any, name: str, parameter: nn.Parameter, optimizer: torch.optim.Optimizer
) -> None:
    """A parameter and what the optimizer knows of it."""
    stepped = f"{_KEPT[0]}/{name}" in file.keys()  # noqa: SIM118 - no dictionary
    of_optimizer = _KEPT if stepped else ()  # what no row reaches, such as a pooler, has not moved
    kept = {key: file.get_tensor(f"{key}/{name}") for key in ("value", *of_optimizer)}
    for key, value in kept.items():
        if value.shape != (torch.Size() if key == "step" else parameter.shape):
            raise InputError(f"{path}: {key}/{name} is {tuple(value.shape)}")
        check_finite(path, f"{key}/{name}", value)
    with torch.no_grad():
        parameter.copy_(kept["value"])
    if stepped:
        optimizer.state[parameter] = {key: kept[key].to(parameter.device) for key in _KEPT}
