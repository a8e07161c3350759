"""The training set as one network sees it, through inner products with some of its instances.

With ``B`` the inner products of all gradients with those of the landmarks, in coordinates in which the
landmarks' own are the identity (Nystroem), the Gram matrix is ``B'B`` and a remainder. Of the remainder the
blocks of single instances are kept (``R``; as in FITC, Snelson and Ghahramani, NIPS 2006). With ``V = (R +
lambda)^-1`` and ``A = I + sum of B V B'``, scores are ``b' A^-1 B V`` of targets ``b``, by solves in as many
dimensions as landmarks have gradients. What the coordinates of target and instance miss of their inner
product, ``d = k - b'B``, adds ``d V``; and where it is known for all instances, ``b`` becomes
``b - sum of d V B``.

The landmarks themselves have no remainder. Scored beside others by ``b' A^-1 B V``, without ``d``, they would
seem the more influential: in ``V`` they are then given the mean of the others' remainders. What an instance
does to itself takes its own.

Standard errors come from halves, as in :mod:`turnover.influence.gram.uncertainty`. The halves are sums of
random groups of instances, balanced by a Hadamard matrix (McCarthy 1969), so that one pass serves all.

``A`` is summed up from the vectors that are kept, in slices that depend on their number alone: its bits do
not depend on how the gradients came in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch
from torch import Tensor

from turnover.influence.gram.balanced import Spread, groups_of, hadamard
from turnover.influence.gram.coordinates import Coordinates, Taken, inverted
from turnover.influence.gram.features import Features


@dataclass(frozen=True)
class Instances:
    """What is kept of every training instance besides its vectors.

    Attributes:
        own: inner products of its gradients with one another, float32 (train, directions, directions).
        inverse: ``V``, likewise.
        weights: of the directions, float32 (train, directions).
        residuals: 1 minus the probability of the label, float32 (train,).
        group: int64 (train,).
    """

    own: Tensor
    inverse: Tensor
    weights: Tensor
    residuals: Tensor
    group: Tensor


class Landmarked:
    """Training instances by one network, in the coordinates of landmarks.

    Args:
        coordinates: of gradients.
        instances: number of training instances.
        residual: exponent of 1 minus the probability of the label, which multiplies the scores.
        own_residual: whether scores of instances on themselves are multiplied by it once more.
        resamples: number of halves.
        memory: bytes of vectors that stay in memory.
        alike: positions of the landmarks that are scored with remainders like the others', int64
            (landmarks,).

    Attributes:
        coordinates: of gradients.
        features: vectors of all instances.
        kept: what is kept of them besides.
        factor: multiplies scores, float32 (train,).
        directions: gradients of each instance.
        device: of the gradients.
        groups: number of groups that halves are made of.
        freedom: degrees of freedom of a variance over halves.
    """

    def __init__(
        self,
        coordinates: Coordinates,
        instances: int,
        *,
        residual: float,
        own_residual: bool,
        resamples: int,
        memory: int,
        alike: Tensor | None = None,
    ) -> None:
        self.coordinates, self.device = coordinates, coordinates.device
        directions = self.directions = coordinates.directions
        self.features = Features(instances, directions, coordinates.width, memory)
        pairs = torch.zeros((instances, directions, directions))
        self.kept = Instances(
            pairs,
            pairs.clone(),
            torch.zeros((instances, directions)),
            torch.zeros(instances),
            groups_of(instances, resamples // 2),
        )
        self.groups = int(self.kept.group.max()) + 1
        self._exponents = residual, own_residual
        self._leverage: Tensor | None = None
        self._alike = torch.zeros(instances, dtype=torch.bool)
        if alike is not None:
            self._alike[alike] = True
        self._mean: Tensor | None = None
        """``V`` of the mean remainder of the others."""
        self._solvers: list[Tensor] = []
        self.freedom = resamples // 2 - 1

    def put(self, taken: Taken, positions: Tensor) -> None:
        """Keep what is taken in of some training instances at their positions."""
        self.features.put_at(positions, taken.vectors)
        kept, places = self.kept, positions.cpu()
        kept.own[places] = taken.own
        kept.inverse[places] = taken.inverse
        kept.weights[places] = 1.0 if taken.weights is None else taken.weights
        if taken.residuals is not None:
            kept.residuals[places] = taken.residuals

    def weights_of_half(self, positions: slice | Tensor) -> Tensor:
        """Weights that put scores of a half on the scale of the whole: float32 (some, directions)."""
        weights = self.of(positions).weights
        scaled: Tensor = weights + torch.einsum("nde,ne->nd", self.leverage_of(positions), weights)
        return scaled

    def _sums(self, done: Callable[[int], None]) -> Tensor:
        """``B V B'`` of each group: float64 (groups, width, width)."""
        width = self.coordinates.width
        sums = torch.zeros((self.groups, width, width), dtype=torch.float64, device=self.device)
        for chunk in self.chunks():
            kept, vectors = self.beside_others(chunk), self.vectors(chunk)
            for number in range(self.groups):
                some = (kept.group == number).nonzero()[:, 0]
                part = vectors[some][:, self.holding]
                held = kept.inverse[some][:, self.holding, self.holding] @ part
                sums[number] += part.flatten(0, 1).T @ held.flatten(0, 1)
            done(chunk.stop - chunk.start)
        return sums

    def solve(self, done: Callable[[int], None]) -> None:
        """Factor ``A`` of the whole, then of each half and its complement, once all instances came in.

        Args:
            done: called with the number of further instances that are added up.
        """
        self._mean = self._of_others()
        by_group = self._sums(done)
        total = by_group.sum(dim=0)
        signs = hadamard(self.groups)[1 : self.freedom + 2]
        sums = [total]
        for one in signs.to(by_group):
            difference = torch.tensordot(one, by_group, dims=1)
            sums += [total + difference, total - difference]
        del by_group  # matrices of width x width are what takes most memory
        for number, one in enumerate(sums):
            one.diagonal().add_(1.0)
            sums[number] = torch.linalg.cholesky(one)
        self._solvers = sums

    @property
    def holding(self) -> slice:
        """The gradients of an instance that hold the network."""
        return self.coordinates.holding

    @cached_property
    def factor(self) -> Tensor:
        """See the class."""
        exponent, _ = self._exponents
        residuals = self.kept.residuals
        factor: Tensor = residuals**exponent if exponent else torch.ones_like(residuals)
        return factor

    @cached_property
    def _own_factor(self) -> Tensor:
        residuals = self.kept.residuals
        factor: Tensor = residuals if self._exponents[1] else torch.ones_like(residuals)
        return factor

    def chunks(self) -> Iterator[slice]:
        """Slices of instances, for one pass."""
        return self.features.chunks()

    def vectors(self, positions: slice | Tensor) -> Tensor:
        """Coordinates of training instances: float32 (instances, directions, width)."""
        if isinstance(positions, slice):
            return self.features.read(positions.start, positions.stop).to(self.device)
        return self.features.take(positions).to(self.device)

    def of(self, positions: slice | Tensor) -> Instances:
        """What is kept of training instances, on the device."""
        kept = {field.name: getattr(self.kept, field.name) for field in fields(Instances)}
        return Instances(**{name: one[positions].to(self.device) for name, one in kept.items()})

    def beside_others(self, positions: slice | Tensor) -> Instances:
        """:meth:`of`, for scores of pairs."""
        kept = self.of(positions)
        if self._mean is None:
            return kept
        alike = self._alike[positions].to(self.device)
        return replace(kept, inverse=torch.where(alike[:, None, None], self._mean, kept.inverse))

    def _of_others(self) -> Tensor | None:
        if not bool(self._alike.any()) or bool(self._alike.all()):
            return None
        total = torch.zeros((self.directions, self.directions), dtype=torch.float64)
        for chunk in self.chunks():
            others = self.kept.inverse[chunk][~self._alike[chunk]]
            total += torch.linalg.inv(others.double()).sum(dim=0)
        ridge = self.coordinates.ridge * torch.eye(self.directions, dtype=torch.float64)
        mean = total / int((~self._alike).sum()) - ridge
        return inverted(mean, self.coordinates.ridge).float().to(self.device)

    def solved(self, half: int | None, values: Tensor) -> Tensor:
        """``A^-1`` of the whole, or of a half, times values (some, width): float32."""
        factor = self._solvers[0 if half is None else half + 1]
        found: Tensor = torch.cholesky_solve(values.T.to(factor.dtype), factor).T.float()
        return found

    def halves_of(self, group: Tensor) -> Tensor:
        """The half that instances of each group are in, for each pair of halves: int64 (pairs, instances)."""
        inside = hadamard(self.groups)[1 : self.freedom + 2].to(group.device)[:, group] < 0
        pairs = torch.arange(len(inside), device=group.device)[:, None]
        return 2 * pairs + inside

    def leverage_of(self, positions: slice | Tensor) -> Tensor:
        """Blocks on the diagonal of ``K (K + lambda I)^-1``: float32 (instances, directions, directions)."""
        if self._leverage is None:
            found = torch.empty_like(self.kept.own)
            for chunk in self.chunks():
                found[chunk] = self._leverage_by(self.vectors(chunk), self.of(chunk)).cpu()
            self._leverage = found
        blocks: Tensor = self._leverage[positions].to(self.device)
        return blocks

    def _leverage_by(self, vectors: Tensor, kept: Instances, half: int | None = None) -> Tensor:
        factor = self._solvers[0 if half is None else half + 1]
        flat = vectors.flatten(0, 1).T.to(factor.dtype)
        root = torch.linalg.solve_triangular(factor, flat, upper=False).float()
        root = root.T.reshape(vectors.shape)
        identity = torch.eye(self.directions, device=self.device)
        inverse, rest = kept.inverse, kept.own - vectors @ vectors.mT
        by_landmarks = root @ root.mT @ inverse * (1 if half is None else 2)
        if half is not None:  # (R + lambda / 2)^-1
            inverse = torch.linalg.solve(identity - self.coordinates.ridge / 2 * inverse, inverse)
        leverage: Tensor = by_landmarks + rest @ inverse @ (identity - by_landmarks)
        return leverage

    def own(self) -> Tensor:
        """Scores of every training instance on itself: float32 (train,)."""
        everything = slice(0, len(self.factor))
        weights, leverage = self.kept.weights, self.leverage_of(everything).cpu()
        scores = torch.einsum("nd,nde,ne->n", weights, leverage, weights)
        return (scores * self.factor * self._own_factor).to(self.device)

    def own_variance(self) -> Tensor:
        """Variances of :meth:`own` over halves of the training set."""
        spread = Spread((len(self.factor),), self.freedom + 1, self.factor.device)
        for chunk in self.chunks():
            kept, vectors = self.of(chunk), self.vectors(chunk)
            whole = self.leverage_of(chunk)
            whole = torch.einsum("nd,nde,ne->n", kept.weights, whole, kept.weights)
            for row in self.halves_of(kept.group):
                for half in row.unique().tolist():
                    some = (row == half).nonzero()[:, 0]
                    part = Instances(*(getattr(kept, one.name)[some] for one in fields(Instances)))
                    leverage = self._leverage_by(vectors[some], part, half)
                    twice = 2 * torch.eye(self.directions, device=self.device)
                    weights = torch.linalg.solve(twice - leverage, part.weights[:, :, None])
                    values = part.weights[:, None, :] @ leverage @ weights
                    spread.add(chunk.start + some, values[:, 0, 0] - whole[some])
        variance = spread.variance() * (self.factor * self._own_factor).square()
        return variance.to(self.device)
