"""Embeddings: a row touches the few entries that it looks up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from turnover.influence.gram.factors import Factors, Lookup
from turnover.influence.gram.rules.base import Call, Rule, register


@register(nn.Embedding)
class Embedding(Rule):
    """Token, position and type embeddings."""

    def factors(
        self,
        module: nn.Module,
        trained: frozenset[str],  # noqa: ARG002
        calls: Sequence[Call],
    ) -> Factors:
        """See :class:`Rule`."""
        assert isinstance(module, nn.Embedding)
        return lookups(module, calls)


def lookups(module: nn.Embedding, calls: Sequence[Call]) -> Lookup:
    """All entries that an embedding looked up, with the gradients by them."""
    if type(module).forward is not nn.Embedding.forward:
        calls = [_underlying(module, call) for call in calls]
    tokens = torch.cat([call.inputs.flatten(1).long() for call in calls], dim=1)
    back = [call.back.reshape(len(call.back), -1, module.embedding_dim) for call in calls]
    if module.padding_idx is not None:
        tokens = tokens.masked_fill(tokens == module.padding_idx, -1)
    return Lookup(tokens, torch.cat(back, dim=1), module.num_embeddings)


def _underlying(module: nn.Embedding, call: Call) -> Call:
    """The lookup in a call that finds its entries itself (OPT's positions), or scales them (Gemma)."""

    def run(column: Tensor) -> Tensor:
        weight = column[:, None].expand(module.weight.shape)
        found: Tensor = torch.func.functional_call(module, {"weight": weight}, (call.inputs,))
        return found.float()

    entries = torch.arange(module.num_embeddings, device=call.back.device, dtype=torch.float32)
    ones = torch.ones_like(entries)
    tokens = (run(entries) / run(ones))[..., 0].round().long()
    return Call(tokens, call.back * run(ones.to(module.weight.dtype)), call.dtype)
