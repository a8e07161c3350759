"""Influence scores in memory, with their noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError, needing
from turnover.results.calibration import NoiseFloor, NullDistribution, StudentNull, q_values

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True)
class Result:
    """Influence scores, and how significant they are against noise.

    A pairwise result is (targets, train); one that holds only the extremes is (targets, ranks), from the
    most helpful training instance to the most harmful; an aggregate or self-influence result is
    (train,). A positive score means that the training instance helped: without it the objective would
    be higher. Units are those of the objective (nats for the built-in ones).

    Attributes:
        scores: float32, influence.
        floor: mean and standard deviation of the ghosts' scores; for gram, 0 and the root mean square of
            the standard errors.
        null: the distribution that turns z into p.
        train_ids: int64 (train,); (targets, ranks) if only the extremes are held.
        target_ids: int64 (targets,), if the target batches had ids.
        method: estimator.
        objective: name of the objective.
        sites: the sites whose masks were flipped.
        network: digest of the network that was scored (see :meth:`turnover.Network.digest`); of
            several, their digests joined by "+".
        considered: number of training ids scored for each target, over which q is adjusted.
        standard_error: float32, of the shape of ``scores``: of the mean over several networks; for gram
            also with one network, over halves of the training set.
        exact: bool, of the shape of ``scores``: reranked pairs, whose scores are exact; the others are
            linear scores on the scale of the exact ones. ``None``: all scores are of one kind.
        recall: float32 (targets,), () of an aggregate, with rerank: estimated share of the exact
            extremes among those reported (see :mod:`turnover.influence.rerank`).
    """

    scores: NDArray[np.float32]
    floor: NoiseFloor
    null: NullDistribution | StudentNull
    train_ids: NDArray[np.int64]
    target_ids: NDArray[np.int64] | None
    method: str
    objective: str
    sites: tuple[str, ...]
    network: str
    considered: int
    standard_error: NDArray[np.float32] | None = None
    exact: NDArray[np.bool_] | None = None
    recall: NDArray[np.float32] | None = None

    @cached_property
    def z(self) -> NDArray[np.float32]:
        """Scores in ghost standard deviations from the ghost mean; for gram, in standard errors.

        float32, of the shape of scores.
        """
        return self._noise.standardize(self.scores).astype(np.float32)

    @cached_property
    def p(self) -> NDArray[np.float64]:
        """Two-sided p-values of ``z`` under the ghosts; for gram, under Student's t.

        float64, of the shape of scores.
        """
        noise = self._noise
        _, sd = noise.of(self.scores)
        # Without noise, no scale tells how large a score is.
        values = self.null.p_values(noise.standardize(self.scores))
        return np.asarray(np.where(sd > 0, values, 1.0))

    @property
    def _noise(self) -> NoiseFloor:
        if isinstance(self.null, StudentNull) and self.standard_error is not None:
            return NoiseFloor(np.zeros_like(self.standard_error), self.standard_error)
        return self.floor

    @cached_property
    def q(self) -> NDArray[np.float64]:
        """Benjamini-Hochberg q-values over the training ids of each target; upper bounds of extremes alone.

        float64, of the shape of scores.
        """
        return q_values(self.p, self.considered)

    @property
    def noise_floor(self) -> NDArray[np.float32]:
        """The ghosts' standard deviation; for gram, the root mean square of the standard errors.

        float32 (targets,); () of an aggregate, (train,) of self-influence.
        """
        return self.floor.sd.astype(np.float32)

    def select(self, keep: NDArray[np.bool_]) -> Result:
        """Keep some of the training ids; q is then adjusted over those.

        Args:
            keep: bool (train,).

        Raises:
            InputError: the result holds only the extremes of each target.
        """
        if self.train_ids.ndim > 1:
            raise InputError(
                "this result holds only the extremes of each target, and not the same training ids for "
                "all; estimate without top= to select training ids"
            )
        floor = self.floor
        if self.scores.ndim == 1 and floor.sd.ndim == 1:
            floor = NoiseFloor(floor.mean[keep], floor.sd[keep])
        return replace(
            self,
            scores=self.scores[..., keep],
            floor=floor,
            train_ids=self.train_ids[keep],
            considered=int(np.count_nonzero(keep)),
            standard_error=None if self.standard_error is None else self.standard_error[..., keep],
            exact=None if self.exact is None else self.exact[..., keep],
        )

    def to_xarray(self) -> xarray.Dataset:
        """Convert to a labelled dataset with dimensions (target, train), (target, rank) or (train,).

        Raises:
            InputError: xarray is not installed (``pip install turnover[results]``).
        """
        with needing("a labelled dataset", "turnover[results]"):
            import xarray

        dims = dims_of(self)
        values: dict[str, Any] = {
            **arrays_of(self),
            "z": (dims, self.z),
            "p": (dims, self.p),
            "q": (dims, self.q),
            "noise_floor": (dims[: self.floor.sd.ndim], self.noise_floor),
        }
        attributes = {"method": self.method, "objective": self.objective, "network": self.network}
        return xarray.Dataset(values, coords=coordinates_of(self), attrs=attributes)


def dims_of(result: Result) -> tuple[str, ...]:
    """Names of the dimensions of the scores."""
    return ("target", "train" if result.train_ids.ndim == 1 else "rank")[-result.scores.ndim :]


def arrays_of(result: Result) -> dict[str, tuple[tuple[str, ...], NDArray[Any]]]:
    """Scores, and the arrays that go with them: name to (dimensions, values)."""
    dims = dims_of(result)
    found = {
        "score": result.scores,
        "train_id": result.train_ids if "rank" in dims else None,
        "standard_error": result.standard_error,
        "exact": result.exact,
        "recall": result.recall,
    }
    return {
        name: (dims[: np.ndim(values)], values)
        for name, values in found.items()
        if values is not None
    }


def coordinates_of(result: Result) -> dict[str, tuple[str, NDArray[np.int64]]]:
    """Ids along the dimensions that have ids: name to (dimension, ids)."""
    dims, ids = dims_of(result), {"train": result.train_ids, "target": result.target_ids}
    return {dim: (dim, found) for dim, found in ids.items() if dim in dims and found is not None}
