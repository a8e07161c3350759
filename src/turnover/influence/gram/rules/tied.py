"""A weight that an embedding and a linear layer share: the words of a language model, in and out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from turnover.influence.gram.factors import Factors
from turnover.influence.gram.rules.base import Call
from turnover.influence.gram.rules.embedding import lookups
from turnover.influence.gram.rules.linear import Linear, logits_of, together
from turnover.influence.gram.vocabulary import compressed, is_head


class Tied(Linear):
    """The rule of the linear layer, which is given the calls of both.

    Args:
        embedding: has the same weight.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        self._embedding = embedding

    def factors(self, module: nn.Module, trained: frozenset[str], calls: Sequence[Call]) -> Factors:
        """See :class:`Rule`."""
        assert isinstance(module, nn.Linear)
        looked = [call for call in calls if not call.inputs.is_floating_point()]
        heads = [call for call in calls if call.inputs.is_floating_point()]
        back = calls[0].back
        if heads:
            inputs, back = together(heads)
        else:
            inputs, back = (
                back.new_zeros((len(back), 0, size)) for size in module.weight.shape[::-1]
            )
        dtype = (heads or calls)[-1].dtype
        lookup = lookups(self._embedding, looked) if looked else None
        dense = logits_of(module, trained, inputs, back, dtype, lookup)
        # An embedding with max_norm changes the weight that the compressed form needs.
        if not is_head(module.weight) or self._embedding.max_norm is not None:
            return dense
        return compressed(dense)
