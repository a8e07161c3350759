"""Influence scores in memory, with their noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError, needing
from turnover.results.calibration import NoiseFloor, NullDistribution, StudentNull, q_values
from turnover.results.plot import plot
from turnover.results.strongest import Strongest, check_rows, strongest

if TYPE_CHECKING:
    import matplotlib.axes
    import pandas
    import xarray

_PREVIEW = 3
"""Targets, and training ids on each side of them, that a notebook shows."""


@dataclass(frozen=True, repr=False)
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
        return self._scale.standardize(self.scores).astype(np.float32)

    @cached_property
    def p(self) -> NDArray[np.float64]:
        """Two-sided p-values of ``z`` under the ghosts; for gram, under Student's t.

        float64, of the shape of scores.
        """
        noise = self._scale
        _, sd = noise.of(self.scores)
        # Without noise, no scale tells how large a score is.
        values = self.null.p_values(noise.standardize(self.scores))
        return np.asarray(np.where(sd > 0, values, 1.0))

    @property
    def _scale(self) -> NoiseFloor:
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

    @property
    def noise(self) -> NDArray[np.floating]:
        """Standard deviation behind z: of the ghosts, or the standard error; broadcasts with the scores."""
        return self._scale.of(self.scores)[1]

    def __repr__(self) -> str:
        """Shape and method in one line."""
        targets, ids = "", f"{self.scores.shape[-1]:,} training ids"
        if self.scores.ndim > 1:
            targets = f"{len(self.scores):,} targets x "
        if self.train_ids.ndim > 1:
            ids = f"the strongest {self.scores.shape[-1]:,} of {self.considered:,} training ids"
        return f"<turnover.Result: {targets}{ids}, {self.method}, objective {self.objective}>"

    def _repr_html_(self) -> str:
        """Shape and method, and the strongest training ids of the first targets."""
        shown = self if self.scores.ndim == 1 else self.of_targets(slice(_PREVIEW))
        return f"<p>{escape(repr(self))}</p>{shown.top(_PREVIEW)._repr_html_()}"

    def top(self, count: int) -> Strongest:
        """The strongest training ids of every target: ``count`` most helpful, ``count`` most harmful.

        Args:
            count: training ids on each side, at least 1.

        Returns:
            A sequence of :class:`~turnover.results.strongest.Scored` (target, training id, rank, score,
            noise, z, p, q) that prints as a table, in notebooks too.

        Raises:
            InputError: the table would have more than 10,000,000 rows.

        Example:
            >>> result.top(5)  # doctest: +SKIP
            >>> [row.train_id for row in result.top(5) if row.q < 0.05]  # doctest: +SKIP
        """
        return strongest(self, count)

    def plot(
        self, target: int | None = None, *, count: int = 10, ax: matplotlib.axes.Axes | None = None
    ) -> matplotlib.axes.Axes:
        """Plot the strongest training ids at both ends as bars, with their noise.

        Args:
            target: position of the target; an aggregate or self-influence has none.
            count: training ids at each end.
            ax: axes to draw on; default: a new figure of pyplot, which is not shown.

        Returns:
            The axes.

        Raises:
            InputError: matplotlib is not installed (``pip install turnover[notebook]``), or the target does
                not exist.

        Example:
            >>> result.plot(target=0).figure.savefig("target.png")  # doctest: +SKIP
        """
        axes: matplotlib.axes.Axes = plot(self, target, count, ax)
        return axes

    def of_targets(self, targets: slice) -> Result:
        """Keep some of the targets of a result that has targets; their scores, z, p and q stay.

        Example:
            >>> result.of_targets(slice(0, 10)).to_dataframe()  # doctest: +SKIP
        """
        pick: dict[str, Any] = {
            name: None if values is None else values[targets]
            for name in ("scores", "target_ids", "standard_error", "exact", "recall")
            for values in (getattr(self, name),)
        }
        if self.train_ids.ndim > 1:
            pick["train_ids"] = self.train_ids[targets]
        floor = NoiseFloor(self.floor.mean[targets], self.floor.sd[targets])
        return replace(self, floor=floor, **pick)

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

    def to_dataframe(self) -> pandas.DataFrame:
        """Convert to a pandas data frame: a row for each target and training id.

        Returns:
            Columns ``target`` (int64, its position) and ``target_id`` (int64) where there are any;
            ``train_id`` (int64); ``rank`` (int64; 1 is the most helpful that the result holds for the
            target); ``score``, ``noise`` and ``z`` (float32); ``p`` and ``q`` (float64);
            ``standard_error`` (float32) and ``exact`` (bool) where they are known.

        Raises:
            InputError: pandas is not installed (``pip install turnover[notebook]``), or the table would
                have more than 10,000,000 rows.

        Example:
            >>> result.to_dataframe().query("q < 0.05")  # doctest: +SKIP
        """
        check_rows(
            self.scores.size,
            " x ".join(f"{n:,}" for n in self.scores.shape) + " scores",
            "estimate with top=, or take the strongest, .top(20)",
        )
        with needing("a data frame", "turnover[notebook]"):
            import pandas

        shape = self.scores.shape
        order = np.argsort(-self.scores, axis=-1, kind="stable")
        rank = np.empty(shape, dtype=np.int64)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(1, shape[-1] + 1), shape), axis=-1)
        columns: dict[str, NDArray[Any] | None] = {"train_id": self.train_ids, "rank": rank}
        if len(shape) > 1:
            ids = None if self.target_ids is None else self.target_ids[:, None]
            columns = {"target": np.arange(shape[0])[:, None], "target_id": ids, **columns}
        columns |= {"score": self.scores, "noise": self.noise.astype(np.float32)}
        columns |= {"z": self.z, "p": self.p, "q": self.q}
        columns |= {"standard_error": self.standard_error, "exact": self.exact}
        return pandas.DataFrame(
            {
                name: np.broadcast_to(values, shape).reshape(-1)
                for name, values in columns.items()
                if values is not None
            }
        )


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
