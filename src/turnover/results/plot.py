"""A plot of the strongest training instances of one target, or of a ranking."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

from turnover.errors import InputError, needing
from turnover.results.strongest import strongest

if TYPE_CHECKING:
    from turnover.results.result import Result


def plot(result: Result, target: int | None, count: int, ax: Any) -> Any:
    """Draw bars with their noise; see :meth:`turnover.Result.plot`."""
    title = f"{result.method}: influence on {result.objective}"
    if result.scores.ndim > 1:
        target = _position(target, len(result.scores))
        ids = result.target_ids
        title += f" of target {target}" + ("" if ids is None else f" (id {ids[target]})")
        result = result.of_targets(slice(target, target + 1))
    elif target is not None:
        raise InputError("this result has one score for each training id: leave out target=")
    rows = strongest(result, count)
    if ax is None:
        with needing("a plot", "turnover[notebook]"):
            from matplotlib import pyplot
        _, ax = pyplot.subplots(layout="constrained")
    places: list[int] = []
    for row in rows:  # a gap where ranks are left out
        gap = bool(places) and row.rank > rows[len(places) - 1].rank + 1
        places.append((places[-1] if places else 0) + 1 + gap)
    ax.barh(
        places,
        [row.score for row in rows],
        xerr=[row.noise for row in rows],
        color=["C0" if row.score >= 0 else "C1" for row in rows],
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    ax.set_yticks(places, [str(row.train_id) for row in rows])
    ax.invert_yaxis()
    ax.axvline(0, color="0.3", linewidth=0.8)
    ax.set(title=title, xlabel="score ± noise (1 standard deviation)", ylabel="training id")
    return ax


def _position(target: int | None, targets: int) -> int:
    if target is None and targets == 1:
        return 0
    if isinstance(target, bool) or not isinstance(target, Integral) or not 0 <= target < targets:
        raise InputError(
            f"give target=, the position of one of {targets:,} targets, from 0 to {targets - 1}, "
            f"got {target!r}"
        )
    return int(target)
