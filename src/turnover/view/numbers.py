"""Numbers of a result as the page takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.io.parsing import finite_or_none
from turnover.results.result import Result
from turnover.tasks.explain import SIGNIFICANT_Q


class Ranked:
    """One score, z, q and rank for each column of the pairs.

    Args:
        result: one score for each training id.
        train_ids: the same ids in the order of the columns, int64 (columns,).
        sign: 1 ranks the lowest score first, -1 the highest.
    """

    def __init__(self, result: Result, train_ids: NDArray[np.int64], sign: int) -> None:
        order = np.argsort(result.train_ids)
        at = order[np.searchsorted(result.train_ids, train_ids, sorter=order)]
        self.scores, self.z, self.q = result.scores[at], result.z[at], result.q[at]
        rank = np.empty(len(at), dtype=np.int64)
        rank[np.argsort(sign * result.scores, kind="stable")] = np.arange(1, len(at) + 1)
        self._rank = rank[at]

    def at(self, column: int) -> dict[str, Any]:
        """The numbers of an instance."""
        numbers = measured(self.scores[column], self.z[column], self.q[column])
        return {**numbers, "rank": int(self._rank[column])}


def ends_of(
    scores: NDArray[np.floating], kept: NDArray[np.int64], top: int
) -> tuple[dict[str, list[int]], bool]:
    """Positions of the highest scores above 0 and of the lowest below it; whether there are more."""
    order = kept[np.argsort(scores[kept], kind="stable")]
    ends = {
        "helpful": [at for at in order[::-1][:top].tolist() if scores[at] > 0],
        "harmful": [at for at in order[:top].tolist() if scores[at] < 0],
    }
    signed = int(((scores[kept] > 0) | (scores[kept] < 0)).sum())
    return ends, sum(map(len, ends.values())) < signed


def measured(score: Any, z: Any, q: Any) -> dict[str, Any]:
    """Numbers by turn-over: score in nats, z, q, and whether q is at most 0.05."""
    numbers = {"score": score, "z": z, "q": q}
    found = {name: finite_or_none(value) for name, value in numbers.items()}
    return {**found, "significant_here": bool(q <= SIGNIFICANT_Q)}


def by_gram(result: Result, target: int, rank: int) -> dict[str, float]:
    """Numbers by gram: score and standard error in nats."""
    assert result.standard_error is not None
    at = target, rank
    return {"score": float(result.scores[at]), "error": float(result.standard_error[at])}
