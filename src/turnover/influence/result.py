"""What an estimate returns: scores with the noise they stand in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from turnover.influence.calibration import NoiseFloor, NullDistribution, q_values

if TYPE_CHECKING:
    import xarray


@dataclass(frozen=True)
class Result:
    """Influence scores, and what they would be worth if they were noise.

    A pairwise result is (targets, train); an aggregate and a self-influence result is (train,).
    Positive: the training instance helped (without it the objective would be higher). Units: those of
    the objective (nats for the built-in ones).

    Attributes:
        scores: float32, influence.
        z: float32, scores in ghost standard deviations from the ghost mean.
        p: float64, two-sided, of ``z`` under the ghosts.
        q: float64, Benjamini-Hochberg over the training ids (per target).
        noise_floor: float32, the ghosts' standard deviation: (targets,) for a pairwise result, ()
            for an aggregate, (train,) for self-influence.
        train_ids: int64 (train,).
        target_ids: int64 (targets,), where the target batches had ids.
        method: estimator.
        objective: name of the objective.
        sites: the sites whose masks were flipped.
        network: digest of the network that was scored (see :meth:`turnover.Network.digest`).
        null: the distribution that turned z into p, for scores of other ids; not stored with a run.
    """

    scores: NDArray[np.float32]
    z: NDArray[np.float32]
    p: NDArray[np.float64]
    q: NDArray[np.float64]
    noise_floor: NDArray[np.float32]
    train_ids: NDArray[np.int64]
    target_ids: NDArray[np.int64] | None
    method: str
    objective: str
    sites: tuple[str, ...]
    network: str
    null: NullDistribution | None

    def select(self, keep: NDArray[np.bool_]) -> Result:
        """The result for some of the training ids alone; q is computed anew over those.

        Args:
            keep: bool (train,).
        """
        noise_floor = self.noise_floor
        if self.scores.ndim == 1 and noise_floor.ndim == 1:
            noise_floor = noise_floor[keep]
        p = self.p[..., keep]
        return replace(
            self,
            scores=self.scores[..., keep],
            z=self.z[..., keep],
            p=p,
            q=q_values(p),
            noise_floor=noise_floor,
            train_ids=self.train_ids[keep],
        )

    def to_xarray(self) -> xarray.Dataset:
        """The result as a labelled dataset with dimensions (target, train) or (train,).

        Raises:
            ImportError: xarray is not installed (``pip install turnover[results]``).
        """
        import xarray

        dims = ("target", "train")[-self.scores.ndim :]
        coordinates: dict[str, Any] = {"train": self.train_ids}
        if "target" in dims and self.target_ids is not None:
            coordinates["target"] = self.target_ids
        noise_dims = dims[:1] if self.noise_floor.ndim else ()
        return xarray.Dataset(
            {
                "score": (dims, self.scores),
                "z": (dims, self.z),
                "p": (dims, self.p),
                "q": (dims, self.q),
                "noise_floor": (noise_dims, self.noise_floor),
            },
            coords=coordinates,
            attrs={"method": self.method, "objective": self.objective, "network": self.network},
        )


def make_result(
    scores: NDArray[np.floating],
    floor: NoiseFloor,
    null: NullDistribution,
    *,
    train_ids: NDArray[np.int64],
    target_ids: NDArray[np.int64] | None,
    method: str,
    objective: str,
    sites: tuple[str, ...],
    network: str,
) -> Result:
    """Pairwise result of scores (targets, train)."""
    z = floor.standardise(scores)
    # Without any noise there is no scale to judge a score by.
    p = np.where(floor.sd[:, None] > 0, null.p_values(z), 1.0)
    return Result(
        scores.astype(np.float32),
        z.astype(np.float32),
        p,
        q_values(p),
        floor.sd.astype(np.float32),
        train_ids,
        target_ids,
        method,
        objective,
        sites,
        network,
        null,
    )
