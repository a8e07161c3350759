"""By landmarks, where the gradients of labels that the network draws hold it, and not its own.

With ``g`` an instance's own gradient, ``H`` those of the ``k`` drawn labels of all instances and
``F = HH' / k``, scores are ``g_target' (F + lambda)^-1 g``, by Woodbury through inner products. In the
coordinates of landmarks ``H'H = B'B + R``, with ``R`` in blocks of single instances. Let
``W = (R + k lambda)^-1`` and ``A = I + B W B'``; of an instance, let ``b`` be the coordinates of ``g``,
``rho`` the remainders of its inner products with the instance's own drawn gradients, and
``c = b - B W rho``. Then scores are ``b_target' A^-1 c / lambda``.

What the coordinates miss of a target's inner products, ``d`` with ``g`` and ``e`` with all ``H``, adds
``(d - e W rho) / lambda`` and makes of ``b_target`` ``b_target - B W e'``. So ``[1, -W rho] / lambda`` takes
the place of ``V w`` of :mod:`.landmarks` in scores, and ``W`` that of ``V`` in ``A``. On itself an instance
has ``(c' A^-1 c + r - rho' W rho) / lambda``, with ``r`` the remainder of its own gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turnover.influence.gram.balanced import Spread
from turnover.influence.gram.coordinates import Coordinates, inverted
from turnover.influence.gram.landmarks import Landmarked


class SampledCoordinates(Coordinates):
    """As :class:`.coordinates.Coordinates`, where each instance also has the gradients of drawn labels."""

    holding = slice(1, None)

    def _inverse(self, rest: Tensor) -> Tensor:
        draws, ridge = self.directions - 1, self.ridge
        found = torch.zeros_like(rest)
        found[:, 1:, 1:] = inverted(rest[:, 1:, 1:], draws * ridge)
        found[:, 0, 0] = 1 / ridge
        found[:, 1:, :1] = -found[:, 1:, 1:] @ rest[:, 1:, :1] / ridge
        return found


class SampledLandmarked(Landmarked):
    """As :class:`.landmarks.Landmarked`, where each instance has its own gradient and those of drawn labels.

    ``inverse`` of what is kept has ``[1, -W rho] / lambda`` in its first column, and ``W`` beside it.
    """

    def weights_of_half(self, positions: slice | Tensor) -> Tensor:
        """See :class:`Landmarked`: the Fisher matrix of a half, twice, is on the scale of the whole."""
        return self.of(positions).weights

    def own(self) -> Tensor:
        """See :class:`Landmarked`."""
        scores = torch.empty_like(self.factor)
        for chunk in self.chunks():
            combined, rest = self._on_itself(chunk)
            solved = self.solved(None, combined)
            scores[chunk] = ((combined * solved).sum(dim=1) / self.coordinates.ridge + rest).cpu()
        return (scores * self.factor).to(self.device)

    def own_variance(self) -> Tensor:
        """See :class:`Landmarked`."""
        spread = Spread((len(self.factor),), self.freedom + 1, self.factor.device)
        for chunk in self.chunks():
            combined, _ = self._on_itself(chunk)
            whole = (combined * self.solved(None, combined)).sum(dim=1)
            for row in self.halves_of(self.of(chunk).group):
                for half in row.unique().tolist():
                    some = (row == half).nonzero()[:, 0]
                    part = combined[some]
                    values = (part * self.solved(half, part)).sum(dim=1)
                    spread.add(chunk.start + some, (values - whole[some]) / self.coordinates.ridge)
        return (spread.variance() * self.factor.square()).to(self.device)

    def _on_itself(self, chunk: slice) -> tuple[Tensor, Tensor]:
        """``c`` (instances, width), and ``(r - rho' W rho) / lambda`` (instances,)."""
        kept, vectors = self.of(chunk), self.vectors(chunk)
        by = kept.inverse[:, :, 0]
        combined = torch.einsum("ndw,nd->nw", vectors, by) * self.coordinates.ridge
        rest = kept.own[:, 0] - torch.einsum("nw,ndw->nd", vectors[:, 0], vectors)
        return combined, (rest * by).sum(dim=1).clamp_min(0)
