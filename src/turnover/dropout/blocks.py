"""Parallel networks whose mean is the model: whole small networks as the units of turn-over dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from turnover.errors import InputError, check_whole

Activation = Callable[[Tensor], Tensor]


class BlockOutputs(nn.Module):
    """The site of :class:`Blocks`: each block's outputs and a one, (rows, blocks, outputs + 1).

    Masks multiply the ones as they multiply the outputs, so that their sum counts the kept blocks.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.out_channels = blocks

    def forward(self, outputs: Tensor) -> Tensor:
        """Outputs float (rows, blocks, outputs) with a last column of ones."""
        return functional.pad(outputs, (0, 1), value=1.0)


class Blocks(nn.Module):
    """``blocks`` perceptrons side by side; the output is their mean, under masks the mean of those kept.

    Each block is ``[Linear -> LayerNorm -> activation] * len(hidden) -> Linear`` with parameters of its
    own, so that two blocks share nothing. Attach with the preset ``"blocks"``. All blocks together take
    one batched matrix product a layer.

    Args:
        features: width of the input.
        hidden: widths of the hidden layers of a block.
        outputs: width of the output.
        blocks: number of blocks, the mask units.
        activation: elementwise function after each hidden layer.
        norm: whether each hidden layer has a LayerNorm (without it: ``Linear -> activation``).

    Shapes: input float (rows, features), output (rows, outputs). A row whose mask keeps no block is NaN.

    Raises:
        InputError: a width or number below 1.

    Source: PIToD, Hiraoka et al. 2024 (arXiv 2405.14629), section 4, which masks blocks of the networks
    of reinforcement learning.

    Example:
        >>> model = Blocks(4, [16, 16], 2, blocks=8)
        >>> network = turnover.attach(model, "blocks", turnover.MaskSpec(keep=0.8, seed=0))
        >>> with network.hidden([3]):
        ...     without = model(torch.randn(1, 4))
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        blocks: int = 32,
        activation: Activation = functional.relu,
        norm: bool = True,
    ) -> None:
        super().__init__()
        widths = [features, *hidden, outputs]
        for name, value in (("blocks", blocks), *(("a width", width) for width in widths)):
            check_whole(f"Blocks: {name}", value, 1)
        self.blocks = blocks
        self.activation = activation
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        self.gains = nn.ParameterList()
        self.shifts = nn.ParameterList()
        for before, after in pairwise(widths):
            self.weights.append(torch.empty(blocks, before, after))
            self.biases.append(torch.empty(blocks, 1, after))
        for width in hidden if norm else ():
            self.gains.append(torch.empty(blocks, 1, width))
            self.shifts.append(torch.empty(blocks, 1, width))
        self.each_output = BlockOutputs(blocks)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights, those of ``nn.Linear``.

        Args:
            generator: generator of the weights; ``None``: torch's global one.
        """
        for weight, bias in zip(self.weights, self.biases, strict=True):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound, generator=generator)
            nn.init.uniform_(bias, -bound, bound, generator=generator)
        for gain, shift in zip(self.gains, self.shifts, strict=True):
            nn.init.ones_(gain)
            nn.init.zeros_(shift)

    def forward(self, inputs: Tensor) -> Tensor:
        """The mean over the blocks that the mask of each row keeps: (rows, outputs)."""
        kept: Tensor = self.each_output(self.each(inputs)).sum(dim=1)
        return kept[:, :-1] / kept[:, -1:]

    def each(self, inputs: Tensor) -> Tensor:
        """Every block's output for every row: (rows, blocks, outputs), whatever the masks."""
        return self._run(inputs.expand(self.blocks, *inputs.shape)).transpose(0, 1)

    def apart(self, inputs: Tensor) -> Tensor:
        """Each row's output by one block: (rows, outputs), for as many rows of each block.

        Row i runs through block ``i // (rows / blocks)`` alone. A target that such rows of a target
        network bootstrap is the block's own, so that what a block never learned reaches it by no target.

        Args:
            inputs: float (rows, features), the rows of the first block first.

        Raises:
            InputError: the rows cannot be divided by the blocks.
        """
        if len(inputs) % self.blocks:
            raise InputError(
                f"Blocks.apart takes as many rows for each of the {self.blocks} blocks, got "
                f"{len(inputs)} rows"
            )
        by_block = inputs.reshape(self.blocks, -1, inputs.shape[-1])
        return self._run(by_block).flatten(0, 1)

    def _run(self, values: Tensor) -> Tensor:
        """Block k's outputs of values[k]: (blocks, rows, features) to (blocks, rows, outputs)."""
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            values = torch.baddbmm(bias, values, weight)
            if layer == last:
                break
            if len(self.gains):
                values = functional.layer_norm(values, values.shape[-1:])
                values = torch.addcmul(self.shifts[layer], values, self.gains[layer])
            values = self.activation(values)
        return values
