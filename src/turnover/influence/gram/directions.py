"""Directions in a classifier's outputs along which training instances hold a network.

To second order, training on an instance holds its logits with the strength ``W``, the covariance of its
softmax, ``diag(p) - p p'``. At the end of training ``W`` is far smaller than it would be without the
instance, and its square root is in between, as that of the residual is (docs/fidelity.md). Gradients along
all classes would be many, so the square root is taken in a subspace: the margin, and the directions of
largest curvature beside it. With two classes, one direction is the whole space.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_LEAST = 1e-6
"""Smallest strength: of a prediction without any doubt it would be 0."""


def directions(logits: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The margin's direction and those of the largest curvature beside it, scaled by their strength.

    Args:
        logits: float (rows, classes).
        labels: int64 (rows,).
        count: of directions, at most; never more than one less than classes.

    Returns:
        The directions ``V``, float32 (rows, classes, count); ``V V'`` is ``sqrt(W)`` in the subspace. Their
        weights, float32 (rows, count); ``V`` times these is the gradient of the margin by the logits.
    """
    logits = logits.detach().double()
    classes = logits.shape[1]
    count = min(count, classes - 1)
    chosen = functional.one_hot(labels, classes).double()
    # Minus the log-odds: a cost, as all objectives are.
    margin = logits.masked_fill(chosen.bool(), -torch.inf).softmax(dim=1) - chosen
    basis = functional.normalize(margin, dim=1)[:, :, None]
    p = logits.softmax(dim=1)
    curvature, vectors = torch.linalg.eigh(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    root = (vectors * curvature.clamp_min(0).sqrt()[:, None, :]) @ vectors.mT
    if count > 1:
        rest = torch.eye(classes, dtype=p.dtype, device=p.device) - basis @ basis.mT
        largest = torch.linalg.eigh(rest @ root @ rest)[1][:, :, 1 - count :]
        basis = torch.cat([basis, largest], dim=2)
    strength, turn = torch.linalg.eigh(basis.mT @ root @ basis)
    scale = strength.clamp_min(_LEAST).sqrt()
    turned = basis @ turn
    weights = (turned.mT @ margin[:, :, None])[:, :, 0] / scale
    return (turned * scale[:, None, :]).float(), weights.float()
