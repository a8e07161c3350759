"""Linear layers, with or without tokens; LoRA's are among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from turnover.influence.gram.factors import Explicit, Factors, Tokens
from turnover.influence.gram.rules.base import Call, InOrder, register


@register(nn.Linear)
class Linear(InOrder):
    """``outputs = inputs W' + bias``, over any axes between the rows and the features."""

    def factors(
        self,
        module: nn.Module,  # noqa: ARG002
        trained: frozenset[str],
        calls: Sequence[Call],
    ) -> Factors:
        """See :class:`turnover.influence.gram.rules.Rule`."""
        # To the weight a second call is more tokens.
        inputs = torch.cat([_tokens(call.inputs) for call in calls], dim=1)
        back = torch.cat([_tokens(call.back) for call in calls], dim=1)
        if "weight" not in trained:
            return Explicit(back.sum(dim=1))
        return Tokens(inputs[:, None], back[:, None], "bias" in trained).cheapest()


@register("transformers.pytorch_utils.Conv1D")
class Transposed(Linear):
    """The linear layer of GPT-2, whose weight is (inputs, outputs)."""

    def flat(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """See :class:`turnover.influence.gram.rules.Rule`."""
        turned = {name: value.T if name == "weight" else value for name, value in gradients.items()}
        return super().flat(turned)


def _tokens(values: Tensor) -> Tensor:
    """(rows, tokens, features)."""
    return values.reshape(len(values), -1, values.shape[-1])
