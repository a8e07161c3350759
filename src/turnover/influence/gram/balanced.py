"""Halves of the training set that are balanced sums of groups, and variances over them (McCarthy 1969)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Spread:
    """Variance of values over halves, each of which is in half of them.

    Args:
        shape: of the values; the last axis is the instances.
        count: halves that an instance is in.
        device: of the sums.
    """

    def __init__(self, shape: tuple[int, ...], count: int, device: torch.device) -> None:
        self._sums, self._squares = (torch.zeros(shape, device=device) for _ in range(2))
        self._count, self._device = count, device

    def add(self, positions: Tensor, changes: Tensor) -> None:
        """Add deviations from the value of the whole, of some instances in one half."""
        # Deviations, and not values, so that squares do not cancel.
        places, moved = positions.to(self._device), changes.to(self._device)
        self._sums[..., places] += moved
        self._squares[..., places] += moved.square()

    def variance(self) -> Tensor:
        """Of all values."""
        deviation = self._squares - self._sums.square() / self._count
        return (deviation / (self._count - 1)).clamp_min(0)


def groups_of(instances: int, pairs: int) -> Tensor:
    """Random groups of instances, of one size within 1: int64 (instances,).

    Those of the first instances do not depend on how many follow.
    """
    count = len(hadamard(pairs + 1))
    drawn = np.random.Generator(np.random.Philox(key=0)).random((-(-instances // count), count))
    return torch.from_numpy(drawn.argsort(axis=1).ravel()[:instances])


def hadamard(least: int) -> Tensor:
    """A matrix of 1 and -1 whose rows are orthogonal, of at least so many: int64. The first row is 1."""
    found = torch.ones((1, 1), dtype=torch.int64)
    while len(found) < least:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found
