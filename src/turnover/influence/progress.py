"""The progress bar: how many pairs are scored, and how long the rest will take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm

from turnover.batches import Batch
from turnover.loaders import length_of


class Progress:
    """Counts pairs of a target and an id; the total follows from the batches seen so far.

    Args:
        title: shown before the bar.
        pairs: pairs of each target.
        shown: whether anything is shown.
    """

    def __init__(self, title: str, pairs: int, *, shown: bool) -> None:
        self._pairs = pairs
        self._bar: Any = tqdm(desc=title, unit="pair", unit_scale=True, disable=not shown)

    def follow(self, targets: Iterable[Any], batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches made of targets; learns from their sizes how much there is to do."""
        expected = length_of(targets)
        rows = 0
        for seen, batch in enumerate(batches, start=1):
            rows += len(batch)
            if expected is not None:
                self._bar.total = round(rows / seen * expected * self._pairs)
            yield batch

    def advance(self, pairs: int) -> None:
        """So many pairs more are scored."""
        self._bar.update(pairs)

    def close(self) -> None:
        """The bar is done with."""
        self._bar.close()
