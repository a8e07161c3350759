"""Audit: find parameters through which the hidden sub-network learns its instance.

A scalar parameter that gets a gradient from an instance under both its exposed and its hidden mask is
shared, and leaks the instance into the hidden sub-network. Autograd tells, element by element and instance
by instance. The weights are random meanwhile, because a zero (LoRA's B at the start) would hide a leak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from turnover.batches import Batch
from turnover.dropout.modules import device_of, exclusive, is_sharded
from turnover.dropout.row_order import check_site_order
from turnover.dropout.rowwise import RowCheck
from turnover.dropout.sites import canonical_name
from turnover.dropout.torch_private import has_reentrant, is_reentrant
from turnover.errors import InputError

if TYPE_CHECKING:
    from turnover.dropout.contexts import Context
    from turnover.dropout.network import Network

    _Side = Callable[[Sequence[int]], Context]
_Reached = list[Tensor | None]
"""Bool masks of parameters; ``None``: no scalar of the parameter."""

_ROWS = 8
_REENTRANT = (
    "the audit sees no gradients within torch.utils.checkpoint(use_reentrant=True): pass "
    "use_reentrant=False, or audit without gradient checkpointing"
)
_ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)


@dataclass(frozen=True)
class ParameterAudit:
    """One trainable parameter: ``leaking`` of its ``elements`` scalars are shared."""

    name: str
    shape: tuple[int, ...]
    elements: int
    leaking: int

    @property
    def share(self) -> float:
        """Leaking share of the parameter's scalars, in [0, 1]."""
        return self.leaking / self.elements


@dataclass(frozen=True)
class AuditReport:
    """Parameters, buffers and settings that leak instances into their hidden sub-networks.

    Attributes:
        parameters: every trainable parameter.
        buffers: names of buffers that a training forward changes (batch statistics): they hold
            every instance, and mix instances within a batch.
        settings: sentences on settings of the trainer that leak instances.
    """

    parameters: tuple[ParameterAudit, ...]
    buffers: tuple[str, ...]
    settings: tuple[str, ...]

    @property
    def leaking_share(self) -> float:
        """Share of trainable scalars, in [0, 1], that learn an instance under both masks."""
        total = sum(parameter.elements for parameter in self.parameters)
        return sum(parameter.leaking for parameter in self.parameters) / total if total else 0.0

    @property
    def clean(self) -> bool:
        """Whether nothing leaks."""
        return self.leaking_share == 0 and not self.buffers and not self.settings

    def __str__(self) -> str:
        leaks = sorted((p for p in self.parameters if p.leaking), key=lambda p: -p.leaking)
        lines = [
            f"{self.leaking_share:.2%} of the trainable scalars receive a gradient from one instance "
            f"both exposed and hidden"
        ]
        if leaks:
            width = max(len(parameter.name) for parameter in leaks)
            lines.append(f"{'parameter':<{width}}  {'shape':<16} {'leaking':>10}  share")
            for parameter in leaks:
                shape = "x".join(map(str, parameter.shape))
                lines.append(
                    f"{parameter.name:<{width}}  {shape:<16} {parameter.leaking:>10}  "
                    f"{parameter.share:.1%}"
                )
            lines.append(
                "fix: freeze these (requires_grad_(False)), drop the bias after a site, or mask the "
                "activations they produce"
            )
        lines.extend(
            f"buffer {name} changes with every batch and holds all of its instances; fix: keep "
            f"that module in eval mode, or use GroupNorm or LayerNorm below the sites"
            for name in self.buffers
        )
        lines.extend(self.settings)
        return "\n".join(lines)


def audit(
    network: Network,
    batch: Batch,
    *,
    max_grad_norm: float | None,
    optimizer: torch.optim.Optimizer | None,
) -> AuditReport:
    """The audit behind :meth:`turnover.dropout.network.Network.audit`."""
    model = network.model
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise InputError("the model has no trainable parameter, so there is nothing to audit")
    if any(is_sharded(parameter) for _, parameter in named):
        raise InputError(
            "the model's parameters are sharded over processes, and a process sees only the gradients "
            "of its own shard: audit before fully_shard"
        )
    if len(batch) > _ROWS:
        # Finds inputs that all rows share. Rows that mix are a finding of the audit, not an error.
        with suppress(InputError):
            batch = RowCheck(model, _summed, network.mean)(batch)
    batch = batch.rows(0, _ROWS).to(device_of(model))
    parameters = [parameter for _, parameter in named]
    held = network.masking.contexts.held()
    with exclusive(model), held, _randomized(model, parameters) as before:
        check_site_order(network, batch)
        exposed, hidden = (
            _reached(network, side, batch, parameters)
            + _reached_together(network, side, batch, parameters)
            for side in (network.exposed, network.hidden)
        )
        changed = [
            canonical_name(name)
            for name, value in model.named_buffers()
            if name in before and not torch.equal(value, before[name])
        ]
    shared = [torch.zeros_like(p, dtype=torch.bool) for p in parameters]
    for row_exposed, row_hidden in zip(exposed, hidden, strict=True):
        for mask, kept, dropped in zip(shared, row_exposed, row_hidden, strict=True):
            if kept is not None and dropped is not None:
                mask |= kept & dropped
    leaking = [int(mask.sum()) for mask in shared]
    return AuditReport(
        tuple(
            ParameterAudit(canonical_name(name), tuple(p.shape), p.numel(), count)
            for (name, p), count in zip(named, leaking, strict=True)
        ),
        tuple(changed),
        tuple(_settings(max_grad_norm, optimizer)),
    )


def _summed(outputs: Any, batch: Batch) -> Tensor:
    return _flat(outputs, len(batch)).sum(dim=1)


def _reached(
    network: Network, side: _Side, batch: Batch, parameters: Sequence[Tensor]
) -> list[_Reached]:
    """The scalars that get a gradient from each row."""
    rows = range(len(batch))
    with side(rows):
        outputs = _flat(batch.call(network.model), len(rows))
        reached = [_gradients([outputs[row]], parameters) for row in rows]
        if has_reentrant([outputs]) and any(
            all(g is None for g in column) for column in zip(*reached, strict=True)
        ):
            raise InputError(_REENTRANT)
    return reached


def _reached_together(
    network: Network, side: _Side, batch: Batch, parameters: Sequence[Tensor]
) -> list[_Reached]:
    """As :func:`_reached`, through outputs without rows, such as losses.

    In a batch of one row, repeated, they belong to that row. An output that is the same for all rows, such
    as a penalty on weights, belongs to none.
    """
    outputs = []
    for row in range(len(batch)):
        repeated = batch.rows(row, row + 1).expanded(len(batch))
        with side([row] * len(batch)):
            outputs.append(_without_rows(repeated.call(network.model), len(batch)))
    differing = [
        index
        for index, first in enumerate(outputs[0])
        if any(not torch.equal(first, one[index]) for one in outputs[1:])
    ]
    return [_gradients([one[index] for index in differing], parameters) for one in outputs]


def _without_rows(outputs: Any, rows: int) -> list[Tensor]:
    """Floating-point outputs with a gradient that have no axis 0 of the batch's rows."""
    return [
        value
        for value in _tensors(outputs)
        if value.is_floating_point()
        and value.requires_grad
        and (not value.dim() or len(value) != rows)
    ]


def _gradients(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> _Reached:
    """Where parameters get a gradient from values, weighted differently so that they do not cancel."""
    if not values:
        return [None] * len(parameters)
    flat = torch.cat([value.reshape(-1).float() for value in values])
    weighted = (flat * torch.linspace(0.5, 1.5, len(flat), device=flat.device)).sum()
    try:
        found = torch.autograd.grad(weighted, parameters, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if not is_reentrant(error):
            raise
        raise InputError(_REENTRANT) from error
    return [None if gradient is None else gradient != 0 for gradient in found]


def _flat(outputs: Any, rows: int) -> Tensor:
    """All numbers in a model's outputs that belong to single rows: float32 (rows, numbers)."""
    numbers = [v for v in _tensors(outputs) if v.is_floating_point() and v.dim() and len(v)]
    of_rows = [value for value in numbers if len(value) == rows]
    # Otherwise several in a row for each row of the batch, such as tokens.
    of_rows = of_rows or [value for value in numbers if len(value) % rows == 0]
    if not of_rows:
        raise InputError(
            f"the audit found no floating-point tensor with the {rows} rows of the batch on axis 0 in the "
            f"model's outputs ({type(outputs).__name__}): let the model return such tensors, in any nest "
            f"of tuples, lists, dictionaries and dataclasses"
        )
    return torch.cat([value.reshape(rows, -1).float() for value in of_rows], dim=1)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
    elif is_dataclass(value) or isinstance(value, torch.distributions.Distribution):
        yield from _tensors(vars(value))


@contextmanager
def _randomized(
    model: nn.Module, parameters: Sequence[nn.Parameter]
) -> Iterator[dict[str, Tensor]]:
    """Training mode without dropout and with random trainable weights; yields the buffers from before.

    Restores everything. A model in training mode keeps the modes of its modules: a batch norm that the
    user holds in eval mode does not leak.
    """
    modes = {module: module.training for module in model.modules()}
    saved = [parameter.detach().clone() for parameter in parameters]
    buffers = {name: value.detach().clone() for name, value in model.named_buffers()}
    generator = torch.Generator().manual_seed(0)
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    try:
        with torch.no_grad():
            for parameter in parameters:
                fan_in = max(1, parameter.shape[1:].numel()) if parameter.dim() > 1 else 4
                noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
                parameter.copy_(noise)
        if not model.training:
            model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        # Functional dropout in attention draws from the global generator.
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            yield buffers
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)
            for name, value in model.named_buffers():
                if name in buffers:
                    value.copy_(buffers[name])
        for module, mode in modes.items():
            module.training = mode


def clips(max_grad_norm: float | None) -> bool:
    """Whether a trainer with this setting clips gradients by their global norm.

    0 disables clipping in Hugging Face and Lightning; no gradient exceeds an infinite norm.
    """
    return max_grad_norm is not None and 0 < max_grad_norm < float("inf")


def _settings(
    max_grad_norm: float | None, optimizer: torch.optim.Optimizer | None
) -> Iterator[str]:
    if clips(max_grad_norm):
        yield (
            f"gradient clipping by global norm (max_grad_norm={max_grad_norm:g}) scales every gradient "
            f"by all instances of the batch; fix: clip by value, or not at all: in Hugging Face's Trainer "
            f"max_grad_norm=0, in Lightning gradient_clip_val=None, in Stable-Baselines3 "
            f'max_grad_norm=float("inf"), in Accelerate and in a loop of your own leave clip_grad_norm_ '
            f"out (at 0 it would set every gradient to zero)"
        )
    # Accelerate wraps the optimizer.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if optimizer is not None and not isinstance(optimizer, _ELEMENTWISE):
        yield (
            f"optimizer {type(optimizer).__name__} is not known to update element by element, so one "
            f"unit's gradient may move another's weights; fix: SGD or AdamW"
        )
