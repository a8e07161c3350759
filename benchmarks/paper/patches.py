"""Features of images that no label has touched: whitened random patches as convolutions.

Coates and Ng 2012. There is no pretrained image network to freeze here, and of one that is trained on the
images nothing would be hidden; these leave all that is trained to the head.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_SIZE = 6
_STRIDE = 2
_FILTERS = 400
_SAMPLES = 50_000
_COMPONENTS = 256
_ROWS = 100
_EVEN = 0.1  # added to the eigenvalues of patches of unit variance: what is not whitened further


def of(x: Tensor, fitted: int, cache: Path | None = None) -> Tensor:
    """Standardised features, float32 (rows, 256).

    Args:
        x: float32 (rows, 3, height, width).
        fitted: so many first rows give the patches, and the principal components of the features.
        cache: folder that keeps the features under a hash of the images.
    """
    path = None
    if cache is not None:
        digest = hashlib.sha256(x.contiguous().numpy().tobytes() + str(fitted).encode())
        path = cache / f"patches-{digest.hexdigest()[:16]}.npy"
        if path.exists():
            return torch.from_numpy(np.load(path, allow_pickle=False))
    generator = torch.Generator().manual_seed(0)
    filters, mean, whiten = _filters(x[:fitted], generator)
    pooled = torch.cat([_pooled(part, filters, mean, whiten) for part in torch.split(x, _ROWS)])
    pooled = (pooled - pooled[:fitted].mean(dim=0)) / pooled[:fitted].std(dim=0)
    _, vectors = torch.linalg.eigh(pooled[:fitted].T @ pooled[:fitted])
    found: Tensor = pooled @ vectors[:, -_COMPONENTS:]
    found /= found[:fitted].std()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, found.numpy(), allow_pickle=False)
    return found


def _normalised(patches: Tensor) -> Tensor:
    """Patches (..., pixels) without their own brightness and contrast."""
    centred = patches - patches.mean(dim=-1, keepdim=True)
    return centred / (centred.var(dim=-1, keepdim=True) + 0.01).sqrt()


def _filters(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Whitened patches of length 1 (filters, pixels), the patches' mean, and what whitens them."""
    side = x.shape[2] - _SIZE + 1
    row = torch.randint(len(x), (_SAMPLES,), generator=generator)
    top, left = (torch.randint(side, (_SAMPLES,), generator=generator) for _ in range(2))
    span = torch.arange(_SIZE)
    patches = x[
        row[:, None, None, None],
        torch.arange(x.shape[1])[:, None, None],
        (top[:, None] + span)[:, None, :, None],
        (left[:, None] + span)[:, None, None, :],
    ]
    patches = _normalised(patches.flatten(1))
    mean = patches.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    whiten = vectors @ torch.diag((values + _EVEN) ** -0.5) @ vectors.T
    return functional.normalize((patches[:_FILTERS] - mean) @ whiten, dim=1), mean, whiten


def _pooled(x: Tensor, filters: Tensor, mean: Tensor, whiten: Tensor) -> Tensor:
    """Responses beyond a threshold in the quarters of the images: (rows, 2 x filters x 4)."""
    patches = _normalised(
        functional.unfold(x, _SIZE, stride=_STRIDE).transpose(1, 2)
    )  # (rows, places, pixels)
    side = (x.shape[2] - _SIZE) // _STRIDE + 1
    responses = ((patches - mean) @ (whiten @ filters.T)).transpose(1, 2)
    both = torch.cat([(responses - 1).relu(), (-responses - 1).relu()], dim=1)
    places = both.view(len(x), -1, side, side)
    return functional.adaptive_avg_pool2d(places, 2).flatten(1)
