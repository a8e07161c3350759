"""Layers of a model that have a rule, and whether a rule's gradient is autograd's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from turnover.dropout.modules import is_sharded
from turnover.dropout.sites import canonical_name
from turnover.errors import InputError
from turnover.influence.gram.rules import Rule, rule_of
from turnover.influence.gram.rules.tied import Tied

_TOLERANCE = 2e-3
"""Relative difference from autograd's gradient that float32 in another order may make."""
_COARSE = 4
"""The same in units of the last place of a coarser precision: autograd rounds its gradients to it."""
_ABSENT = 5e-3
"""Share of the tolerance by which a gradient may differ that is 0 beside the largest."""


@dataclass(frozen=True)
class Part:
    """A layer with a rule.

    Attributes:
        module: the layer.
        rule: of its type.
        names: of its trained parameters in the model, by ``weight`` and ``bias``.
        also: layers with the same weight, whose calls the rule is given too.
    """

    module: nn.Module
    rule: Rule
    names: Mapping[str, str]
    also: tuple[nn.Module, ...] = ()

    def order(self, device: torch.device) -> Tensor:
        """Positions of the numbers of :meth:`Rule.flat` in the concatenated parameters."""
        positions, start = {}, 0
        for key in self.names:
            shape = getattr(self.module, key).shape
            stop = start + shape.numel()
            positions[key] = torch.arange(start, stop, device=device).view(shape)
            start = stop
        return torch.cat(self.rule.flat(positions))

    def agrees(
        self,
        gradient: Tensor | None,
        truth: Mapping[str, Tensor | None],
        scale: float,
        tolerance: float,
    ) -> bool:
        """Whether a row's gradient by the rule is autograd's.

        Args:
            gradient: flat; ``None``: the layer did not run for the row.
            truth: autograd's gradients by parameter name.
            scale: the largest norm among them.
            tolerance: relative difference allowed.
        """
        found = {key: truth[name] for key, name in self.names.items()}
        nonzero = {key: value.float() for key, value in found.items() if value is not None}
        if gradient is None:
            return all(float(value.norm()) <= 1e-6 * scale for value in nonzero.values())
        if len(nonzero) < len(found):
            return not nonzero and float(gradient.norm()) <= 1e-6 * scale
        expected = torch.cat(self.rule.flat(nonzero))
        if expected.shape != gradient.shape:
            return False
        difference = float((expected - gradient).norm())
        return difference <= tolerance * (float(expected.norm()) + _ABSENT * scale)


def tolerance_of(model: nn.Module, dtypes: Iterable[torch.dtype]) -> float:
    """How far a rule may be from autograd in a model whose layers have outputs of some dtypes."""
    every = {*dtypes, *(parameter.dtype for parameter in model.parameters())}
    coarsest = max(torch.finfo(one).eps for one in every if one.is_floating_point)
    return max(_TOLERANCE, _COARSE * coarsest)


def parts_of(model: nn.Module) -> tuple[dict[str, Part], list[str]]:
    """Layers with a rule by name, and the names of all other trained parameters."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    embeddings = _tied(model)
    parts: dict[str, Part] = {}
    covered: set[str] = set()
    for name, module in model.named_modules():
        tied = embeddings.get(module)
        # Other weights that several layers share have cross terms which no rule knows.
        names = {
            key: f"{name}.{key}" if name else key
            for key, parameter in module.named_parameters(recurse=False)
            if key in ("weight", "bias")
            and parameter.requires_grad
            and (len(owners[parameter]) == 1 or (tied is not None and key == "weight"))
        }
        rule = rule_of(module) if tied is None else Tied(tied)
        if rule is not None and names:
            parts[name] = Part(module, rule, names, () if tied is None else (tied,))
            covered.update(names.values())
    trained = (names for parameter, names in owners.items() if parameter.requires_grad)
    return parts, [names[0] for names in trained if covered.isdisjoint(names)]


def _tied(model: nn.Module) -> dict[nn.Module, nn.Embedding]:
    """Linear layers that share a trained weight with an embedding, and with nothing else."""
    users: dict[nn.Parameter, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(parameter, []).append(module)
    found: dict[nn.Module, nn.Embedding] = {}
    for parameter, modules in users.items():
        if parameter.requires_grad and len(modules) == 2:
            first, second = sorted(modules, key=lambda module: isinstance(module, nn.Linear))
            if isinstance(first, nn.Embedding) and isinstance(second, nn.Linear):
                found[second] = first
    return found


def check_model(model: nn.Module) -> None:
    """Reject a model whose rows have no gradients of their own."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "no parameter of the model is trained (requires_grad is False for all): set it to True for "
            "those that were trained"
        )
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise InputError(
            "the model's parameters are sharded over processes, and gram needs whole parameters: save "
            "the model, and load it in one process"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(
                f"{canonical_name(name)!r} normalizes by the statistics of its batch even in eval "
                f"mode, so rows mix: use track_running_stats=True"
            )
