"""Layers of a model whose gradients a rule knows, and when a rule's gradient is autograd's."""

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
"""Share of its norm by which a gradient may differ from autograd's: float32 in another order."""


@dataclass(frozen=True)
class Part:
    """A layer with a rule, and its parameters.

    Attributes:
        module: the layer.
        rule: of its kind.
        trained: which of ``weight`` and ``bias``.
        parameters: their names in the model.
    """

    module: nn.Module
    rule: Rule
    trained: frozenset[str]
    parameters: tuple[str, ...]

    def order(self, device: torch.device) -> Tensor:
        """Where the numbers of :meth:`Rule.flat` are in the parameters, one after another."""
        places, start = {}, 0
        for name in self.parameters:
            key = name.rpartition(".")[2]
            parameter = getattr(self.module, key)
            stop = start + parameter.numel()
            places[key] = torch.arange(start, stop, device=device).view(parameter.shape)
            start = stop
        return torch.cat(self.rule.flat(places))


def agrees(
    given: Tensor | None, part: Part, truth: Mapping[str, Tensor | None], scale: float
) -> bool:
    """Whether a gradient of a part is that of autograd.

    Args:
        given: by the part's rule; ``None``: the row did not come by.
        part: the part.
        truth: gradients of autograd by the names of the parameters.
        scale: norm of the largest of all parts.
    """
    found = {name.rpartition(".")[2]: truth[name] for name in part.parameters}
    there = {name: value.float() for name, value in found.items() if value is not None}
    if given is None:
        return all(float(value.norm()) <= 1e-6 * scale for value in there.values())
    if len(there) < len(found):
        return not there and float(given.norm()) <= 1e-6 * scale
    wanted = torch.cat(part.rule.flat(there))
    if wanted.shape != given.shape:
        return False
    difference = float((wanted - given).norm())
    return difference <= _TOLERANCE * float(wanted.norm()) + 1e-5 * scale


def divided(model: nn.Module) -> tuple[dict[str, Part], list[str]]:
    """Parts that have a rule, and the names of all other trained parameters."""
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    parts: dict[str, Part] = {}
    known: set[str] = set()
    for name, module in model.named_modules():
        own = {
            key: f"{name}.{key}" if name else key
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        }
        rule = rule_of(module)
        # A weight that several layers share has cross terms, which the general way adds up.
        alone = {k: n for k, n in own.items() if k in ("weight", "bias")}
        alone = {k: n for k, n in alone.items() if len(owners[getattr(module, k)]) == 1}
        if rule is None or not alone:
            continue
        parts[name] = Part(module, rule, frozenset(alone), tuple(alone.values()))
        known.update(alone.values())
    rest = [names[0] for p, names in owners.items() if p.requires_grad and known.isdisjoint(names)]
    return parts, rest


def check(model: nn.Module) -> None:
    """Refuse a model that has no gradients of rows.

    Raises:
        InputError: nothing is trained, sharded parameters, or batch statistics even in eval mode.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            "no parameter of the model is trained (requires_grad is False for all): switch it on for "
            "those that were"
        )
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise InputError(
            "the model's parameters are sharded over processes, and gram needs gradients by whole ones: "
            "save the model, and load it in one process"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise InputError(
                f"{canonical_name(name)!r} normalises by the statistics of its batch even in eval "
                f"mode, so rows mix: use track_running_stats=True"
            )
