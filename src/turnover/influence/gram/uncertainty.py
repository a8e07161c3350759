"""Standard errors of gram scores: over networks, or over halves of the training set.

**Halves.** Write a score as ``s = b / (1 + a)``, where ``b = phi_t' (P + lambda)^-1 phi_z`` and ``a``
is the same with ``phi_z`` for ``phi_t``, both over the instances other than z (P is the sum of
``phi phi'`` over them); the leverage of z is ``h = a / (1 + a)``. With lambda in proportion to the
number of instances, ``b`` and ``a`` from a half are twice those from the whole in expectation, since
``P + lambda`` is the number times a mean. So a half is scored with lambda / 2, and its ``s`` and ``h``
are put on the scale of the whole by ``(b / 2) / (1 + a / 2) = s / (2 - h)``. Drawing n / 2 of n without
replacement leaves (n / (n / 2)) (1 - 1 / 2) = 1 times the variance of a mean of n: the variance over
halves is that of the whole, without a further factor (the delete-d jackknife of Shao and Wu, Annals
of Statistics 17, 1989, at d = n / 2). An instance is scored in the halves that it is in; halves come
with their complements, so it is in half of them.

**Moderation.** A variance of few values is poor. Each pair's variance is averaged with that of all pairs
of its target, weighted by degrees of freedom; those of the pooled variance follow from the spread of the
variances (Smyth, Statistical Applications in Genetics and Molecular Biology 3, 2004).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 60.0
"""Most degrees of freedom of a pooled variance, as no two pairs are quite alike."""


def halves(rows: int, count: int, *, seed: int = 0) -> list[Tensor]:
    """Random halves, each followed by its complement: sorted int64 positions, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(count // 2):
        order = torch.randperm(rows, generator=generator)
        cut = rows // 2
        drawn += [order[:cut].sort().values, order[cut:].sort().values]
    return drawn


def moderated(variance: Tensor, freedom: int, scale: Tensor) -> tuple[Tensor, float]:
    """Shrink variances toward the pooled one of their target.

    Args:
        variance: float32 (targets, train), of ``freedom`` degrees of freedom.
        freedom: of each variance.
        scale: positive float32 (train,), constants that multiply the values; without them, pairs are
            alike.

    Returns:
        The variances (targets, train), and their degrees of freedom.
    """
    return Pool(variance, freedom, scale).moderated(variance, scale)


class Pool:
    """The pooled variance of each target, and its degrees of freedom.

    Args:
        variance: float32 (targets, train), of ``freedom`` degrees of freedom; of some instances.
        freedom: of each variance.
        scale: as in :func:`moderated`, of these instances.
    """

    def __init__(self, variance: Tensor, freedom: int, scale: Tensor) -> None:
        plain = variance.double() / scale.double().square()
        self._mean = plain.mean(dim=1, keepdim=True)
        self._prior, self._freedom = _prior(plain, freedom), freedom

    def moderated(
        self, variance: Tensor, scale: Tensor, target: int | None = None
    ) -> tuple[Tensor, float]:
        """As :func:`moderated`, of any instances on the same targets, or on one of them."""
        plain, freedom = variance.double() / scale.double().square(), self._freedom
        mean = self._mean if target is None else self._mean[target]
        total = self._prior + freedom
        mixed = (self._prior * mean + freedom * plain) / total
        return (mixed * scale.double().square()).float(), total


def _prior(variance: Tensor, freedom: int) -> float:
    """Degrees of freedom of the pooled variance, from the spread of log variances."""
    positive = variance > 0
    if int(positive.sum()) < 3:
        return float(freedom)
    logs = variance.clamp_min(torch.finfo(variance.dtype).tiny).log()
    count = positive.sum(dim=1, keepdim=True).clamp_min(1)
    mean = (logs * positive).sum(dim=1, keepdim=True) / count
    spread = float((((logs - mean) ** 2) * positive).sum() / (positive.sum() - 1))
    excess = spread - _trigamma(freedom / 2)
    if excess <= _trigamma(_MOST / 2):
        return _MOST
    low, high = 1e-3, _MOST / 2
    for _ in range(60):  # trigamma falls
        middle = (low + high) / 2
        low, high = (middle, high) if _trigamma(middle) > excess else (low, middle)
    return float(low + high)


def _trigamma(value: float) -> float:
    return float(torch.special.polygamma(1, torch.tensor(value, dtype=torch.float64)))
