"""Scale and shift of normalisation layers, which are few numbers: their gradients are explicit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from turnover.influence.gram.factors import Explicit, Factors
from turnover.influence.gram.rules.base import Call, InOrder, register


class _Normalised(InOrder, ABC):
    def factors(self, module: nn.Module, trained: frozenset[str], calls: Sequence[Call]) -> Factors:
        """See :class:`turnover.influence.gram.rules.Rule`."""
        columns = []
        if "weight" in trained:
            scaled = [
                self._sums(module, c.back * self._standardise(module, c.inputs)) for c in calls
            ]
            columns.append(torch.stack(scaled).sum(dim=0))
        if "bias" in trained:
            shifted = [self._sums(module, call.back) for call in calls]
            columns.append(torch.stack(shifted).sum(dim=0))
        return Explicit(torch.cat(columns, dim=1))

    @abstractmethod
    def _standardise(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """What the scale multiplies."""

    @abstractmethod
    def _sums(self, module: nn.Module, values: Tensor) -> Tensor:
        """Sums over all places that share a parameter: (rows, parameters)."""


class _OverTokens(_Normalised):
    def _sums(self, module: nn.Module, values: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
        return values.reshape(len(values), -1, *module.normalized_shape).sum(dim=1).flatten(1)


class _OverPlaces(_Normalised):
    def _sums(self, module: nn.Module, values: Tensor) -> Tensor:  # noqa: ARG002
        return values.reshape(*values.shape[:2], -1).sum(dim=2)


@register(nn.LayerNorm)
class LayerNorm(_OverTokens):
    """Over the last axes."""

    def _standardise(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.LayerNorm)
        return functional.layer_norm(inputs, list(module.normalized_shape), eps=module.eps)


@register(nn.RMSNorm)
class RMSNorm(_OverTokens):
    """Over the last axes, without a mean."""

    def _standardise(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.RMSNorm)
        return functional.rms_norm(inputs, list(module.normalized_shape), eps=module.eps)


@register(nn.GroupNorm)
class GroupNorm(_OverPlaces):
    """Over groups of channels."""

    def _standardise(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.GroupNorm)
        return functional.group_norm(inputs, module.num_groups, eps=module.eps)


@register(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
class BatchNorm(_OverPlaces):
    """By the running statistics, which are constants."""

    def _standardise(self, module: nn.Module, inputs: Tensor) -> Tensor:
        assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        mean, variance = module.running_mean, module.running_var
        return functional.batch_norm(inputs, mean, variance, eps=module.eps)
