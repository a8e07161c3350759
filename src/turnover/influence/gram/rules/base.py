"""The base class of rules, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from turnover.influence.gram.factors import Factors


@dataclass(frozen=True)
class Call:
    """One call of a layer: its first input, and the gradients of its output. Rows first, float32.

    ``dtype`` is that of the output as the layer computed it; ``last``: it is an output of the model as it is.
    """

    inputs: Tensor
    back: Tensor
    dtype: torch.dtype = torch.float32
    last: bool = False


class Rule(ABC):
    """Gradients of the rows of a batch by the parameters of one kind of layer."""

    def fits(self, module: nn.Module) -> bool:  # noqa: ARG002
        """Whether the rule is for this layer, which is of a type it is registered for."""
        return True

    @abstractmethod
    def factors(self, module: nn.Module, trained: frozenset[str], calls: Sequence[Call]) -> Factors:
        """Gradients of every row, summed over the calls.

        Args:
            module: the layer.
            trained: which of ``weight`` and ``bias`` are trained: one at least.
            calls: one at least.
        """

    def flat(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Flattened gradients in the order of :meth:`Factors.explicit`: the weight, then the bias.

        Args:
            gradients: by parameter name, in the parameters' shapes.
        """
        return [gradients[name].flatten() for name in ("weight", "bias") if name in gradients]


_RULES: dict[type[nn.Module] | str, Rule] = {}

Kind = TypeVar("Kind", bound=Rule)


def register(*layers: type[nn.Module] | str) -> Callable[[type[Kind]], type[Kind]]:
    """Register the decorated rule for layers and their subclasses.

    Args:
        layers: types, or qualified names of types from libraries that turnover does not import.
    """

    def add(rule: type[Kind]) -> type[Kind]:
        _RULES.update(dict.fromkeys(layers, rule()))
        return rule

    return add


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a layer; ``None`` if it has none."""
    for kind in type(module).__mro__:
        rule = _RULES.get(kind) or _RULES.get(f"{kind.__module__}.{kind.__qualname__}")
        if rule is not None:
            return rule if rule.fits(module) else None
    return None
