"""The wide masked head: cheap mask units on top of any encoder."""

from __future__ import annotations

from torch import Tensor, nn

from turnover.errors import InputError


class WideHead(nn.Module):
    """``Linear(features, units) -> GELU (the masked site) -> Linear(units, classes, bias=False)``.

    Signal to noise of a single influence score grows like the square root of mask units over
    training instances, and units are nowhere cheaper than here. Every parameter belongs to one unit,
    and the last layer has no bias, so nothing in it is shared between exposed and hidden.

    Args:
        features: width of the encoder's representation.
        units: number of mask units.
        classes: number of outputs.
        gain: standard deviation of the first layer's weights; larger makes the units more selective,
            so that instances are told apart better.

    Shapes: input float (rows, features), output (rows, classes).

    Raises:
        InputError: a width below 1.
    """

    def __init__(self, features: int, units: int, classes: int, *, gain: float = 0.5) -> None:
        super().__init__()
        for name, value in (("features", features), ("units", units), ("classes", classes)):
            if value < 1:
                raise InputError(f"WideHead: {name} must be >= 1, got {value}")
        self.spread = nn.Linear(features, units)
        self.activation = nn.GELU()
        self.classify = nn.Linear(units, classes, bias=False)
        nn.init.normal_(self.spread.weight, std=gain)
        nn.init.zeros_(self.spread.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (rows, classes) of features (rows, features)."""
        logits: Tensor = self.classify(self.activation(self.spread(features)))
        return logits
