"""Numbers of a result as the page takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.io.parsing import finite_or_none
from turnover.results.result import Result
from turnover.tasks.explain import SIGNIFICANT_Q


class Ranked:
    """A result of one score for each training id, by column of the pairs, with ranks.

    Args:
        ranking: positions in the result, the one of note first.
        order: position in the result of each column; ``None``: the same.
    """

    def __init__(
        self,
        result: Result,
        ranking: NDArray[np.int64],
        order: NDArray[np.int64] | None = None,
    ) -> None:
        self.result = result
        self._at = np.arange(len(ranking)) if order is None else order
        self._rank = np.empty(len(ranking), dtype=np.int64)
        self._rank[ranking] = np.arange(1, len(ranking) + 1)
        self.scores = result.scores[self._at]

    def at(self, column: int) -> dict[str, Any]:
        """What was measured of an instance."""
        result, at = self.result, self._at[column]
        numbers = measured(result.scores[at], result.z[at], result.q[at])
        return {**numbers, "rank": int(self._rank[at])}


def ends_of(
    scores: NDArray[np.floating], kept: NDArray[np.int64], top: int
) -> tuple[tuple[list[int], list[int]], bool]:
    """Positions of the highest scores above 0 and of the lowest below it; whether there are more."""
    order = kept[np.argsort(scores[kept], kind="stable")]
    helpful = [at for at in order[::-1][:top].tolist() if scores[at] > 0]
    harmful = [at for at in order[:top].tolist() if scores[at] < 0]
    more = (scores[kept] > 0).sum() > len(helpful) or (scores[kept] < 0).sum() > len(harmful)
    return (helpful, harmful), bool(more)


def measured(score: Any, z: Any, q: Any) -> dict[str, Any]:
    """Of turn-over: score in nats, z, q, and whether q is at most 0.05."""
    return {
        "score": finite_or_none(score),
        "z": finite_or_none(z),
        "q": finite_or_none(q),
        "significant_here": bool(q <= SIGNIFICANT_Q),
    }


def by_gram(result: Result, target: int, rank: int) -> dict[str, float]:
    """Of gram: score and standard error in nats."""
    assert result.standard_error is not None
    at = target, rank
    return {"score": float(result.scores[at]), "error": float(result.standard_error[at])}
