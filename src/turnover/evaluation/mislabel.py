"""Finding wrong labels by a score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from turnover.errors import InputError

_LOOKED_AT = (10, 50, 100)


@dataclass(frozen=True)
class Mislabel:
    """How well a score finds wrong labels.

    Attributes:
        auc: chance that a wrong label scores higher than a right one, ties half; 0.5 is chance.
        precision_at: number of instances looked at, from the highest score, to the share of wrong
            labels among them (its expectation, where ties straddle the cut).
    """

    auc: float
    precision_at: dict[int, float]


def mislabel(
    scores: NDArray[np.floating], wrong: NDArray[np.bool_], *, at: Sequence[int] | None = None
) -> Mislabel:
    """Judge scores of which higher means more suspicious.

    Self-influence is such a score as it is; influence on other instances has to be negated, since it
    is the harmful ones that are suspicious.

    Args:
        scores: (train,).
        wrong: bool (train,), True = the label is wrong.
        at: numbers of instances to look at; ``None``: 10, 50, 100, and as many as are wrong.

    Raises:
        InputError: shapes that do not fit, scores that are not finite, no wrong or no right label, or
            a number of instances beyond what there is.
    """
    values: NDArray[np.float64] = np.asarray(scores, dtype=np.float64)
    wrong = np.asarray(wrong)
    if values.ndim != 1 or wrong.shape != values.shape or wrong.dtype != np.bool_:
        raise InputError(
            f"scores and wrong must be (train,), wrong bool, got {values.shape} and {wrong.dtype} "
            f"{wrong.shape}"
        )
    if not np.isfinite(values).all():
        raise InputError(
            f"scores must be finite; score {int(np.argmin(np.isfinite(values)))} is not"
        )
    count, bad = len(values), int(wrong.sum())
    if not 0 < bad < count:
        raise InputError(f"{bad} of {count} labels are wrong: there must be some, and not all")
    looked = at if at is not None else [k for k in (*_LOOKED_AT, bad) if k <= count]
    if any(not 0 < k <= count for k in looked):
        raise InputError(f"at must lie in 1 to {count}, the instances, got {list(looked)}")
    above = rankdata(values)[wrong].sum() - bad * (bad + 1) / 2
    precision = {k: _precision(values, wrong, k) for k in sorted(set(looked))}
    return Mislabel(float(above / (bad * (count - bad))), precision)


def _precision(scores: NDArray[np.float64], wrong: NDArray[np.bool_], k: int) -> float:
    cut = np.partition(scores, -k)[-k]
    over, tied = scores > cut, scores == cut
    found = wrong[over].sum() + (k - over.sum()) * wrong[tied].mean()
    return float(found / k)
