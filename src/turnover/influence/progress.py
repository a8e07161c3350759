"""Progress bars of work of several kinds, with the time left.

A target takes a backward pass, linear pairs with ids, exact ones. Each kind is counted and timed by itself,
and the bar shows the share of the time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from turnover.batches import Batch
from turnover.batches.loaders import length_of
from turnover.io.bars import set_total, tqdm

_FIRST = 0.05
"""Share of the work that a guess weighs: the first pieces of a kind take longer than the rest."""


def counting(title: str, total: int, unit: str, *, shown: bool) -> Any:
    """A bar of one kind of work, of a known total."""
    return tqdm(desc=title, total=total, unit=f" {unit}", unit_scale=True, disable=not shown)


class Counts:
    """Takes reports of work done, and ignores them."""

    def advance(self, kind: str, count: int) -> None:
        """Count work of a kind that is done."""

    def skip(self, kind: str, count: int) -> None:
        """Count work of a kind that an earlier process did."""

    def close(self) -> None:
        """End the reports."""


class Progress(Counts):
    """Counts work on a bar, whose total follows from the batches seen so far.

    Args:
        title: before the bar.
        each: work of each target by kind.
        once: work that does not grow with the targets, likewise.
        seconds: guesses of the seconds of a piece of each kind, until some is done.
        unit: name of a target.
        shown: whether to show the bar.
    """

    def __init__(
        self,
        title: str,
        each: Mapping[str, int],
        *,
        once: Mapping[str, int] | None = None,
        seconds: Mapping[str, float] | None = None,
        unit: str = "target",
        shown: bool,
    ) -> None:
        self._each = dict(each)
        self._once = dict(once or {})
        self._guessed = dict(seconds or {})
        self._done: dict[str, int] = {}
        self._spent: dict[str, float] = {}
        self._skipped: dict[str, int] = {}
        self._targets = 0.0
        self._last = time.perf_counter()
        made: Any = tqdm  # its stubs know no list as a postfix
        self._bar: Any = made(
            desc=title,
            unit=unit,
            disable=not shown,
            bar_format="{l_bar}{bar}| {postfix[0]} {unit}s [{elapsed}<{postfix[1]}]",
            postfix=["0", "?"],
        )

    def follow(self, targets: Iterable[Any], batches: Iterator[Batch]) -> Iterator[Batch]:
        """Pass on the batches made of targets, and learn the total from their sizes."""
        expected = length_of(targets)
        rows = 0
        for seen, batch in enumerate(batches, start=1):
            rows += len(batch)
            self._targets = float(rows)
            if expected is not None:
                self._targets = rows / seen * max(expected, seen)
                set_total(self._bar, round(self._targets))
            if seen == 1:  # preparations are over
                self._last = time.perf_counter()
            yield batch
        if rows:
            self._targets = float(rows)
            set_total(self._bar, rows)

    def advance(self, kind: str, count: int) -> None:
        """See :class:`Counts`; work of no pieces took time once, and does not recur."""
        now = time.perf_counter()
        self._spent[kind] = self._spent.get(kind, 0.0) + (now - self._last if count else 0.0)
        self._done[kind] = self._done.get(kind, 0) + count
        self._last = now
        self._show()

    def skip(self, kind: str, count: int) -> None:
        """See :class:`Counts`."""
        self._last = time.perf_counter()
        self._skipped[kind] = self._skipped.get(kind, 0) + count
        self._show()

    def close(self) -> None:
        """See :class:`Counts`."""
        self._bar.close()

    def _seconds(self, kind: str, total: float) -> float:
        """Seconds of a piece of a kind, as measured, at first as guessed."""
        done, spent = self._done.get(kind, 0), self._spent.get(kind, 0.0)
        guess = self._guessed.get(kind)
        weight = 0.0 if guess is None else _FIRST * total
        if not done + weight:
            return 0.0
        return (spent + weight * (guess or 0.0)) / (done + weight)

    def _show(self) -> None:
        if self._bar.disable:
            return
        done = left = 0.0
        known = True
        for kind in self._each.keys() | self._once.keys():
            total = self._targets * self._each.get(kind, 0) + self._once.get(kind, 0)
            finished = self._done.get(kind, 0)
            spent = self._spent.get(kind, 0.0)
            each = self._seconds(kind, total)
            missing = max(total - self._skipped.get(kind, 0) - finished, 0)
            done += spent
            left += each * missing
            known = known and (each > 0 or not missing)
        if not done + left and not known:
            return
        share = done / (done + left) if done + left else 1.0
        # Never back, though a guess was wrong.
        now = max(self._bar.n, share * self._targets)
        total = self._bar.total
        self._bar.postfix[0] = f"{now:,.0f}/{total:,}" if total else f"{now:,.0f}"
        self._bar.postfix[1] = tqdm.format_interval(left) if total else "?"
        self._bar.update(now - self._bar.n)
