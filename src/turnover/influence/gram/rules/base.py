"""What a rule is, and the register of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor, nn

from turnover.influence.gram.factors import Factors


@dataclass(frozen=True)
class Call:
    """One call of a layer: its first input, and the gradients of its output. Rows first, float32."""

    inputs: Tensor
    back: Tensor


class Rule(Protocol):
    """Gradients of the rows of a batch by the parameters of one kind of layer."""

    def factors(self, module: nn.Module, trained: frozenset[str], calls: Sequence[Call]) -> Factors:
        """Gradients of every row.

        Args:
            module: the layer.
            trained: which of ``weight`` and ``bias`` are trained: one at least.
            calls: at least one; the gradients of several are added up.
        """

    def flat(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Gradients by parameter name, in the order of :meth:`Factors.explicit`."""


class InOrder:
    """The weight as it lies in memory, then the bias."""

    def flat(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """See :class:`Rule`."""
        return [gradients[name].flatten() for name in ("weight", "bias") if name in gradients]


_BY_TYPE: dict[type[nn.Module], Rule] = {}
_BY_NAME: dict[str, Rule] = {}

Made = TypeVar("Made", bound=Rule)


def register(*kinds: type[nn.Module] | str) -> Callable[[type[Made]], type[Made]]:
    """Class decorator: the rule of these types (subclasses too) or qualified names of types."""

    def add(made: type[Made]) -> type[Made]:
        rule = made()
        for kind in kinds:
            if isinstance(kind, str):
                _BY_NAME[kind] = rule
            else:
                _BY_TYPE[kind] = rule
        return made

    return add


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a layer, if there is one."""
    for kind in type(module).__mro__:
        rule = _BY_TYPE.get(kind) or _BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
        if rule is not None:
            return rule
    return None
