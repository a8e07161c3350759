"""Data that a command reads, and what it says of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from turnover.cli.output import Output
from turnover.data.base import Columns, Data, read_both
from turnover.io.parsing import UTF8
from turnover.models.base import Config

_SHOWN = 10


@dataclass(frozen=True)
class Source:
    """Where training and test data come from.

    Attributes:
        test: test data, in the same formats; default: a fifth of the data is held out.
        text_column: column of the texts.
        image_column: column or array of the images.
        label_column: column or array of the classes.
        id_column: column of distinct instance ids; default: ids are made from the contents.
        group_column: column whose values name groups, such as source or annotator: the rows of a group
            share one mask.
        split: split of a Hugging Face data set.
        test_split: split for --test.
        encoding: encoding of CSV, TSV and JSON files, such as cp1252; Parquet has its own.
    """

    test: str | None = None
    text_column: str = "text"
    image_column: str = "image"
    label_column: str = "label"
    id_column: str | None = None
    group_column: str | None = None
    split: str = "train"
    test_split: str = "test"
    encoding: str = UTF8

    def columns(self, kind: str) -> Columns:
        """The columns of a kind of data."""
        given: str = getattr(self, f"{kind}_column")
        own = self.id_column, self.group_column
        return Columns(given, self.label_column, *own, encoding=self.encoding)

    def read(self, data: str, shape: Config) -> tuple[Any, Any]:
        """Read training and test data for a model."""
        columns = self.columns(shape.kind)
        return read_both(shape.reader(), data, self.test, columns, self.split, self.test_split)


def say_rows(output: Output, **parts: Data) -> None:
    """Print the rows read of each part, and the classes; warn of test rows that are trained on."""
    rows = " and ".join(f"{len(data)} {name}" for name, data in parts.items())
    classes = next(iter(parts.values())).classes
    more = ", ..." if len(classes) > _SHOWN else ""
    listed = ", ".join(map(repr, classes[:_SHOWN])) + more
    output.say(f"rows read: {rows}; {len(classes)} classes: {listed}", highlight=False)
    if {"training", "test"} <= parts.keys():
        trained, test = set(parts["training"].contents()), parts["test"]
        shared = [row for row, one in enumerate(test.contents()) if one in trained]
        if shared:
            output.warn(
                f"{len(shared)} of the {len(test)} test rows are also training rows, such as "
                f"{test.shown(shared[0])!r:.200}: accuracies and losses on the test data are too good"
            )
