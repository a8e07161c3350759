"""Directions in a classifier's outputs along which a training instance holds the network. Pure functions.

To the second order, training on an instance keeps its logits where they are with the strength ``W``,
the covariance of its softmax, ``diag(p) - p p'``. At the end of training ``W`` is far smaller than it
would be had the instance been left out, and its square root lies in between, as the square root of
the residual does (docs/fidelity.md). Gradients along all classes would be many, so it is taken in a
subspace: of the margin, and of what the softmax curves most in beside it.

With two classes there is one direction, and nothing is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST = 1e-6
"""Of the square root of the curvature: a network that is sure of an instance is held by nothing."""


@dataclass(frozen=True)
class Directions:
    """Directions of the rows of a batch, scaled by how strongly they are held.

    Attributes:
        values: float32 (rows, classes, count), ``V``; ``V V'`` is ``sqrt(W)`` in the subspace.
        weights: float32 (rows, count); ``V`` times these is the gradient of the margin by the logits.
    """

    values: Tensor
    weights: Tensor


def directions(logits: Tensor, labels: Tensor, count: int) -> Directions:
    """The margin's direction and those of the largest curvature beside it.

    Args:
        logits: float (rows, classes).
        labels: int64 (rows,).
        count: at most so many, and never more than one less than classes.
    """
    logits = logits.detach().double()
    classes = logits.shape[1]
    count = min(count, classes - 1)
    chosen = torch.nn.functional.one_hot(labels, classes).double()
    # Minus the log-odds: a cost, as all objectives are.
    margin = logits.masked_fill(chosen.bool(), -torch.inf).softmax(dim=1) - chosen
    first = torch.nn.functional.normalize(margin, dim=1)[:, :, None]
    p = logits.softmax(dim=1)
    root = _root(torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    basis = first
    if count > 1:
        rest = torch.eye(classes, dtype=p.dtype, device=p.device) - first @ first.mT
        basis = torch.cat([first, _largest(rest @ root @ rest, count - 1)], dim=2)
    held, turn = torch.linalg.eigh(basis.mT @ root @ basis)
    scale = held.clamp_min(_LEAST).sqrt()
    turned = basis @ turn
    weights = (turned.mT @ margin[:, :, None])[:, :, 0] / scale
    return Directions((turned * scale[:, None, :]).float(), weights.float())


def _root(matrices: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrices)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.mT
    return root


def _largest(matrices: Tensor, count: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues: (rows, classes, count)."""
    vectors: Tensor = torch.linalg.eigh(matrices)[1]
    return vectors[:, :, -count:]
