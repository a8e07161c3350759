"""How well a score finds wrong labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from turnover.errors import InputError
from turnover.evaluation.correlation import check_finite

_LOOKED_AT = (10, 50, 100)


@dataclass(frozen=True)
class Mislabel:
    """How well a score finds wrong labels.

    Attributes:
        auc: area under the ROC curve: probability that a wrong label scores higher than a right one.
        precision_at: number of instances with the highest scores, to the share of wrong labels among
            them (its expectation, where ties straddle the cut).
    """

    auc: float
    precision_at: dict[int, float]


def mislabel(
    scores: NDArray[np.floating], wrong: NDArray[np.bool_], *, at: Sequence[int] | None = None
) -> Mislabel:
    """Judge scores, higher = more suspicious, by known wrong labels.

    Give self-influence as it is, and minus the influence on other instances: harmful is suspicious.

    Args:
        scores: (train,).
        wrong: bool (train,), True = the label is wrong.
        at: numbers of instances to look at; ``None``: 10, 50, 100, and the number of wrong labels.

    Raises:
        InputError: shapes that do not fit, scores that are not finite, no wrong or no right label, or
            more instances to look at than there are.
    """
    values: NDArray[np.float64] = np.asarray(scores, dtype=np.float64)
    wrong = np.asarray(wrong)
    if values.ndim != 1 or wrong.shape != values.shape or wrong.dtype != np.bool_:
        raise InputError(
            f"scores and wrong must be (train,), wrong bool, got {values.shape} and {wrong.dtype} "
            f"{wrong.shape}"
        )
    check_finite("scores", values)
    count, bad = len(values), int(wrong.sum())
    if not 0 < bad < count:
        raise InputError(f"{bad} of {count} labels are wrong: some must be, but not all")
    looked = at if at is not None else [k for k in (*_LOOKED_AT, bad) if k <= count]
    if any(not 0 < k <= count for k in looked):
        raise InputError(f"at must be in 1 to {count}, the instances, got {list(looked)}")
    above = rankdata(values)[wrong].sum() - bad * (bad + 1) / 2
    precision = {k: _precision(values, wrong, k) for k in sorted(set(looked))}
    return Mislabel(float(above / (bad * (count - bad))), precision)


def _precision(scores: NDArray[np.float64], wrong: NDArray[np.bool_], k: int) -> float:
    cut = np.partition(scores, -k)[-k]
    over, tied = scores > cut, scores == cut
    found = wrong[over].sum() + (k - over.sum()) * wrong[tied].mean()
    return float(found / k)
