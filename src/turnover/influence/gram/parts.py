"""Layers of a model that have a rule, and whether a rule's gradient is autograd's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from turnover.dropout.modules import is_sharded
from turnover.dropout.sites import canonical_name
from turnover.errors import InputError
from turnover.influence.gram.rules import Rule, rule_of

_TOLERANCE = 2e-3
"""Relative difference from autograd's gradient that float32 in another order may make."""


@dataclass(frozen=True)
class Part:
    """A layer with a rule.

    Attributes:
        module: the layer.
        rule: of its type.
        names: of its trained parameters in the model, by ``weight`` and ``bias``.
    """

    module: nn.Module
    rule: Rule
    names: Mapping[str, str]

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
        self, gradient: Tensor | None, truth: Mapping[str, Tensor | None], scale: float
    ) -> bool:
        """Whether a row's gradient by the rule is autograd's.

        Args:
            gradient: flat; ``None``: the layer did not run for the row.
            truth: autograd's gradients by parameter name.
            scale: the largest norm among them.
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
        return difference <= _TOLERANCE * float(expected.norm()) + 1e-5 * scale


def parts_of(model: nn.Module) -> tuple[dict[str, Part], list[str]]:
    """Layers with a rule by name, and the names of all other trained parameters."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    parts: dict[str, Part] = {}
    covered: set[str] = set()
    for name, module in model.named_modules():
        # Weights that several layers share have cross terms, which no rule knows.
        names = {
            key: f"{name}.{key}" if name else key
            for key, parameter in module.named_parameters(recurse=False)
            if key in ("weight", "bias") and parameter.requires_grad and len(owners[parameter]) == 1
        }
        rule = rule_of(module)
        if rule is not None and names:
            parts[name] = Part(module, rule, names)
            covered.update(names.values())
    trained = (names for parameter, names in owners.items() if parameter.requires_grad)
    return parts, [names[0] for names in trained if covered.isdisjoint(names)]


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
