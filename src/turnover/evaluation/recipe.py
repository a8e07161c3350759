"""How networks are built and trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from turnover.dropout.masks import MaskSpec
from turnover.errors import InputError, check_whole

OPTIMIZERS = ("sgd", "adam")

Build = Callable[[int], nn.Module]
"""From a seed to a newly initialized module: deterministic, with a generator of its own."""


@dataclass(frozen=True)
class Recipe:
    """A training with a constant learning rate on the mean cross entropy of each batch.

    Args:
        epochs: passes over the instances, >= 1.
        learning_rate: > 0.
        batch_size: instances in a step, >= 1; the last, smaller batch of an epoch is trained on too.
        momentum: momentum of ``"sgd"``, in [0, 1); ``"adam"`` has torch's decay rates and ignores it.
        weight_decay: factor of the L2 penalty in the gradient, >= 0.
        optimizer: ``"sgd"`` or ``"adam"``.

    Raises:
        InputError: a value out of its range.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    momentum: float = 0.9
    weight_decay: float = 0.0
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        for name, value in (("epochs", self.epochs), ("batch_size", self.batch_size)):
            check_whole(f"recipe: {name}", value, 1)
        if not self.learning_rate > 0:
            raise InputError(f"recipe: learning_rate must be > 0, got {self.learning_rate}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"recipe: momentum must be in [0, 1), got {self.momentum}")
        if not self.weight_decay >= 0:
            raise InputError(f"recipe: weight_decay must be >= 0, got {self.weight_decay}")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(
                f"recipe: unknown optimizer {self.optimizer!r}; there are {', '.join(OPTIMIZERS)}"
            )

    def optimizer_of(self, parameters: list[Tensor]) -> torch.optim.Optimizer:
        """Make the optimizer of some parameters."""
        rate, decay = self.learning_rate, self.weight_decay
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, rate, weight_decay=decay, fused=True)
        return torch.optim.SGD(
            parameters, rate, momentum=self.momentum, weight_decay=decay, fused=True
        )


@dataclass(frozen=True)
class Masked:
    """Training under turn-over masks: instance i always runs in its exposed sub-network.

    Args:
        sites: names of the modules whose outputs are masked, as :func:`turnover.attach` takes them.
        keep: share of the units that an instance keeps.

    Raises:
        InputError: no sites, or ``keep`` not strictly between 0 and 1.
    """

    sites: tuple[str, ...]
    keep: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.sites, str) or not self.sites:
            raise InputError(
                f"masked: sites must be a tuple of at least one module name, got {self.sites!r}"
            )
        self.spec(0)

    def spec(self, seed: int) -> MaskSpec:
        """Return the masks of the network of a seed."""
        return MaskSpec(self.keep, seed=seed)
