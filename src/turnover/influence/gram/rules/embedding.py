"""Embeddings: a row touches the few entries that it looks up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from turnover.influence.gram.factors import Explicit, Factors, Lookup
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
        tokens = torch.cat([call.inputs.flatten(1).long() for call in calls], dim=1)
        back = [call.back.reshape(len(call.back), -1, module.embedding_dim) for call in calls]
        if module.padding_idx is not None:
            tokens = tokens.masked_fill(tokens == module.padding_idx, -1)
        found = Lookup(tokens, torch.cat(back, dim=1), module.num_embeddings)
        return Explicit(found.explicit()) if module.num_embeddings <= tokens.shape[1] else found
