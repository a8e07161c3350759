"""Linear layers, with or without tokens, LoRA's among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from turnover.influence.gram.factors import Explicit, Factors, Tokens
from turnover.influence.gram.rules.base import Call, Rule, register


@register(nn.Linear)
class Linear(Rule):
    """``outputs = inputs W' + bias``, over any axes between the rows and the features."""

    def factors(
        self,
        module: nn.Module,  # noqa: ARG002
        trained: frozenset[str],
        calls: Sequence[Call],
    ) -> Factors:
        """See :class:`Rule`."""
        # A second call adds tokens.
        inputs = torch.cat([_tokens(call.inputs) for call in calls], dim=1)
        back = torch.cat([_tokens(call.back) for call in calls], dim=1)
        if "weight" not in trained:
            return Explicit(back.sum(dim=1))
        return Tokens(inputs[:, None], back[:, None], "bias" in trained).cheapest()


@register("transformers.pytorch_utils.Conv1D")
class Transposed(Linear):
    """GPT-2's linear layer, whose weight is (inputs, outputs)."""

    def flat(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """See :class:`Rule`."""
        turned = {name: value.T if name == "weight" else value for name, value in gradients.items()}
        return super().flat(turned)


def _tokens(values: Tensor) -> Tensor:
    """(rows, tokens, features)."""
    return values.reshape(len(values), -1, values.shape[-1])
