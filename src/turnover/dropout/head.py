"""The wide masked head: cheap mask units on top of any encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from turnover.errors import InputError, check_whole

_LEAST_SPREAD = 0.1
"""Smallest standard deviation of a feature, as a share of the root mean square over all features."""


class WideHead(nn.Module):
    """``Linear(features, units) -> GELU (the masked site) -> Linear(units, classes, bias=False)``.

    The signal-to-noise ratio of an influence score grows with the square root of mask units per training
    instance, and units are cheapest here. Every parameter belongs to one unit, and the last layer has no
    bias, so the exposed and the hidden sub-network share no parameter of the head.

    The first layer starts near zero: the contribution of its random weights to a prediction differs
    between any two masks, whatever the instance, so a larger ``gain`` adds noise to every score
    (docs/noise.md has the measurements).

    Args:
        features: width of the encoder's representation.
        units: number of mask units.
        classes: number of outputs.
        gain: standard deviation of the units' input at the start, for standardized features. ``None``:
            0.02, and above 8,192 units less, like 1 / sqrt(units), so that the start contributes the
            same share of the noise at any width (docs/planning.md).

    Shapes: input float (rows, features), output (rows, classes).

    Raises:
        InputError: a width below 1, or a gain that is not positive.
    """

    centre: Tensor
    scale: Tensor

    def __init__(
        self, features: int, units: int, classes: int, *, gain: float | None = None
    ) -> None:
        super().__init__()
        for name, value in (("features", features), ("units", units), ("classes", classes)):
            check_whole(f"WideHead: {name}", value, 1)
        if gain is None:
            gain = 0.02 * min(1.0, (8192 / units) ** 0.5)
        self.gain = gain
        if not gain > 0:
            raise InputError(f"WideHead: gain must be > 0, got {gain}; at 0 no unit could learn")
        self.register_buffer("centre", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.spread = nn.Linear(features, units)
        self.activation = nn.GELU()
        self.classify = nn.Linear(units, classes, bias=False)
        self._start(None)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new weights and reset the standardization (for a head made on the meta device).

        Args:
            generator: generator of the weights; ``None``: torch's global one.
        """
        nn.init.zeros_(self.centre)
        nn.init.ones_(self.scale)
        nn.init.kaiming_uniform_(self.classify.weight, a=5**0.5, generator=generator)
        self._start(generator)

    def _start(self, generator: torch.Generator | None) -> None:
        std = self.gain / self.spread.in_features**0.5
        nn.init.normal_(self.spread.weight, std=std, generator=generator)
        nn.init.zeros_(self.spread.bias)

    def standardize(self, features: Tensor) -> None:
        """Set the center and the scale of the input, once, before training.

        Features that all instances have in common hide their differences. The constants are buffers:
        training does not change them, and they contain no labels. A feature that hardly varies in the
        sample is scaled up at most ten times as much as the others, so that other values of it elsewhere
        do not dominate.

        Args:
            features: float (rows >= 2, features), a sample of the encoder's output.

        Raises:
            InputError: features of another shape.
        """
        if features.dim() != 2 or len(features) < 2 or features.shape[1] != len(self.centre):
            raise InputError(
                f"WideHead.standardize needs features (rows >= 2, {len(self.centre)}), got "
                f"{tuple(features.shape)}"
            )
        sample = features.detach().to(self.centre.dtype)
        self.centre.copy_(sample.mean(dim=0))
        spread = sample.std(dim=0)
        least = _LEAST_SPREAD * spread.square().mean().sqrt()
        self.scale.copy_(1 / spread.clamp_min(least).clamp_min(1e-6))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (rows, classes) of features (rows, features)."""
        standardized = (features - self.centre) * self.scale
        logits: Tensor = self.classify(self.activation(self.spread(standardized)))
        return logits
