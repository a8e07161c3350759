"""Scale and shift of normalization layers: few numbers, so their gradients are explicit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from turnover.influence.gram.factors import Explicit, Factors
from turnover.influence.gram.rules.base import Call, Rule, register


@register(
    *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)
class Normalization(Rule):
    """``outputs = weight * standardized inputs + bias``."""

    def factors(self, module: nn.Module, trained: frozenset[str], calls: Sequence[Call]) -> Factors:
        """See :class:`Rule`."""
        columns = []
        if "weight" in trained:
            scaled = [
                _sums(module, call.back * _standardized(module, call.inputs)) for call in calls
            ]
            columns.append(torch.stack(scaled).sum(dim=0))
        if "bias" in trained:
            shifted = [_sums(module, call.back) for call in calls]
            columns.append(torch.stack(shifted).sum(dim=0))
        return Explicit(torch.cat(columns, dim=1))


def _standardized(module: nn.Module, inputs: Tensor) -> Tensor:
    if isinstance(module, nn.LayerNorm):
        return functional.layer_norm(inputs, list(module.normalized_shape), eps=module.eps)
    if isinstance(module, nn.RMSNorm):
        return functional.rms_norm(inputs, list(module.normalized_shape), eps=module.eps)
    if isinstance(module, nn.GroupNorm):
        return functional.group_norm(inputs, module.num_groups, eps=module.eps)
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    mean, variance = (
        None if one is None else one.to(inputs.dtype)
        for one in (module.running_mean, module.running_var)
    )
    return functional.batch_norm(inputs, mean, variance, eps=module.eps)


def _sums(module: nn.Module, values: Tensor) -> Tensor:
    """Sums over all tokens, or positions of a channel, that share a parameter: (rows, parameters)."""
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return values.reshape(len(values), -1, *module.normalized_shape).sum(dim=1).flatten(1)
    return values.reshape(*values.shape[:2], -1).sum(dim=2)
