"""What gram takes by all pairs and by landmarks: counts of its work, times the seconds of a piece.

Peak memory leaves out the model, the data and the libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from turnover.influence.gram.balanced import hadamard
from turnover.influence.gram.coordinates import Basis, Coordinates
from turnover.influence.gram.disk import Limits
from turnover.influence.gram.features import chunk_of
from turnover.influence.gram.fitted import KEPT
from turnover.influence.gram.iterative import PROBES
from turnover.influence.gram.kernel import Block, Size, fills
from turnover.influence.gram.landmark_draws import SampledCoordinates, SampledLandmarked
from turnover.influence.gram.landmark_scores import CANDIDATES, MOST, SAMPLE
from turnover.influence.gram.landmarks import Landmarked
from turnover.influence.gram.options import Gram
from turnover.influence.gram.ridge import judged
from turnover.influence.gram.solve import is_exact
from turnover.influence.gram.trials import BLOCK, GradientTrial, SystemTrial, by_landmarks, systems
from turnover.influence.plan import FitCost

_STEPS = 12
"""Of conjugate gradients with the default ridge, where half of them is the time of copies of rows."""


@dataclass(frozen=True)
class Job:
    """What is to be fitted and scored.

    Attributes:
        options: of gram.
        limits: of memory.
        networks: number of networks, which are taken as alike.
        instances: number of training instances.
        targets: rows of each batch of targets.
        top: ids to keep on each side of each target; ``None``: all.
        read: seconds in which an instance is read.
        parameters: trained numbers of a network.
    """

    options: Gram
    limits: Limits
    networks: int
    instances: int
    targets: Sequence[int]
    top: int | None
    read: float
    parameters: int

    @property
    def count(self) -> int:
        """Number of targets."""
        return sum(self.targets)

    @property
    def halves(self) -> int:
        """Halves of the training set that standard errors are made of: none for several networks."""
        return self.options.resamples if self.networks == 1 else 0

    @property
    def condition(self) -> float:
        """Condition number that factors of all pairs are chosen for."""
        ridge = self.options.ridge
        return self.instances / (1.0 if isinstance(ridge, str) else ridge)

    @property
    def memory(self) -> int:
        """Bytes of gradients that a network may hold."""
        return self.limits.memory // self.networks

    @property
    def scores(self) -> int:
        """Bytes of scores and errors, and of those of the blocks that they are put together from."""
        kept = self.instances if self.top is None else min(2 * self.top, self.instances)
        return 2 * self.count * kept * (8 if self.top is None else 16)

    def blocks(self, nbytes: int, most: int | None = None) -> list[int]:
        """Targets that are scored together.

        Args:
            nbytes: of a target's gradient.
            most: targets.
        """
        found, pending = [], 0
        for size in filter(None, self.targets):
            step = min(size, most or size)
            for start in range(0, size, step):
                pending += min(step, size - start)
                full = fills([Size(pending, pending * nbytes)])
                if full or (most is not None and pending + step > most):
                    found.append(pending)
                    pending = 0
        return [*found, pending] if pending else found


def all_pairs(job: Job, trial: GradientTrial, *, chosen: bool = True) -> FitCost:
    """By the inner products of all pairs."""
    networks, each = job.networks, trial.gradients
    size = job.instances * each
    held = job.instances * (each - 1 if job.options.samples else each)
    system = systems(trial, held, condition=job.condition)
    pairs = size * (size + 1) // 2
    fit = job.instances * (trial.row + trial.moments) + trial.maps + size * trial.whitened
    fit += trial.products(size, size) / 2 + _rule(job, system, size)
    large = size > job.limits.rows
    solved = (_iterated if large else _factored)(job, system, held)
    target = trial.target + solved.target
    if job.options.samples:
        target += held * job.instances * system.multiply * (1 + job.halves / 4)
    blocks = len(job.blocks(trial.target_bytes))
    estimate = job.count * target + trial.products(job.count, size)
    estimate += (blocks - 1) * solved.block
    gradients = size * trial.nbytes
    matrix = 4 * size * size
    memory = min(gradients, job.memory) + (0 if large else matrix)
    memory = networks * (memory + solved.nbytes) + job.scores + _moving(trial)
    return _cost(
        job,
        "all pairs",
        chosen,
        (fit, solved.once, estimate),
        memory,
        networks * (max(0, gradients - job.memory) + (matrix if large else 0)),
        0,
        {
            "fit gradients": job.instances,
            "fit products": pairs,
            "estimate gradients": 0,
            "estimate products": job.count * size,
        },
    )


@dataclass(frozen=True)
class _Solved:
    """Seconds and bytes of solves with all pairs.

    Attributes:
        once: seconds before the first scores.
        target: of each target.
        block: of each further block of targets.
        nbytes: in memory, besides the matrix.
    """

    once: float
    target: float
    block: float
    nbytes: int


def _factored(job: Job, system: SystemTrial, rows: int) -> _Solved:
    """By Cholesky factors of the whole and of halves."""
    halves = job.halves
    leverage = 0.0 if job.options.samples else system.inverse
    half = halves * (system.factor + leverage) * (rows / 2) ** 3
    number = 8 if is_exact(job.condition) else 4
    factors = halves * number * (rows // 2) ** 2
    return _Solved(
        system.factor * rows**3 + half,
        system.solve * (rows**2 + halves * (rows / 2) ** 2),
        half if factors > KEPT else 0.0,
        3 * number * rows**2 + min(factors, KEPT),
    )


def _iterated(job: Job, system: SystemTrial, rows: int) -> _Solved:
    """By conjugate gradients; K is taken to be read from the cache of files."""
    halves, marks = job.halves, job.limits.landmarks

    def begun(size: float) -> float:
        return 3 * size * marks**2 * system.multiply + 2 * marks**3 * system.eigen

    def stepped(size: float) -> float:
        return _STEPS * (size**2 + 2 * size * marks) * system.multiply

    probes = 0 if job.options.samples else PROBES
    half = halves * (begun(rows / 2) + probes * stepped(rows / 2))
    target = stepped(rows) + halves * stepped(rows / 2)
    return _Solved(begun(rows) + half, target, half, 12 * rows * marks)


def landmarks(job: Job, trial: GradientTrial, count: int, way: dict[bool, bool]) -> list[FitCost]:
    """By landmarks, with and without the exact inner products of all instances.

    Args:
        job: what is computed.
        trial: of the gradients.
        count: landmarks.
        way: by ``exact``, whether the options take it.
    """
    networks, each, total = job.networks, trial.gradients, job.instances
    size, marks = total * each, count * each
    width = min(marks, job.parameters)
    system = systems(trial, marks, condition=1.0)
    tried = by_landmarks(
        trial,
        maker_of(job, each),
        width=width,
        instances=total,
        networks=networks,
        multiply=system.multiply,
    )
    fit = (total + count) * trial.row + count * trial.moments + trial.maps
    fit += (size + marks) * trial.whitened + trial.products(marks, marks) / 2
    fit += system.eigen * marks**3 + _rule(job, system, marks)
    fit += trial.products(size, marks) + size * marks * width * system.multiply
    fit += total * (tried.add + tried.sums * width**2) + tried.factor * width**3
    fit += 3 * total * job.read / networks
    directed = job.halves and not job.options.samples
    once = tried.leverage * total * width**2 if directed else 0.0
    target = trial.target + marks * width * system.multiply + tried.solve * width**2
    sample, top = min(total, SAMPLE), job.top
    products = marks * (marks + 1) // 2 + size * marks + size * each
    found = []
    for exact, chosen in way.items():
        blocks = job.blocks(trial.target_bytes, max(1, MOST // (4 * total)) if exact else None)
        each_block, estimate, rows, crossed = width * (total + sample) * tried.read, 0.0, 0, 0
        for some in blocks:
            taken = total if exact else min(total, 2 * (top or 0) * CANDIDATES * some)
            rows, crossed = rows + taken, crossed + some * taken * each
            again = taken * (trial.row + each * trial.whitened)
            again += trial.products(taken * each, some) if taken else 0.0
            again += some * taken * each * (2 if exact else 1) * width * system.multiply
            again += taken * tried.read * width + (total * job.read / networks if taken else 0.0)
            estimate += each_block + again
        at_once = tried.score * (sample if top is not None else total + sample)
        if top is not None:
            at_once += tried.rank * total
            at_once += (tried.read + tried.score) * min(2 * top, total)
        estimate += job.count * (target + at_once * width) + trial.products(job.count, marks)
        memory, disk = _held(job, trial, count, width)
        memory += job.scores + _moving(trial) + (4 * max(blocks) * total if exact else 0)
        kept = 2 * size * width + 8 * size + 8 * size * each + 4 * total + 4 * marks * width
        found.append(
            _cost(
                job,
                f"landmarks={count}" + (", exact=True" if exact else ""),
                chosen,
                (fit, once, estimate),
                memory,
                disk,
                networks * kept + 16 * total,
                {
                    "fit gradients": total + count,
                    "fit products": products,
                    "estimate gradients": rows,
                    "estimate products": job.count * marks + crossed,
                },
            )
        )
    return found


def maker_of(job: Job, each: int) -> Callable[[list[Block], Basis, int], Landmarked]:
    """Makes training sets of other sizes with the options of a job."""

    def made(blocks: list[Block], basis: Basis, instances: int) -> Landmarked:
        kind = SampledLandmarked if job.options.samples else Landmarked
        coordinates = SampledCoordinates if job.options.samples else Coordinates
        return kind(
            coordinates(blocks, basis, each),
            instances,
            residual=1.0,
            own_residual=False,
            resamples=job.options.resamples,
            memory=2**62,
        )

    return made


def _held(job: Job, trial: GradientTrial, count: int, width: int) -> tuple[int, int]:
    """Bytes in memory and on disk, of landmarks, instances and solves."""
    networks, each, total = job.networks, trial.gradients, job.instances
    marks, resamples = count * each, job.options.resamples
    gradients, vectors = marks * trial.nbytes, 2 * total * each * width
    memory = min(gradients, job.memory) + 4 * marks * width
    memory += total * (12 * each * each + 8 * each + 16)
    disk = max(0, gradients - job.memory)
    memory, disk = (memory + vectors, disk) if vectors <= job.memory else (memory, disk + vectors)
    square = 8 * width**2
    memory += (resamples + 1) * square
    solving = (len(hadamard(resamples // 2 + 1)) + 1) * square
    basis = 40 * marks**2 - (resamples + 1) * square
    chunk = 12 * each * width * min(total, chunk_of(each, width))
    return networks * memory + max(solving, basis) + chunk, networks * disk


def _moving(trial: GradientTrial) -> int:
    """Bytes of the gradients that are computed, and of a block of others."""
    return 2 * min(BLOCK * trial.nbytes, 2**28)


def _rule(job: Job, system: SystemTrial, size: int) -> float:
    """Seconds in which the ridge is chosen."""
    return system.eigen * judged(size) ** 3 if isinstance(job.options.ridge, str) else 0.0


def _cost(
    job: Job,
    way: str,
    chosen: bool,
    seconds: tuple[float, float, float],
    memory: int,
    disk: int,
    store: int,
    work: dict[str, int],
) -> FitCost:
    fit, once, estimate = (job.networks * one for one in seconds)
    target = estimate / max(1, job.count)
    return FitCost(way, chosen, fit, once, target, memory, disk, store, fit + once + estimate, work)
