"""VGG networks (Simonyan, Zisserman 2015) with torchvision's layer names, so that its weights load.

Built here because torchvision is optional; torchvision's own models attach in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from turnover.errors import InputError, check_whole

SITES = ("channels", "mlp")
"""Channels after every convolution and units of the fully connected layers, as :func:`turnover.attach`
takes them."""

_POOL = 0
_DEPTHS = {
    11: (1, _POOL, 2, _POOL, 4, 4, _POOL, 8, 8, _POOL, 8, 8, _POOL),
    13: (1, 1, _POOL, 2, 2, _POOL, 4, 4, _POOL, 8, 8, _POOL, 8, 8, _POOL),
    16: (1, 1, _POOL, 2, 2, _POOL, 4, 4, 4, _POOL, 8, 8, 8, _POOL, 8, 8, 8, _POOL),
    19: (1, 1, _POOL, 2, 2, _POOL, 4, 4, 4, 4, _POOL, 8, 8, 8, 8, _POOL, 8, 8, 8, 8, _POOL),
}
"""Output channels of the convolutions, in multiples of the width, and pools."""
_HALVED = 32
"""Factor by which the five pools shrink an image."""


class VGG(nn.Module):
    """``features`` (convolutions, ReLUs, pools), ``avgpool`` and ``classifier``, as torchvision names them.

    Every convolution's weights and bias belong to one output channel and every linear layer's to one
    unit, so under masks on all of them exposed and hidden share nothing but a bias in the last layer, and
    with ``batch_norm`` its statistics, which hold every row of a batch.

    Args:
        depth: 11, 13, 16 or 19 layers with weights.
        classes: number of outputs.
        size: height and width of the images, a multiple of 32: 224 for torchvision's weights, 32 for
            CIFAR.
        width: channels of the first convolution; 64 for torchvision's weights.
        hidden: units of the two fully connected hidden layers; 4096 for torchvision's weights.
        batch_norm: normalize after every convolution (torchvision's ``vgg11_bn`` and so on).
        bias: whether the last layer has a bias, which leaks; True for torchvision's weights.
        dropout: ordinary dropout after the hidden layers, which turn-over dropout replaces.

    Shapes: input float (rows, 3, size, size), output (rows, classes).

    Raises:
        InputError: another depth, or an impossible size or width.
    """

    def __init__(
        self,
        depth: int,
        classes: int,
        *,
        size: int = 224,
        width: int = 64,
        hidden: int = 4096,
        batch_norm: bool = False,
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if depth not in _DEPTHS:
            raise InputError(
                f"VGG: depth must be one of {', '.join(map(str, _DEPTHS))}, got {depth}"
            )
        for name, value in (("classes", classes), ("width", width), ("hidden", hidden)):
            check_whole(f"VGG: {name}", value, 1)
        if size < _HALVED or size % _HALVED:
            raise InputError(f"VGG: size must be a multiple of {_HALVED}, got {size}")
        if not 0 <= dropout < 1:
            raise InputError(f"VGG: dropout must lie in [0, 1), got {dropout}")
        layers: list[nn.Module] = []
        before = 3
        for multiple in _DEPTHS[depth]:
            if multiple == _POOL:
                layers.append(nn.MaxPool2d(2, 2))
                continue
            after = multiple * width
            layers.append(nn.Conv2d(before, after, 3, padding=1))
            layers += [nn.BatchNorm2d(after)] if batch_norm else []
            layers.append(nn.ReLU())
            before = after
        self.features = nn.Sequential(*layers)
        side = size // _HALVED
        self.avgpool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(
            nn.Linear(before * side * side, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes, bias=bias),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
            elif isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (rows, classes) of images (rows, 3, size, size)."""
        pooled = self.avgpool(self.features(images))
        logits: Tensor = self.classifier(torch.flatten(pooled, 1))
        return logits
