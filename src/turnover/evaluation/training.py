"""Training many small networks, as one batched computation where that is faster.

Knows nothing of influence: inputs, labels and a recipe in, weights out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional
from tqdm.auto import tqdm

from turnover.dropout.network import attach
from turnover.dropout.sites import ResolvedSite, resolve
from turnover.errors import InputError
from turnover.evaluation.recipe import Build, Masked, Recipe
from turnover.ids import check_training_ids
from turnover.parallel.engines import check_engine, sweeping
from turnover.parallel.jobs import evenly

State = dict[str, Tensor]
Rows = Tensor | NDArray[np.int64]

# What is batched at once has to stay near the caches: measured on one thread, a step of a batch of
# networks of 5 thousand parameters takes a quarter of the time of as many single steps, of 40 to 90
# thousand 0.7 to 0.8 of it, and of 200 thousand or more the same or longer.
_BATCHED_PARAMETERS = 1_000_000
_FEWEST_BATCHED = 8
# More than these gain little, and would be one task where there are workers for several.
_MOST_BATCHED = 64
_MASK_BYTES = 256_000_000
_ROWS_AT_ONCE = 500


@dataclass(frozen=True)
class Trained:
    """Trained networks.

    Attributes:
        states: a state dict for each network.
        checkpoints: epoch (0 is the initialisation) to the state dicts after it.
        seconds: wall-clock time of the whole.
        build: what the networks were built by.
    """

    states: list[State]
    checkpoints: dict[int, list[State]]
    seconds: float
    build: Build = field(repr=False)

    def models(self) -> list[nn.Module]:
        """The networks as plain modules in eval mode."""
        modules = []
        for state in self.states:
            module = self.build(0).eval()
            module.load_state_dict(state)
            modules.append(module)
        return modules

    def logits(self, inputs: Tensor) -> Tensor:
        """Outputs of the whole networks in eval mode: float32 (models, rows, classes)."""
        return logits(self.build, self.states, inputs)


@dataclass(frozen=True)
class _Jobs:
    """What is to be trained: everything that all networks share, and what each has of its own."""

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
                f"rows must lie in [0, {count}), the training instances, got {int(rows.min())} to "
                f"{int(rows.max())}"
            )
        wrong = [epoch for epoch in self.checkpoints if not 0 <= epoch <= self.recipe.epochs]
        if wrong:
            raise InputError(
                f"checkpoints must lie in 0 to {self.recipe.epochs}, the recipe's epochs, got {wrong}"
            )

    def batches(self, models: slice, epochs: Sequence[Iterator[Tensor]]) -> Iterator[Tensor]:
        """Instances of one epoch's batches, each (models, batch)."""
        order = torch.stack([next(permutations) for permutations in epochs])
        shuffled = self.rows[models].gather(1, order)
        yield from torch.split(shuffled, self.recipe.batch_size, dim=1)

    def check(self, losses: Tensor, first: int, epoch: int) -> None:
        """Refuse losses (models,) that are not finite, by the name of the network."""
        if bool(losses.isfinite().all()):
            return
        model = first + int(losses.isfinite().int().argmin())
        raise InputError(
            f"the training of model {model} (seed {self.seeds[model]}) has a loss of "
            f"{float(losses[model - first])} in epoch {epoch} with {self.recipe}: lower the learning "
            f"rate, or look for inputs that are not finite"
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
    engine: str = "process",
) -> Trained:
    """Train one network for each seed.

    A network's seed fixes its initialisation (``build(seed)``), the order of its batches and its masks,
    so that it is the same network in whatever company it is trained.

    Args:
        build: makes the networks; no dropout, which would draw from torch's global generator.
        inputs: float32 (N, ...), all training instances.
        labels: int64 (N,).
        recipe: how they are trained.
        seeds: one for each network, >= 0; a seed may come more than once, on other rows.
        rows: int64 (models, n): the instances each network is trained on; ``None``: all.
        ids: int64 (N,), what masks depend on; ``None``: 0 to N - 1.
        masked: train under turn-over masks, exactly as under ``exposed(ids)`` of a network attached
            at ``sites`` with ``MaskSpec(keep, seed=seed)``; ``None``: plainly.
        checkpoints: epochs after which the weights are kept; 0 is the initialisation.
        progress: show a progress bar.
        engine: what trains the networks: this ``"process"``, or ``"ray"``, the workers of a Ray cluster
            (the one this process is connected to, else that of ``RAY_ADDRESS``, else one of this
            machine), with as many threads each as this process and in the same bits. On CPUs alone.

    Raises:
        InputError: shapes that do not fit, dropout in the network, a loss that is not finite (the
            network and the recipe are named), an unknown engine, or a ``build`` that does not pickle.
    """
    check_engine(engine)
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
    example = _example(jobs)
    at_once = batch_of_models(example, count, _units(example, jobs))
    chunks = evenly(len(seeds), at_once)
    names = ("build", "recipe", "masked", "seeds", "checkpoints")
    work = partial(_chunk, {name: getattr(jobs, name) for name in names}, at_once == 1)
    found: dict[int, dict[int, list[State]]] = {}
    with (
        sweeping(engine) as sweep,
        tqdm(desc="training", total=len(seeds), unit="network", disable=not progress) as bar,
    ):
        for number, states in sweep(work, (inputs, labels, jobs.ids, jobs.rows), chunks):
            found[number] = states
            bar.update(chunks[number].stop - chunks[number].start)

    def after(epoch: int) -> list[State]:
        return [state for number in range(len(chunks)) for state in found[number][epoch]]

    kept = {epoch: after(epoch) for epoch in sorted(jobs.checkpoints)}
    return Trained(after(recipe.epochs), kept, time.perf_counter() - start, build)


def batch_of_models(model: nn.Module, train: int, units: int = 0) -> int:
    """How many networks like this one are trained at once; 1 where one at a time is as fast.

    Args:
        model: one of the networks.
        train: training instances.
        units: mask units over all sites.
    """
    owners = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    # A batch of convolutions is one grouped convolution, which takes longer than as many single
    # ones; layers with buffers (batch norm) change them in place, which vmap cannot follow.
    plain = all(isinstance(owner, nn.Linear | nn.LayerNorm) for owner in owners)
    # Of tied weights a state dict has two names, of which stacked parameters have one.
    parameters = list(model.parameters())
    alike = len(model.state_dict()) == len(parameters)
    trained = all(parameter.requires_grad for parameter in parameters)
    if not (plain and alike and trained) or any(True for _ in model.buffers()):
        return 1
    several = _BATCHED_PARAMETERS // max(sum(p.numel() for p in parameters), 1)
    if several < _FEWEST_BATCHED:
        return 1
    return max(1, min(several, _MOST_BATCHED, _MASK_BYTES // max(train * units, 1)))


def permutations(count: int, seed: int) -> Iterator[Tensor]:
    """The order of the instances in each epoch: int64 (count,), by a generator of the seed's own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(count, generator=generator)


def logits(build: Build, states: Sequence[State], inputs: Tensor) -> Tensor:
    """Outputs of whole networks in eval mode.

    Args:
        build: what the networks were built by.
        states: their state dicts.
        inputs: (rows, ...).

    Returns:
        float32 (models, rows, classes).
    """
    module = build(0).to(inputs.device).eval()
    with torch.no_grad():
        return torch.stack(
            [
                torch.cat(
                    [
                        functional_call(module, state, (x,))
                        for x in torch.split(inputs, _ROWS_AT_ONCE)
                    ]
                )
                for state in states
            ]
        )


def _example(jobs: _Jobs) -> nn.Module:
    model = jobs.build(jobs.seeds[0])
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise InputError(
                f"module {name!r} is a dropout layer, which draws from torch's global generator and "
                f"makes no run repeatable: leave it out of networks that are retrained"
            )
    return model


def _units(example: nn.Module, jobs: _Jobs) -> int:
    if jobs.masked is None:
        return 0
    return sum(_widths(example, jobs).values())


def _widths(model: nn.Module, jobs: _Jobs) -> dict[str, int]:
    """Mask units of every site, by one forward of one instance."""
    assert jobs.masked is not None
    network = attach(model, list(jobs.masked.sites), jobs.masked.spec(0))
    with torch.no_grad(), network.mean():
        model.to(jobs.inputs.device)(jobs.inputs[:1])
    network.detach()
    return network.known_units()


def _chunk(
    settings: dict[str, Any],
    alone: bool,
    inputs: Tensor,
    labels: Tensor,
    ids: Tensor,
    rows: Tensor,
    models: slice,
) -> dict[int, list[State]]:
    """Train some of the networks: epoch to their weights, at every checkpoint and at the end."""
    jobs = _Jobs(inputs=inputs, labels=labels, ids=ids, rows=rows, **settings)
    return dict(_alone(jobs, models.start) if alone else _together(jobs, models))


def _optimiser(recipe: Recipe, parameters: list[Tensor]) -> torch.optim.Optimizer:
    decay = recipe.weight_decay
    if recipe.optimiser == "adam":
        return torch.optim.Adam(parameters, recipe.learning_rate, weight_decay=decay, fused=True)
    return torch.optim.SGD(
        parameters, recipe.learning_rate, momentum=recipe.momentum, weight_decay=decay, fused=True
    )


def _alone(jobs: _Jobs, index: int) -> Iterator[tuple[int, list[State]]]:
    """Train one network; its weights at every checkpoint and at the end."""
    seed = jobs.seeds[index]
    model = jobs.build(seed).to(jobs.inputs.device).train()
    masked = jobs.masked
    network = masked and attach(model, list(masked.sites), masked.spec(seed))
    optimiser = _optimiser(jobs.recipe, list(model.parameters()))
    order = [permutations(jobs.rows.shape[1], seed)]
    for epoch in range(jobs.recipe.epochs + 1):
        batches = jobs.batches(slice(index, index + 1), order) if epoch else ()
        for (batch,) in batches:
            with network.exposed(jobs.ids[batch]) if network else nullcontext():
                outputs = model(jobs.inputs[batch])
            loss = functional.cross_entropy(outputs, jobs.labels[batch])
            jobs.check(loss.detach()[None], index, epoch)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        if epoch == jobs.recipe.epochs or epoch in jobs.checkpoints:
            yield epoch, [{name: v.detach().clone() for name, v in model.state_dict().items()}]


def _together(jobs: _Jobs, models: slice) -> Iterator[tuple[int, list[State]]]:
    """Train several networks as one; their weights at every checkpoint and at the end."""
    seeds = jobs.seeds[models]
    device = jobs.inputs.device
    built = [jobs.build(seed).to(device).train() for seed in seeds]
    named = [dict(model.named_parameters()) for model in built]
    stacked = {
        name: torch.stack([one[name].detach() for one in named]).requires_grad_()
        for name in named[0]
    }
    masks = _Masks(built[0], jobs, seeds) if jobs.masked else None
    optimiser = _optimiser(jobs.recipe, list(stacked.values()))

    def forward(parameters: State, batch: Tensor, factors: State) -> Any:
        if masks:
            masks.current = factors
        return functional_call(built[0], parameters, (batch,))

    forwards = vmap(forward)
    orders = [permutations(jobs.rows.shape[1], seed) for seed in seeds]
    for epoch in range(jobs.recipe.epochs + 1):
        for batch in jobs.batches(models, orders) if epoch else ():
            outputs = forwards(stacked, jobs.inputs[batch], masks.of(batch) if masks else {})
            labels = jobs.labels[batch]
            each = functional.cross_entropy(
                outputs.flatten(0, 1), labels.flatten(), reduction="none"
            )
            losses = each.view(labels.shape).mean(dim=1)
            jobs.check(losses.detach(), models.start, epoch)
            optimiser.zero_grad()
            losses.sum().backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        if epoch == jobs.recipe.epochs or epoch in jobs.checkpoints:
            yield (
                epoch,
                [
                    {name: value[one].detach().clone() for name, value in stacked.items()}
                    for one in range(len(seeds))
                ],
            )


class _Masks:
    """Multiplies the sites' outputs inside a vmap, where ids cannot be bound."""

    def __init__(self, model: nn.Module, jobs: _Jobs, seeds: list[int]) -> None:
        assert jobs.masked is not None
        self.current: State = {}
        self._keep = jobs.masked.keep
        different = sorted(set(seeds))
        self._slot = torch.tensor([different.index(seed) for seed in seeds])[:, None]
        self._tables = {
            name: torch.stack(
                [jobs.masked.spec(seed).exposed(jobs.ids, name, units) for seed in different]
            )
            for name, units in _widths(model, jobs).items()
        }  # bool (different seeds, N, units)
        for site in resolve(model, list(jobs.masked.sites)):
            site.module.register_forward_hook(self._hook(site))

    def of(self, batch: Tensor) -> State:
        """What the rows of a batch (models, rows) are multiplied by: (models, rows, units)."""
        return {
            name: table[self._slot, batch].float() * (1 / self._keep)
            for name, table in self._tables.items()
        }

    def _hook(self, site: ResolvedSite) -> Any:
        def multiply(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
            factor = self.current[site.name]
            if site.unit_size > 1:
                factor = factor.repeat_interleave(site.unit_size, dim=1)
            shape = [1] * output.dim()
            shape[0], shape[site.axis] = factor.shape
            return output * factor.view(shape)

        return multiply
