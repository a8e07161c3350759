"""The progress bar: how many targets are done, and how long the rest will take.

A target takes work of several kinds, of which now one and now another takes the time: a backward pass,
linear pairs with ids, exact ones. Each kind is counted and timed for itself, and the bar shows the share
of the time.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tqdm.auto import tqdm

from turnover.batches import Batch
from turnover.batches.loaders import length_of

_FIRST = 0.05
"""Share of the work by which a guess counts: what runs first takes longer than what follows."""


def counting(title: str, total: int, unit: str, *, shown: bool) -> Any:
    """A bar of one kind of work, of which the whole is known."""
    return tqdm(desc=title, total=total, unit=f" {unit}", unit_scale=True, disable=not shown)


class Counts:
    """What work is reported to: here nobody listens."""

    def advance(self, kind: str, count: int) -> None:
        """So much more of a kind is done."""

    def skip(self, kind: str, count: int) -> None:
        """So much less of a kind is to do: it was done before."""

    def close(self) -> None:
        """Nothing more comes."""


class Progress(Counts):
    """Counts work; how much there is follows from the batches seen so far.

    Args:
        title: shown before the bar.
        each: work of each target by kind.
        once: work that does not grow with the targets, likewise.
        seconds: guesses of how long a piece of each kind takes, until some is done.
        unit: what a target is called.
        shown: whether anything is shown.
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
        """The batches made of targets; learns from their sizes how much there is to do."""
        expected = length_of(targets)
        rows = 0
        for seen, batch in enumerate(batches, start=1):
            rows += len(batch)
            self._targets = float(rows)
            if expected is not None:
                self._targets = rows / seen * max(expected, seen)
                self._bar.total = round(self._targets)
            if seen == 1:  # what comes before has been made ready
                self._last = time.perf_counter()
            yield batch
        if rows:
            self._targets = float(rows)
            self._bar.total = rows

    def advance(self, kind: str, count: int) -> None:
        """See :class:`Counts`; the time since the last report was spent on it, or on nothing that recurs."""
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
        """Seconds of a piece of a kind: as measured, and at first as guessed."""
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
        # Never back: a guess may have been wrong.
        now = max(self._bar.n, share * self._targets)
        total = self._bar.total
        self._bar.postfix[0] = f"{now:,.0f}/{total:,}" if total else f"{now:,.0f}"
        self._bar.postfix[1] = tqdm.format_interval(left) if total else "?"
        self._bar.update(now - self._bar.n)
