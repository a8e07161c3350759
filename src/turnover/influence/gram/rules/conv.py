"""Convolutions in one and two dimensions: linear layers on patches, a token for each position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from turnover.influence.gram.factors import Explicit, Factors, Tokens
from turnover.influence.gram.rules.base import Call, Rule, register


@register(nn.Conv1d, nn.Conv2d)
class Convolution(Rule):
    """Any stride, padding, dilation and groups."""

    def factors(self, module: nn.Module, trained: frozenset[str], calls: Sequence[Call]) -> Factors:
        """See :class:`Rule`."""
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        back = torch.cat([call.back.flatten(2) for call in calls], dim=2)
        if "weight" not in trained:
            return Explicit(back.sum(dim=2))
        patches = torch.cat([_patches(module, call.inputs) for call in calls], dim=2)
        inputs, back = (  # (rows, groups, positions, channels)
            values.reshape(len(values), module.groups, -1, values.shape[2]).mT
            for values in (patches, back)
        )
        return Tokens(inputs, back, "bias" in trained)


def _patches(module: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    """The input patch of every output position: (rows, channels * kernel, positions)."""
    sides: list[int] = []
    for axis in reversed(range(len(module.kernel_size))):
        if isinstance(module.padding, str):
            total = module.dilation[axis] * (module.kernel_size[axis] - 1)
            total = total if module.padding == "same" else 0
            sides += [total // 2, total - total // 2]
        else:
            sides += [int(module.padding[axis])] * 2
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = functional.pad(inputs, sides, mode=mode)
    if padded.dim() == 3:
        padded = padded[:, :, None]
    kernel, dilation, stride = (
        (1, *sizes) if len(sizes) == 1 else sizes
        for sizes in (module.kernel_size, module.dilation, module.stride)
    )
    return functional.unfold(padded, kernel, dilation=dilation, stride=stride)
