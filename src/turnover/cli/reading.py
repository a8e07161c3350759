"""What a command says of the data it reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from turnover.cli.output import Output

if TYPE_CHECKING:
    from turnover.data.base import Data

_SHOWN = 10


@contextmanager
def reading(output: Output) -> Iterator[None]:
    """The body reads data; what it warns of is said in a line each."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for one in found:
                if issubclass(one.category, UserWarning):
                    output.say(str(one.message), style="yellow", highlight=False)


def say_rows(output: Output, **parts: Data) -> None:
    """How many rows were read of each part, and the classes."""
    rows = " and ".join(f"{len(data)} {name}" for name, data in parts.items())
    classes = next(iter(parts.values())).classes
    more = ", ..." if len(classes) > _SHOWN else ""
    listed = ", ".join(map(repr, classes[:_SHOWN])) + more
    output.say(f"rows read: {rows}; {len(classes)} classes: {listed}", highlight=False)
    if {"training", "test"} <= parts.keys():
        _say_shared(output, parts["training"], parts["test"])


def _say_shared(output: Output, training: Data, test: Data) -> None:
    """Test rows that were trained on say nothing of rows that were not."""
    there = set(training.contents())
    shared = [row for row, one in enumerate(test.contents()) if one in there]
    if shared:
        output.say(
            f"{len(shared)} of the {len(test)} test rows are also training rows, such as "
            f"{test.shown(shared[0])!r:.200}: accuracies and losses on the test data are too good",
            style="yellow",
            highlight=False,
        )
