"""Linear layers, with or without tokens, LoRA's among them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from turnover.influence.gram.factors import Explicit, Factors, Lookup, Tokens
from turnover.influence.gram.rules.base import Call, Rule, register
from turnover.influence.gram.vocabulary import Dense, Head, compressed, is_head


@register(nn.Linear)
class Linear(Rule):
    """``outputs = inputs W' + bias``, over any axes between the rows and the features."""

    def factors(self, module: nn.Module, trained: frozenset[str], calls: Sequence[Call]) -> Factors:
        """See :class:`Rule`."""
        inputs, back = together(calls)
        if "weight" not in trained:
            return Explicit(back.sum(dim=1))
        if isinstance(module, nn.Linear) and calls[0].last and is_head(module.weight):
            return compressed(logits_of(module, trained, inputs, back, calls[0].dtype))
        return Tokens(inputs[:, None], back[:, None], "bias" in trained)


@register("transformers.pytorch_utils.Conv1D")
class Transposed(Linear):
    """GPT-2's linear layer, whose weight is (inputs, outputs)."""

    def flat(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """See :class:`Rule`."""
        turned = {name: value.T if name == "weight" else value for name, value in gradients.items()}
        return super().flat(turned)


def logits_of(
    module: nn.Linear,
    trained: Collection[str],
    inputs: Tensor,
    back: Tensor,
    dtype: torch.dtype,
    lookup: Lookup | None = None,
) -> Dense:
    """The gradients of a layer as those of an output head.

    Args:
        module: the layer.
        trained: which of its parameters are.
        inputs: of the layer (rows, tokens, width).
        back: gradients of its outputs (rows, tokens, entries).
        dtype: of its outputs.
        lookup: of an embedding with the same weight.
    """
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    head = Head(weight, bias, "bias" in trained, dtype)
    if lookup is None:
        none = inputs[:, :0]
        return Dense(inputs, none[..., 0].long(), none, head, back)
    return Dense(inputs, lookup.tokens, lookup.back, head, back)


def together(calls: Sequence[Call]) -> tuple[Tensor, Tensor]:
    """Inputs and gradients of the outputs, (rows, tokens, features); a second call adds tokens."""
    inputs = torch.cat([_tokens(call.inputs) for call in calls], dim=1)
    return inputs, torch.cat([_tokens(call.back) for call in calls], dim=1)


def _tokens(values: Tensor) -> Tensor:
    """(rows, tokens, features)."""
    return values.reshape(len(values), -1, values.shape[-1])
