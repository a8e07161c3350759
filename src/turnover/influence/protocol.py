"""What an estimator is: its options, how it scores a block of targets, and the registry of names.

To add one, write one module with a frozen dataclass of options (:class:`Method`) and an
:class:`Estimator`, and register both: ``register("name", Options, Estimator)``. :class:`turnover.Influence`
finds it by name, and the blockwise driver (:mod:`turnover.influence.driver`) adds noise floors, stores,
extremes, progress and Ray.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from turnover.batches import Batch
from turnover.dropout.network import Network
from turnover.errors import InputError
from turnover.ids import ghost_ids
from turnover.influence.engine import Engine, Scores, TargetBlock, to_numpy
from turnover.influence.halving import Halving
from turnover.influence.plan import FitPlan, MethodCost, Pilot, Plan
from turnover.influence.user_batches import UserBatches
from turnover.objectives import Objective
from turnover.results.calibration import noise_floor
from turnover.results.result import Result

if TYPE_CHECKING:
    from turnover.influence.sinks import Region
    from turnover.results.arrays import Variable
    from turnover.results.reader import StoredResult

_GRADIENT_BYTES = 2**28
_SCORE_BYTES = 2**25
"""Bytes of derivatives and of scores in one block of targets."""
_MOST_TARGETS = 1024
_OWN_GHOSTS = 20

Ids = Tensor | Sequence[int] | None
"""Training ids: int64 (train,); ``None``: all that were fitted."""


@dataclass(frozen=True)
class Setup:
    """What an estimator works on.

    Attributes:
        models: distinct networks, or modules without masks.
        objective: cost of a prediction.
        ghosts: number of ghosts of the noise floor.
        sites: sites whose masks are flipped; none without masks.
        batches: adapts and checks a user's batches.
        progress: whether to show progress bars.
    """

    models: Sequence[Network | nn.Module]
    objective: Objective
    ghosts: int
    sites: Sequence[str]
    batches: UserBatches
    progress: bool

    @cached_property
    def engines(self) -> list[Engine]:
        """One for each network, shared by all estimators."""
        networks = [one for one in self.models if isinstance(one, Network)]
        halving = Halving()
        return [Engine(one, self.objective, self.sites, halving) for one in networks]

    def described(self, method: str, digests: Sequence[str], considered: int) -> dict[str, Any]:
        """The fields of :class:`turnover.Result` that describe it."""
        return {
            "method": method,
            "objective": getattr(self.objective, "__name__", type(self.objective).__name__),
            "sites": tuple(self.sites),
            "network": "+".join(digests),
            "considered": considered,
        }


@dataclass(frozen=True)
class Wanted:
    """What an estimate or a fit keeps, and where: arguments of :meth:`turnover.Influence.estimate`."""

    top: int | None = None
    out: str | Path | None = None
    coordinates: Mapping[str, Any] = field(default_factory=dict)
    engine: str = "process"
    num_gpus: float = 1.0


class Driver(Protocol):
    """Runs an estimator. See the methods of :class:`turnover.Influence`, which call these."""

    def fit(self, train_batches: Iterable[Any]) -> None:
        """Take in the training set."""

    def estimate(
        self, targets: Iterable[Any], train_ids: Ids, wanted: Wanted
    ) -> Result | StoredResult:
        """Score training ids on every target."""

    def aggregate(self, targets: Iterable[Any], train_ids: Ids, weights: Tensor | None) -> Result:
        """Score training ids on the mean objective over targets, or its sum with weights, float64."""

    def self_influence(self, train_batches: Iterable[Any] | None) -> Result:
        """Score training instances on themselves."""

    def plan(self, targets: Iterable[Any], train_ids: Ids, wanted: Wanted) -> Plan:
        """Estimate what an estimate costs by each method."""


@runtime_checkable
class StoringDriver(Protocol):
    """A driver whose fit can be kept, or computed by other processes."""

    def fit_to(self, train_batches: Iterable[Any], wanted: Wanted) -> None:
        """Take in the training set, and write it to a store, or continue one, by the wanted engine."""


@runtime_checkable
class PlanningDriver(Protocol):
    """A driver whose fit can be planned."""

    def plan_fit(
        self, targets: Iterable[Any], train_batches: Iterable[Any], wanted: Wanted
    ) -> FitPlan:
        """Estimate what a fit and an estimate cost."""


class Method:
    """Options of an estimator: the base of frozen dataclasses such as :class:`turnover.Exact`.

    Attributes:
        name: under which it is registered, and results are stored.
        needs_masks: whether it takes networks from :func:`turnover.attach` alone. The blockwise driver does:
            its noise floor comes from ghosts, which are masks.
        needs_fit: whether :meth:`turnover.Influence.fit` must come first.
        driver: runs it, given the options and a :class:`Setup`; ``None``: the blockwise driver.
    """

    name: ClassVar[str]
    needs_masks: ClassVar[bool] = True
    needs_fit: ClassVar[bool] = False
    driver: ClassVar[Any] = None
    _estimator: ClassVar[type[Estimator]]

    def estimator(self, engines: Sequence[Engine], ghosts: int) -> Estimator:
        """What scores blocks of targets with these options."""
        return self._estimator(self, engines, ghosts)


METHODS: dict[str, type[Method]] = {}
"""Registered options by name."""


def register(
    name: str,
    options: type[Method],
    estimator: type[Estimator] | None = None,
    *,
    driver: Callable[[Any, Setup], Driver] | None = None,
) -> None:
    """Make a method available as ``Influence(network, method=name)``.

    Args:
        name: of the method.
        options: frozen dataclass; every field has a default.
        estimator: scores blocks of targets, run by the blockwise driver.
        driver: makes what runs the method by itself, in place of an estimator.

    Raises:
        InputError: another method has this name.
    """
    known = METHODS.get(name, options)
    if (known.__module__, known.__qualname__) != (options.__module__, options.__qualname__):
        raise InputError(
            f"method {name!r} is registered already, by {known.__module__}: choose another name"
        )
    options.name = name
    options.driver = None if driver is None else staticmethod(driver)
    if estimator is not None:
        options._estimator = estimator
    METHODS[name] = options


def method_of(method: str | Method) -> Method:
    """The options that a name or options mean.

    Raises:
        InputError: no registered method; those that are registered are listed.
    """
    if isinstance(method, Method) and type(method) in METHODS.values():
        return method
    if isinstance(method, type) and method in METHODS.values():
        raise InputError(f"give the options themselves: {method.__name__}() in place of the class")
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(f"unknown method {method!r}; available: {', '.join(sorted(METHODS))}")
    return METHODS[method]()


def nothing_to_fit(name: str) -> InputError:
    """The error of a fit by a method that does not look at the training data."""
    return InputError(
        f"nothing to fit: method={name!r} does not look at the training data; call estimate"
    )


class Estimator(ABC):
    """Scores blocks of targets by one method. Only :meth:`scores` must be written.

    It is pickled for other processes, so it holds options, engines and its training set alone. Values that
    depend on a network or a block of targets are kept by their ``once``.

    Args:
        options: of the method.
        engines: one for each network.
        ghosts: number of ghosts of the noise floor.

    Attributes:
        work_kind: the kind of work of a score, in progress bars.
        reports_work: whether :meth:`scores` reports its work to the engines itself.
        differentiates: whether it takes derivatives by masks: batches are then checked for sites that see
            rows in another order, and stored results keep the derivatives' norms of some targets.
        runs_masked: whether it runs networks under masks: stored results keep costs under some.
        ranks_first: whether it needs all ids of a target at once; :meth:`fill` then replaces
            :meth:`scores`.
        block_shape: targets and ids in one block; ``None``: as many as fit the memory set aside.
        floor_ghosts: ghosts that the noise floor of a target is made of.
        on_itself: the estimator of self-influence.
    """

    work_kind: ClassVar[str] = "pair"
    reports_work: ClassVar[bool] = False
    differentiates: ClassVar[bool] = False
    runs_masked: ClassVar[bool] = False
    ranks_first: ClassVar[bool] = False
    block_shape: ClassVar[tuple[int | None, int | None]] = (None, None)

    def __init__(self, options: Any, engines: Sequence[Engine], ghosts: int) -> None:
        self.options = options
        self.engines = engines
        self.ghosts = ghosts
        self.floor_ghosts = ghosts
        self.on_itself: Estimator = self

    @property
    def name(self) -> str:
        """Of the method, in results."""
        return str(self.options.name)

    @property
    def halving(self) -> Halving:
        """Bounds of the forwards of all engines."""
        return self.engines[0].halving

    def fit(self, batches: Iterable[Batch]) -> None:  # noqa: ARG002
        """Take in the training set, if the method looks at it."""
        raise nothing_to_fit(self.name)

    @abstractmethod
    def scores(self, block: TargetBlock, ids: Tensor) -> Scores:
        """Score ids, int64 (ids,), on every target of a block."""

    def counted_scores(self, block: TargetBlock, ids: Tensor) -> Scores:
        """:meth:`scores`, reported to the progress bar."""
        scores = self.scores(block, ids)
        if not self.reports_work:
            self.advance({self.work_kind: 1}, scores.mean.numel())
        return scores

    def own(self, block: TargetBlock, ids: Tensor) -> tuple[Scores, Tensor]:
        """Scores (1, targets) of target i under ``ids[i]``, and of targets under ghosts (targets, ghosts)."""
        noise = ghost_ids(min(self.ghosts, _OWN_GHOSTS))
        found = [
            self.counted_scores(row, torch.cat([ids[i : i + 1], noise]))
            for i, row in enumerate(block.targets())
        ]
        errors = [one.standard_error[:, :1] for one in found if one.standard_error is not None]
        own = torch.cat([one.mean[:, :1] for one in found], dim=1)
        error = torch.cat(errors, dim=1) if errors else None
        return Scores(own, error), torch.cat([one.mean[:, 1:] for one in found])

    def errors(
        self,
        block: TargetBlock,
        ids: Tensor,
        positions: NDArray[np.int64],
        columns: int,  # noqa: ARG002
    ) -> NDArray[np.float32]:
        """Standard errors over networks of scores that are wanted once all ids are scored.

        Args:
            block: the targets.
            ids: int64 (ids,).
            positions: into the ids (targets, ranks).
            columns: ids in one block.
        """
        errors = np.empty(positions.shape, dtype=np.float32)
        for index, target in enumerate(block.targets()):
            found = self.counted_scores(target, ids[torch.from_numpy(positions[index])])
            assert found.standard_error is not None
            errors[index] = to_numpy(found.standard_error)[0]
        return errors

    def fill(self, region: Region, top: int | None) -> None:
        """Score a block of targets on all ids, and put all arrays of the region."""
        raise NotImplementedError

    def forget(self) -> None:  # noqa: B027
        """Drop what was learned from earlier targets: a block's bits must not depend on them."""

    def rows(self, targets: int | None = None) -> int:
        """Targets in one block, if there are so many."""
        if self.block_shape[0] is not None:
            return self.block_shape[0]
        units = sum(engine.units for engine in self.engines)
        most = min(_MOST_TARGETS, max(32, _GRADIENT_BYTES // (4 * units) // 32 * 32))
        return most if targets is None else min(most, targets)

    def columns(self, rows: int, ids: int) -> int:
        """Ids in one block of so many targets."""
        if self.block_shape[1] is not None:
            return self.block_shape[1]
        size = max(1024, _SCORE_BYTES // (4 * rows))
        return int(min(2 ** (size.bit_length() - 1), 2 ** (max(ids, 1024) - 1).bit_length()))

    def work(self, ids: int, *, first: bool, top: int | None) -> dict[str, int]:
        """Work of each kind that a target takes of each network: on ids, and on ghosts with the first."""
        again = min(2 * top, ids) if top and first and len(self.engines) > 1 else 0
        return {self.work_kind: ids + (self.floor_ghosts if first else 0) + again}

    def own_work(self) -> dict[str, int]:
        """Work of each kind that :meth:`own` takes for a row."""
        return {self.work_kind: 1 + min(self.ghosts, _OWN_GHOSTS)}

    def advance(self, each: Mapping[str, int], times: int = 1) -> None:
        """Report work done to the progress bar."""
        for engine in self.engines:
            for kind, count in each.items():
                engine.counts.advance(kind, times * count)

    def skip(self, each: Mapping[str, int], times: int) -> None:
        """Report work that an earlier process did."""
        for engine in self.engines:
            for kind, count in each.items():
                engine.counts.skip(kind, times * count)

    def seconds(self, pilot: Pilot) -> dict[str, float]:
        """Seconds of a piece of each kind of work, by all networks."""
        target = next(pilot.block.targets())
        self.scores(target, ghost_ids(2))  # the first call also prepares
        return {self.work_kind: pilot.seconds_of_id(lambda ids: self.scores(target, ids))}

    def ghost_scores(self, pilot: Pilot) -> NDArray[np.float64]:
        """Scores of the pilot's targets under ghosts: float64 (targets, ghosts)."""
        return self.scores(pilot.block, ghost_ids(self.ghosts)).mean.cpu().double().numpy()

    def memory(self, pilot: Pilot) -> int:
        """Bytes that scoring takes, beside scores."""
        rows = self.rows(pilot.targets)
        return 12 * rows * sum(engine.units for engine in self.engines)

    def cost(self, pilot: Pilot) -> MethodCost:
        """Estimate time, memory and noise floor."""
        each = self.seconds(pilot)
        work = self.work(pilot.ids, first=True, top=pilot.top)
        rows = self.rows(pilot.targets)
        size = pilot.held + 4 * rows * self.columns(rows, pilot.ids) + self.memory(pilot)
        return MethodCost(
            self.name,
            pilot.targets * sum(count * each[kind] for kind, count in work.items()),
            size / 2**30,
            float(np.median(noise_floor(self.ghost_scores(pilot)).sd)),
            each,
        )

    def variables(
        self,
        dims: tuple[str, str],  # noqa: ARG002
        chunks: tuple[int, int],  # noqa: ARG002
    ) -> dict[str, Variable]:
        """Arrays of a stored result beside scores, ghosts and standard errors."""
        return {}

    def identity(self) -> dict[str, Any]:
        """What a stored result must share with this estimator to be resumed, as JSON values."""
        return asdict(self.options)

    def check_top(self, top: int | None) -> None:  # noqa: B027
        """Refuse to keep more ids for each target than the method scores well."""
