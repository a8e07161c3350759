"""Seconds of the pieces of gram's work, from trials of a few rows and of small systems."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from turnover.batches import Batch
from turnover.influence.gram.capture import Capture, Rows
from turnover.influence.gram.coordinates import Basis
from turnover.influence.gram.disk import Blocks, Scratch
from turnover.influence.gram.features import Rounded
from turnover.influence.gram.kernel import Block, block_of, cross_of, is_full
from turnover.influence.gram.landmark_scores import Scored
from turnover.influence.gram.landmark_targets import Targets
from turnover.influence.gram.landmarks import Landmarked
from turnover.influence.gram.masks import MaskCapture
from turnover.influence.gram.solve import Cholesky
from turnover.influence.gram.whitening import Whitening

_ROWS = 8
"""Rows that are tried first."""
_SECONDS = 2.0
"""Time that the gradients of training rows are tried for, about."""
_ENOUGH = 0.2
"""Seconds from which on a timing is trusted."""
_PRODUCTS = 0.5
"""Likewise of inner products, of which those of few gradients take longer."""
BLOCK = 1024
"""Gradients of a block."""
_FACTORED, _LARGEST = 2048, 1024
"""Rows of the systems that are factored, and of others, that are tried."""
_NUMBERS = 2**22
"""Of the vectors of instances that are tried."""
_FEW, _MANY = 4, 64
"""Targets that are tried together."""


class GradientTrial:
    """Gradients of a few training rows and targets by one network, and their inner products.

    Args:
        capture: gives the gradients.
        sample: batches of training instances, with ids; as many are tried as take about two seconds.
        targets: a batch of targets; ``None``: rows of the sample stand for targets.
        damping: of the whitening; ``None``: gradients stay as they are.

    Attributes:
        gradients: of a training instance.
        nbytes: of one of them.
        target_bytes: of a target's gradient.
        row: seconds of a training instance's gradients.
        target: seconds of a target's gradient.
        pair: seconds of the inner product of two gradients.
        made: seconds in which a gradient is prepared for products with a block of others.
        moments: seconds of what whitening learns of a training instance.
        maps: seconds of the maps that whiten.
        whitened: seconds of a gradient that is whitened.
        device: of the gradients.
    """

    def __init__(
        self,
        capture: Capture | MaskCapture,
        sample: Iterable[Batch],
        targets: Batch | None,
        damping: float | None,
    ) -> None:
        found: list[Rows] = []
        plain: list[Rows] = []
        seconds, tried = 0.0, 0
        for batch in sample:
            if found:
                start = time.perf_counter()
                rows = capture.rows(batch, training=True)
                took = now(rows.costs.device) - start
            else:
                targets = batch if targets is None else targets
                capture.rows(batch.rows(0, min(_ROWS, len(batch))), training=True)  # also checks
                rows, took = _tried(batch, capture, training=True)
            start = time.perf_counter()
            found.append(rows)
            plain.append(rows.cheapest())
            seconds += took + now(rows.costs.device) - start
            tried += len(rows.costs)
            if seconds > _SECONDS or is_full(found):
                break
        assert targets is not None
        self.row = seconds / tried
        self.gradients = found[0].gradients // len(found[0].costs)
        self.moments = self.maps = self.whitened = 0.0
        whitening = None if damping is None else Whitening(damping)
        if whitening is not None:
            start = time.perf_counter()
            whitening.add(found)
            self.moments = (time.perf_counter() - start) / tried
        block = block_of(plain)
        self.device, self.nbytes = block.device, block.nbytes // block.rows
        if whitening is not None:
            blocks = Blocks(2**62, Scratch())
            blocks.append(block)
            start = time.perf_counter()
            whitening.finish(blocks)
            finished = now(self.device) - start
            self.whitened = self.timed(partial(whitening.whitened, block)) / block.rows
            self.maps = max(0.0, finished - self.whitened * block.rows)
        rows, took = _tried(targets, capture, training=False)
        start = time.perf_counter()
        rows = rows.cheapest()
        self.target = (took + now(self.device) - start) / len(rows.costs)
        self.target_bytes = block_of([rows]).nbytes // rows.gradients
        self.made, self.pair = 0.0, 0.0
        former = 0.0
        while True:
            self.block = block if whitening is None else whitening.whitened(block)
            seconds = self.timed(partial(cross_of, self.block, [self.block], block.rows))
            self._learn(former, seconds)
            if seconds > _PRODUCTS or is_full(plain):
                break
            former, plain = seconds, [*plain, *plain]
            block = block_of(plain)

    def products(self, left: float, right: float) -> float:
        """Seconds of the inner products of gradients that come in blocks, with others."""
        blocks = math.ceil(left / max(1, min(BLOCK, 2**28 // self.nbytes)))
        return self.pair * left * right + self.made * (left + right * blocks)

    def _learn(self, half: float, seconds: float) -> None:
        """Seconds by rows and by pairs, from products of the block and, before, of half of it."""
        rows = self.block.rows
        self.pair = min(max(0.0, 2 * (seconds - 2 * half)), seconds) / rows**2
        self.made = (seconds - self.pair * rows**2) / (2 * rows)

    def timed(self, function: Callable[[], object]) -> float:
        """Seconds of a call: of the second one, unless the first took long."""
        times: list[float] = []
        while len(times) < 2 and sum(times) < 5 * _ENOUGH:
            start = now(self.device)
            function()
            times.append(now(self.device) - start)
        return min(times)


@dataclass(frozen=True)
class SystemTrial:
    """Seconds of dense systems by the rows ``s`` that they have.

    Attributes:
        factor: of a Cholesky factor, times s^3.
        inverse: of the leverage, times s^3.
        solve: of a target, times s^2.
        eigen: of eigenvectors, times s^3.
        multiply: of a multiplication and an addition, float32.
    """

    factor: float
    inverse: float
    solve: float
    eigen: float
    multiply: float


def systems(trial: GradientTrial, size: int, *, condition: float) -> SystemTrial:
    """Try systems of some rows, 2,048 at most.

    Args:
        trial: says on which device.
        size: rows of the system that is meant.
        condition: of this; large ones are factored in float64.
    """
    rows, few = (max(2, min(size, most)) for most in (_FACTORED, _LARGEST))
    k = torch.eye(rows, device=trial.device)
    ridge = rows / condition
    made = Cholesky(k, ridge, block=1)
    cross = torch.ones((_MANY, rows), device=trial.device)
    factor = trial.timed(lambda: Cholesky(k, ridge, block=1))
    start = now(trial.device)
    made.leverage  # noqa: B018
    inverse = now(trial.device) - start
    solve = trial.timed(lambda: made.rows(cross))
    multiply = trial.timed(lambda: cross @ k)
    drawn = torch.randn((few, few), generator=torch.Generator().manual_seed(0)).double()
    symmetric = (drawn + drawn.T).to(trial.device)
    eigen = trial.timed(lambda: torch.linalg.eigh(symmetric))
    cube, square = rows**3, _MANY * rows**2
    return SystemTrial(
        factor / cube, inverse / cube, solve / square, eigen / few**3, multiply / square
    )


@dataclass(frozen=True)
class LandmarkTrial:
    """Seconds by landmarks, at a width ``w`` of the vectors.

    Attributes:
        add: of an instance, besides inner products with landmarks and their map.
        sums: of an instance in ``A``, times w^2.
        factor: of all factors of ``A``, times w^3.
        leverage: of an instance, times w^2.
        solve: of a target, times w^2.
        read: of an instance for a block of targets, times w.
        score: of an instance and a target, with its standard error, times w.
        rank: of an instance and a target that is ranked by the score alone, times w.
    """

    add: float
    sums: float
    factor: float
    leverage: float
    solve: float
    read: float
    score: float
    rank: float


def by_landmarks(
    trial: GradientTrial,
    make: Callable[[list[Block], Basis, int], Landmarked],
    *,
    width: int,
    instances: int,
    networks: int,
    multiply: float,
) -> LandmarkTrial:
    """Try what landmarks take, with random vectors.

    Args:
        trial: of the gradients.
        make: makes the training set of some instances, given landmarks and their basis.
        width: of the vectors that are meant.
        instances: number of training instances.
        networks: number of networks.
        multiply: seconds of a multiplication.
    """
    width, each = min(width, _LARGEST), trial.gradients
    count = min(instances, max(256, _NUMBERS // (each * width)))
    everything = torch.arange(count)
    generator = torch.Generator().manual_seed(0)
    block = trial.block
    rows = block.rows // each
    basis = Basis(torch.randn((block.rows, width), generator=generator), 1.0)
    adding = make([block], basis, rows)
    some = torch.arange(rows)
    coordinates = adding.coordinates
    seconds = trial.timed(lambda: adding.put(coordinates.take(block, None, None), some))
    known = trial.products(block.rows, block.rows) + block.rows**2 * width * multiply
    network = make([block], basis, count)
    vectors = Rounded.of(torch.randn((count, each, width), generator=generator))
    network.features.put_at(everything, vectors)
    network.kept.inverse[:] = torch.eye(each)
    network.kept.weights[:] = 1.0
    network.kept.residuals[:] = 0.5
    marks = [now(network.device)]
    network.solve(lambda _: marks.append(now(network.device)))
    factored = now(network.device) - marks[-1]
    start = now(network.device)
    network.leverage_of(everything)
    leverage = now(network.device) - start
    times = []
    for targets in (_FEW, _MANY):
        own = torch.randn((targets, width), generator=generator).to(network.device)
        made = [Targets(network, own) for _ in range(networks)]
        scored = Scored([network] * networks, made, torch.ones(count))
        start = now(network.device)
        pool = scored.pool(everything)
        pooled = now(network.device) - start
        scores = trial.timed(partial(scored.all, everything, pool))
        times.append((scores / count, max(0.0, pooled - scores) / targets))
        ranked = trial.timed(partial(scored.strongest, everything, min(_FEW, count))) / count
    (few, _), (many, solve) = times
    score = max(0.0, many - few) / (_MANY - _FEW)
    read = max(0.0, few - _FEW * score)
    return LandmarkTrial(
        add=max(0.0, seconds - known) / rows,
        sums=(marks[-1] - marks[0]) / count / width**2,
        factor=factored / width**3,
        leverage=leverage / count / width**2,
        solve=solve / width**2 / networks,
        read=read / width / networks,
        score=score / width / networks,
        rank=max(0.0, ranked - read) / _MANY / width / networks,
    )


def now(device: torch.device) -> float:
    """The time, in seconds, once a device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _tried(batch: Batch, capture: Capture | MaskCapture, *, training: bool) -> tuple[Rows, float]:
    """Gradients of as many rows of a batch as take long enough to be timed, and their seconds."""
    size = min(_ROWS, len(batch))
    while True:
        start = time.perf_counter()
        rows = capture.rows(batch.rows(0, size), training=training)
        seconds = now(rows.costs.device) - start
        if seconds > _ENOUGH or size == len(batch):
            return rows, seconds
        size = min(4 * size, len(batch))
