"""Training many small networks, stacked into one batched computation where that is faster.

Knows nothing of influence: inputs, labels and a recipe in, weights out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from turnover import training
from turnover.dropout.network import attach
from turnover.dropout.sites import ResolvedSite, resolve
from turnover.errors import InputError
from turnover.evaluation.recipe import Build, Masked, Recipe
from turnover.ids import check_training_ids
from turnover.io.bars import tqdm

State = dict[str, Tensor]
Rows = Tensor | NDArray[np.int64]

# A stack of networks has to stay near the caches: measured on one thread, a step of a stack of networks
# of 5 thousand parameters takes a quarter of the time of as many single steps, of 40 to 90 thousand 0.7
# to 0.8 of it, and of 200 thousand or more the same or longer. More than 64 networks gain little.
_STACKED_PARAMETERS = 1_000_000
_FEWEST_STACKED = 8
_MOST_STACKED = 64
_MASK_BYTES = 256_000_000
_ROWS_AT_ONCE = 500


@dataclass(frozen=True)
class Trained:
    """Trained networks.

    Attributes:
        states: a state dict for each network.
        checkpoints: epoch (0 is the initialization) to the state dicts after it.
        seconds: wall-clock time of all trainings.
        build: makes the networks.
    """

    states: list[State]
    checkpoints: dict[int, list[State]]
    seconds: float
    build: Build = field(repr=False)

    def models(self) -> list[nn.Module]:
        """Return the networks as plain modules in eval mode."""
        modules = []
        for state in self.states:
            module = self.build(0).eval()
            module.load_state_dict(state)
            modules.append(module)
        return modules

    def logits(self, inputs: Tensor) -> Tensor:
        """Return outputs of the whole networks in eval mode.

        Args:
            inputs: (rows, ...).

        Returns:
            float32 (models, rows, classes).
        """
        module = self.build(0).to(inputs.device).eval()
        parts = torch.split(inputs, _ROWS_AT_ONCE)
        with torch.no_grad():
            return torch.stack(
                [
                    torch.cat([functional_call(module, state, (part,)) for part in parts])
                    for state in self.states
                ]
            )


@dataclass(frozen=True)
class _Jobs:
    """All trainings: what the networks share, and the seed and rows of each."""

    build: Build
    inputs: Tensor
    labels: Tensor
    ids: Tensor
    recipe: Recipe
    masked: Masked | None
    seeds: list[int]
    rows: Tensor  # int64 (models, n)
    checkpoints: frozenset[int]

    def __post_init__(self) -> None:
        count = len(self.inputs)
        if self.labels.shape != (count,) or self.labels.dtype != torch.int64:
            raise InputError(
                f"labels must be int64 ({count},), one class for each of the inputs, got "
                f"{self.labels.dtype} {tuple(self.labels.shape)}"
            )
        if self.ids.shape != (count,):
            raise InputError(f"ids must be int64 ({count},), got {tuple(self.ids.shape)}")
        if not self.seeds or min(self.seeds) < 0:
            raise InputError(f"seeds must be >= 0, and at least one, got {self.seeds}")
        rows = self.rows
        if rows.dim() != 2 or len(rows) != len(self.seeds) or rows.shape[1] < 1:
            raise InputError(
                f"rows must be int64 ({len(self.seeds)}, n), n >= 1 instances for each seed, got "
                f"{tuple(rows.shape)}"
            )
        if int(rows.min()) < 0 or int(rows.max()) >= count:
            raise InputError(
                f"rows must be in [0, {count}), the training instances, got {int(rows.min())} to "
                f"{int(rows.max())}"
            )
        wrong = [epoch for epoch in self.checkpoints if not 0 <= epoch <= self.recipe.epochs]
        if wrong:
            raise InputError(
                f"checkpoints must be in 0 to {self.recipe.epochs}, the recipe's epochs, got {wrong}"
            )

    def example(self) -> nn.Module:
        """Build one of the networks, and refuse dropout."""
        model = self.build(self.seeds[0])
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                raise InputError(
                    f"module {name!r} is a dropout layer, which draws from torch's global generator, so "
                    f"no training could be repeated: remove it from networks that are retrained"
                )
        return model

    def mask_units(self, model: nn.Module) -> dict[str, int]:
        """Count the mask units of every site by a forward of one instance."""
        if self.masked is None:
            return {}
        network = attach(model, list(self.masked.sites), self.masked.spec(0))
        with torch.no_grad(), network.mean():
            model.to(self.inputs.device)(self.inputs[:1])
        network.detach()
        return network.known_units()

    def train(self, models: slice, *, stacked: bool) -> dict[int, list[State]]:
        """Train some of the networks; their weights by epoch, at each checkpoint and at the end."""
        networks = _stack(self, models) if stacked else _single(self, models.start)
        optimizer = self.recipe.optimizer_of(networks.parameters)
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds[models]]
        found: dict[int, list[State]] = {}

        def batches(epoch: int) -> Iterator[tuple[int, Tensor]]:
            of_models = [
                training.shuffled(rows, self.recipe.batch_size, generator)
                for rows, generator in zip(self.rows[models], generators, strict=True)
            ]
            for batch in zip(*of_models, strict=True):
                yield epoch + 1, torch.stack(batch)  # (models, batch)

        def loss_of(batch: tuple[int, Tensor]) -> Tensor:
            losses = networks.losses(batch[1])
            self._check(losses.detach(), models.start, batch[0])
            return losses.sum()

        def keep(epoch: int) -> None:
            if epoch == self.recipe.epochs or epoch in self.checkpoints:
                found[epoch] = networks.states()

        keep(0)
        epochs = range(self.recipe.epochs)
        training.train(optimizer, epochs, batches, loss_of, after_epoch=keep)
        return found

    def _check(self, losses: Tensor, first: int, epoch: int) -> None:
        """Refuse losses (models,) that are not finite, and name the network."""
        if bool(losses.isfinite().all()):
            return
        model = int(losses.isfinite().int().argmin())
        raise InputError(
            f"the training of model {first + model} (seed {self.seeds[first + model]}) has a loss of "
            f"{float(losses[model])} in epoch {epoch} with {self.recipe}: lower the learning rate, or "
            f"check the inputs for NaN and infinity"
        )


def train(
    build: Build,
    inputs: Tensor,
    labels: Tensor,
    recipe: Recipe,
    seeds: Sequence[int],
    *,
    rows: Rows | None = None,
    ids: Tensor | None = None,
    masked: Masked | None = None,
    checkpoints: Sequence[int] = (),
    progress: bool = False,
) -> Trained:
    """Train one network for each seed.

    A seed fixes the initialization of a network (``build(seed)``), the order of its batches and its
    masks, whatever networks are trained beside it.

    Args:
        build: makes the networks; no dropout, which would draw from torch's global generator.
        inputs: float32 (N, ...), all training instances.
        labels: int64 (N,).
        recipe: how they are trained.
        seeds: one for each network, >= 0; a seed may come more than once, on other rows.
        rows: int64 (models, n): the instances each network is trained on; ``None``: all.
        ids: int64 (N,), what masks depend on; ``None``: 0 to N - 1.
        masked: train under turn-over masks, exactly as under ``exposed(ids)`` of a network attached
            at ``sites`` with ``MaskSpec(keep, seed=seed)``; ``None``: without masks.
        checkpoints: epochs after which the weights are kept; 0 is the initialization.
        progress: show a progress bar.

    Raises:
        InputError: shapes that do not fit, dropout in the network, or a loss that is not finite (the
            message names the network and the recipe).
    """
    start = time.perf_counter()
    count = len(inputs)
    every = torch.arange(count) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
    jobs = _Jobs(
        build,
        inputs,
        labels,
        torch.arange(count) if ids is None else check_training_ids(ids),
        recipe,
        masked,
        [int(seed) for seed in seeds],
        every.expand(len(seeds), -1) if rows is None else every,
        frozenset(checkpoints),
    )
    example = jobs.example()
    at_once = stack_size(example, count, sum(jobs.mask_units(example).values()))
    kept: dict[int, list[State]] = {}
    with tqdm(desc="training", total=len(seeds), unit="network", disable=not progress) as bar:
        for models in evenly(len(seeds), at_once):
            for epoch, states in jobs.train(models, stacked=at_once > 1).items():
                kept.setdefault(epoch, []).extend(states)
            bar.update(models.stop - models.start)
    checkpointed = {epoch: kept[epoch] for epoch in sorted(jobs.checkpoints)}
    return Trained(kept[recipe.epochs], checkpointed, time.perf_counter() - start, build)


def stack_size(model: nn.Module, train: int, units: int = 0) -> int:
    """Return how many networks like this one are trained at once; 1 where that is as fast.

    Masks take memory by training instances and by units, counted over all sites.
    """
    owners = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    # A stack of convolutions is one grouped convolution, which takes longer than as many single
    # ones; layers with buffers (batch norm) change them in place, which vmap cannot follow.
    plain = all(isinstance(owner, nn.Linear | nn.LayerNorm) for owner in owners)
    # A state dict has a name for each use of tied weights, stacked parameters one for all.
    parameters = list(model.parameters())
    alike = len(model.state_dict()) == len(parameters)
    trained = all(parameter.requires_grad for parameter in parameters)
    if not (plain and alike and trained) or any(True for _ in model.buffers()):
        return 1
    several = _STACKED_PARAMETERS // max(sum(p.numel() for p in parameters), 1)
    if several < _FEWEST_STACKED:
        return 1
    return max(1, min(several, _MOST_STACKED, _MASK_BYTES // max(train * units, 1)))


def evenly(count: int, most: int) -> list[slice]:
    """Split ``count`` >= 1 things into the fewest parts of at most ``most``, of nearly equal size."""
    parts = -(-count // most)
    bounds = [count * part // parts for part in range(parts + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


class _Networks(NamedTuple):
    """Networks as the training loop takes them."""

    parameters: list[Tensor]
    losses: Callable[[Tensor], Tensor]
    """From int64 rows (models, batch) to the loss of each network (models,)."""
    states: Callable[[], list[State]]
    """Copies of the state dicts."""


def _single(jobs: _Jobs, index: int) -> _Networks:
    seed, masked = jobs.seeds[index], jobs.masked
    model = jobs.build(seed).to(jobs.inputs.device).train()
    network = masked and attach(model, list(masked.sites), masked.spec(seed))

    def losses(rows: Tensor) -> Tensor:
        (batch,) = rows
        with network.exposed(jobs.ids[batch]) if network else nullcontext():
            outputs = model(jobs.inputs[batch])
        return functional.cross_entropy(outputs, jobs.labels[batch])[None]

    def states() -> list[State]:
        return [{name: value.detach().clone() for name, value in model.state_dict().items()}]

    return _Networks(list(model.parameters()), losses, states)


def _stack(jobs: _Jobs, models: slice) -> _Networks:
    seeds = jobs.seeds[models]
    built = [jobs.build(seed).to(jobs.inputs.device).train() for seed in seeds]
    stacked, _ = stack_module_state(built)
    masks = _Masks(built[0], jobs, seeds, jobs.masked) if jobs.masked else None

    def forward(parameters: State, batch: Tensor, factors: State) -> Any:
        if masks:
            masks.current = factors
        return functional_call(built[0], parameters, (batch,))

    forwards = vmap(forward)

    def losses(rows: Tensor) -> Tensor:
        outputs = forwards(stacked, jobs.inputs[rows], masks.of(rows) if masks else {})
        labels = jobs.labels[rows]
        each = functional.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none")
        return each.view(labels.shape).mean(dim=1)

    def states() -> list[State]:
        return [
            {name: value[one].detach().clone() for name, value in stacked.items()}
            for one in range(len(seeds))
        ]

    return _Networks(list(stacked.values()), losses, states)


class _Masks:
    """Masks of the sites' outputs inside a vmap, where ids cannot be bound."""

    def __init__(self, model: nn.Module, jobs: _Jobs, seeds: list[int], masked: Masked) -> None:
        self.current: State = {}
        self._keep = masked.keep
        different = sorted(set(seeds))
        self._slot = torch.tensor([different.index(seed) for seed in seeds])[:, None]
        self._tables = {
            name: torch.stack([masked.spec(s).exposed(jobs.ids, name, units) for s in different])
            for name, units in jobs.mask_units(model).items()
        }  # bool (different seeds, N, units)
        for site in resolve(model, list(masked.sites)):
            site.module.register_forward_hook(partial(self._multiply, site))

    def of(self, rows: Tensor) -> State:
        """Return the factors of rows (models, batch): float32 (models, batch, units) by site."""
        return {
            name: table[self._slot, rows].float() * (1 / self._keep)
            for name, table in self._tables.items()
        }

    def _multiply(self, site: ResolvedSite, _: nn.Module, __: Any, output: Tensor) -> Tensor:
        factor = self.current[site.name]
        if site.unit_size > 1:
            factor = factor.repeat_interleave(site.unit_size, dim=1)
        shape = [1] * output.dim()
        shape[0], shape[site.axis] = factor.shape
        return output * factor.view(shape)
