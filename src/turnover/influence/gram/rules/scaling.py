"""Any layer whose only parameter scales its outputs: the RMS norms of language models, PReLU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from turnover.influence.gram.factors import Explicit, Factors
from turnover.influence.gram.rules.base import Call, Rule, register


@register(nn.Module)
class Scaling(Rule):
    """``outputs = weight * f(inputs) + g(inputs)``, with one number of the weight a feature."""

    def fits(self, module: nn.Module) -> bool:
        """See :class:`Rule`."""
        parameters = list(module.named_parameters())
        return [(name, value.dim()) for name, value in parameters] == [("weight", 1)]

    def factors(
        self,
        module: nn.Module,
        trained: frozenset[str],  # noqa: ARG002
        calls: Sequence[Call],
    ) -> Factors:
        """See :class:`Rule`."""
        one = torch.ones_like(module.get_parameter("weight"), dtype=torch.float32)

        def run(weight: Tensor, inputs: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(module, {"weight": weight}, (inputs,))
            return found

        sums = []
        for call in calls:
            scaled = call.back * (run(one, call.inputs) - run(torch.zeros_like(one), call.inputs))
            sums.append(scaled.reshape(len(scaled), -1, len(one)).sum(dim=1))
        return Explicit(torch.stack(sums).sum(dim=0))
