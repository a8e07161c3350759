"""The strongest training instances of a result on both sides, as a table that prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from turnover.errors import InputError, check_whole

if TYPE_CHECKING:
    from turnover.results.result import Result

MOST_ROWS = 10_000_000
"""Rows of the largest table."""
_SHOWN = 60
_HEADERS = {"target_id": "target id", "train_id": "training id"}


class Scored(NamedTuple):
    """A training instance's score for a target.

    Attributes:
        target: position of the target; ``None`` where each training id has one score.
        target_id: its id, if the targets had ids.
        train_id: the training id.
        rank: 1 is the most helpful of the training ids that the result holds for this target.
        score: influence.
        noise: standard deviation of the noise, on the scale of ``score``.
        z: score in units of the noise.
        p: two-sided p-value.
        q: p adjusted over the training ids of the target.
    """

    target: int | None
    target_id: int | None
    train_id: int
    rank: int
    score: float
    noise: float
    z: float
    p: float
    q: float


class Strongest(Sequence[Scored]):
    """The strongest training instances of every target: a sequence of :class:`Scored` that prints as a table.

    Each target has its most helpful instances, then its most harmful ones, in the order of their rank.
    ``pandas.DataFrame(strongest)`` makes a data frame of it.
    """

    def __init__(self, rows: Sequence[Scored]) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, index: int) -> Scored: ...
    @overload
    def __getitem__(self, index: slice) -> Strongest: ...
    def __getitem__(self, index: int | slice) -> Scored | Strongest:
        """A row, or some of them."""
        return Strongest(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def __repr__(self) -> str:
        header, *cells = lines = [*self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.rjust, line, widths)) for line in (header, *cells)]
        return "\n".join([*text, *self._more()])

    def _repr_html_(self) -> str:
        lines = [
            f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
            for tag, cells in zip(["th", *["td"] * _SHOWN], self._cells(), strict=False)
        ]
        more = "".join(f"<p>{escape(line)}</p>" for line in self._more())
        return f"<table>{''.join(lines)}</table>{more}"

    def _cells(self) -> Iterator[tuple[str, ...]]:
        """Header, then rows that are shown; columns without values are left out."""
        shown = self._rows[:_SHOWN]
        names = [
            name for name in Scored._fields if any(getattr(r, name) is not None for r in shown)
        ]
        yield tuple(_HEADERS.get(name, name) for name in names)
        for row in shown:
            yield tuple(_number(getattr(row, name)) for name in names)

    def _more(self) -> list[str]:
        left = len(self) - _SHOWN
        return [f"... and {left:,} more rows"] if left > 0 else []


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def check_rows(rows: int, what: str, fix: str) -> None:
    """Refuse a table that is too large."""
    if rows > MOST_ROWS:
        raise InputError(f"{what} are {rows:,} rows, and a table has at most {MOST_ROWS:,}: {fix}")


def strongest(result: Result, count: int) -> Strongest:
    """The ``count`` most helpful and ``count`` most harmful training ids of every target."""
    check_whole("count", count, 1)
    if result.scores.ndim == 1:
        return Strongest([*_of_one(result, None, count)])
    targets, width = result.scores.shape
    check_rows(
        targets * min(2 * count, width),
        f"the {2 * count} strongest of {targets:,} targets",
        "give a smaller number",
    )
    return Strongest(
        [
            row
            for target in range(targets)
            for row in _of_one(result.of_targets(slice(target, target + 1)), target, count)
        ]
    )


def _of_one(result: Result, target: int | None, count: int) -> Iterator[Scored]:
    """Rows of a result with one target, or with none."""
    scores, train_ids = result.scores.reshape(-1), result.train_ids.reshape(-1)
    order = np.argsort(-scores, kind="stable")
    ends = np.arange(len(order))
    ends = ends[(ends < count) | (ends >= len(order) - count)]
    name = None
    if target is not None and result.target_ids is not None:
        name = int(result.target_ids[0])
    columns = (
        np.broadcast_to(values, result.scores.shape).reshape(-1)
        for values in (result.scores, result.noise, result.z, result.p, result.q)
    )
    numbers = np.stack([values[order[ends]].astype(np.float64) for values in columns], axis=1)
    ids = train_ids[order[ends]].tolist()
    for rank, train_id, row in zip(ends.tolist(), ids, numbers.tolist(), strict=True):
        yield Scored(target, name, train_id, rank + 1, *row)
