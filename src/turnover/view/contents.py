"""The page's answers about a run, as JSON values: lists, one error, one training instance, an image.

Numbers are ``None`` where they are not finite or were not measured. Errors are identified by their
number among the run's errors, training instances by their row.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.data.base import Data
from turnover.errors import InputError
from turnover.io.parsing import finite_or_none
from turnover.results.calibration import NoiseFloor
from turnover.results.result import Result
from turnover.runs.run import Run
from turnover.runs.targets import read_targets
from turnover.tasks import explain
from turnover.tasks.explain import described, rows_by_id
from turnover.tasks.review import KEEP, REMOVE
from turnover.view import filters
from turnover.view.columns import open_columns, open_errors
from turnover.view.doubtful import Doubtful
from turnover.view.filters import ErrorFilter, InstanceFilter
from turnover.view.numbers import Ranked, by_gram, ends_of, measured

_EXCERPT = 320


class Contents:
    """Answers the page's questions about a run.

    Ids, noise floors and a few numbers for each row are in memory, pairs on disk.

    Args:
        run: a scored run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._rows, self._predicted, self._confidence = read_targets(run)
        if not len(self._rows):
            raise InputError(
                f"{run.folder} has no misclassified test rows: there is nothing to view"
            )
        self._errors = open_errors(run)
        if len(self._errors) != len(self._rows):
            raise InputError(
                f"{run.folder}/results: {len(self._errors)} targets were scored and {len(self._rows)} are "
                f"listed: run `turnover influence {run.folder}` again"
            )
        self._pairs = open_columns(run)
        self._floor = NoiseFloor(self._errors.part("ghost_mean"), self._errors.part("noise_floor"))
        self._gram = run.open_result("gram") if run.has_result("gram") else None
        # Columns are instances or groups; for a group its first row is shown.
        self._ids = self._errors.train_ids
        self._row_of = np.array(rows_by_id(self._ids, run.train), dtype=np.int64)
        column = {value: at for at, value in enumerate(self._ids.tolist())}
        self._column = np.array([column[value] for value in run.train.ids.tolist()], dtype=np.int64)
        self._overall = self._ranked("aggregate", 1)
        self._own = self._ranked("self", -1) if run.has_result("self") else None
        self._doubtful = Doubtful(run)
        names = ("significant", "smallest_q", "largest_z", "helped", "hurt")
        self._counts = {name: self._pairs.part(name) for name in names}

    def _ranked(self, name: str, sign: int) -> Ranked:
        result, folder = self._run.read_result(name), self._run.folder
        if not np.array_equal(np.sort(result.train_ids), np.sort(self._ids)):
            raise InputError(
                f"{folder}/results: errors and {name} are of other training instances: run "
                f"`turnover influence {folder}` again"
            )
        return Ranked(result, self._ids, sign)

    @property
    def self_influence(self) -> dict[int, tuple[float, float]]:
        """z and q of self-influence by instance id; empty where it was not estimated."""
        if self._own is None:
            return {}
        pairs = zip(self._own.z.tolist(), self._own.q.tolist(), strict=True)
        return dict(zip(self._ids.tolist(), pairs, strict=True))

    def about(self) -> dict[str, Any]:
        """Describe the run as a whole."""
        run = self._run
        return {
            "name": run.folder.resolve().name,
            "classes": run.train.classes,
            "images": run.train.image(0) is not None,
            "errors": len(self._rows),
            "training": len(run.train),
            "test": len(run.test),
            "gram": self._gram is not None,
            "significant_q": explain.SIGNIFICANT_Q,
            "not_significant": explain.NOT_SIGNIFICANT,
            "meanings": self._meanings(),
            "floor": "noise floor" if run.masks else "typical standard error",
            "keep": KEEP,
            "remove": REMOVE,
            "doubts": self._doubtful.about(),
            "undoubted": self._doubtful.refusal,
        }

    def _meanings(self) -> list[str]:
        if self._run.masks is None:
            return [explain.GRAM_MEANS]
        return [explain.TURNOVER_MEANS] + [explain.GRAM_MEANS] * (self._gram is not None)

    def errors(self, wanted: ErrorFilter) -> dict[str, Any]:
        """Count the errors that pass a filter, and list a page of them."""
        passes = (self._confidence >= wanted.low) & (self._confidence <= wanted.high)
        passes &= self._counts["smallest_q"] <= wanted.q
        true = np.array(self._run.test.labels)[self._rows]
        for name, labels in ((wanted.true, true), (wanted.predicted, self._predicted)):
            if name:
                passes &= labels == self._class(name)
        keys = {
            "significant": -self._counts["significant"],
            "z": -self._counts["largest_z"],
            "confidence": -self._confidence,
            "row": self._rows,
        }
        found = filters.containing(passes, wanted.words, lambda: self._error_words)
        return self._page(filters.ordered(found, wanted.sort, keys), wanted.start, self._error)

    def error(self, number: int, *, by: str, label: str, top: int) -> dict[str, Any]:
        """Describe an error with its training instances.

        Args:
            number: of the error.
            by: ranking, ``turnover`` or ``gram``.
            label: list training instances of this class only; empty: of all.
            top: instances on each side.
        """
        if not 0 <= number < len(self._rows):
            raise InputError(f"there are {len(self._rows)} errors, none is number {number}")
        result = self._errors.load([number])
        gram = self._gram_of_error(number)
        if by == "turnover":
            rows, scores = self._row_of, result.scores[0]
        elif by == "gram" and gram:
            rows = np.array(list(gram), dtype=np.int64)
            scores = np.array([one["score"] for one in gram.values()])
        else:
            raise InputError(f"unknown ranking {by!r}; there are turnover{', gram' * bool(gram)}")
        kept = np.arange(len(rows))
        if label:
            kept = np.flatnonzero(self._labels[rows] == self._class(label))
        sides, more = ends_of(scores, kept, top)
        listed = {
            side: [self._influential(result, int(rows[at]), gram, by) for at in ends]
            for side, ends in sides.items()
        }
        text = self._run.test.shown(int(self._rows[number]))
        return {**self._error(number), **listed, "text": text, "more": more}

    def instances(self, wanted: InstanceFilter, decisions: Mapping[int, str]) -> dict[str, Any]:
        """Count the training instances that pass a filter, and list a page of them."""
        passes = filters.decided(len(self._run.train), wanted.decision, decisions)
        if wanted.label:
            passes &= self._labels == self._class(wanted.label)
        counts, column = self._counts, self._column
        keys = {
            "harmful": self._overall.scores[column],
            "errors": -(counts["helped"] + counts["hurt"])[column],
            "row": np.arange(len(self._run.train)),
        }
        if self._own is not None:
            keys["self"] = -self._own.scores[column]
        if self._doubtful.order is not None:
            keys["doubt"] = self._doubtful.order
        found = filters.containing(passes, wanted.words, lambda: self._instance_words)
        return self._page(filters.ordered(found, wanted.sort, keys), wanted.start, self._instance)

    def instance(self, row: int, *, top: int) -> dict[str, Any]:
        """Describe a training instance with the ``top`` errors that it helps and hurts the most."""
        instance = self._instance(row)
        column = int(self._column[row])
        at = slice(column, column + 1)
        scores, q = (self._pairs.part(name, at)[0] for name in ("score", "q"))
        z = self._floor.standardize(scores[:, None])[:, 0]
        sides, more = ends_of(scores, np.arange(len(scores)), top)
        gram = self._gram_of_instance(row, [*sides["helpful"], *sides["harmful"]])
        listed = {
            side: [
                {**self._error(one), **measured(scores[one], z[one], q[one]), "gram": gram.get(one)}
                for one in ends
            ]
            for side, ends in sides.items()
        }
        return {
            **instance,
            **listed,
            "text": self._run.train.shown(row),
            "more": more,
            "overall": self._overall.at(column),
            "own": None if self._own is None else self._own.at(column),
        }

    def training_row(self, row: int) -> dict[str, Any]:
        """Describe a training row shortly."""
        rows = len(self._run.train)
        if not 0 <= row < rows:
            raise InputError(f"there are {rows} training rows, none is number {row}")
        key, label, text = described(self._run.train, row)
        group = self._run.train.groups[row]
        named = {"row": row, "key": key, "group": None if group == key else group}
        return {**named, "label": label, "text": text[:_EXCERPT]}

    def image(self, side: str, row: int) -> bytes:
        """Encode a training (``train``) or test (``test``) image as PNG, at its size."""
        data: Data | None = {"train": self._run.train, "test": self._run.test}.get(side)
        pixels = data.image(row) if data is not None and 0 <= row < len(data) else None
        if pixels is None:
            raise InputError(
                f"there is no image {row} of {side}: there are images of train and test"
            )
        from PIL import Image

        written = io.BytesIO()
        Image.fromarray(pixels).save(written, "PNG")
        return written.getvalue()

    def _page(
        self, found: NDArray[np.int64], start: int, item: Callable[[int], dict[str, Any]]
    ) -> dict[str, Any]:
        shown = found[start : start + filters.PAGE].tolist()
        return {"found": len(found), "items": list(map(item, shown))}

    def _error(self, number: int) -> dict[str, Any]:
        row = int(self._rows[number])
        key, true, text = described(self._run.test, row)
        return {
            "error": number,
            "row": row,
            "key": key,
            "text": text[:_EXCERPT],
            "true": true,
            "predicted": self._run.test.classes[self._predicted[number]],
            "confidence": finite_or_none(self._confidence[number]),
            "significant": int(self._counts["significant"][number]),
            "largest_z": finite_or_none(self._counts["largest_z"][number]),
            "noise_floor": finite_or_none(self._floor.sd[number]),
        }

    def _instance(self, row: int) -> dict[str, Any]:
        shortly, column = self.training_row(row), int(self._column[row])
        return {
            **shortly,
            "overall_score": finite_or_none(self._overall.scores[column]),
            "self_score": None if self._own is None else finite_or_none(self._own.scores[column]),
            "helped": int(self._counts["helped"][column]),
            "hurt": int(self._counts["hurt"][column]),
            **self._doubtful.of(row),
        }

    def _influential(
        self, result: Result, row: int, gram: Mapping[int, dict[str, float]], by: str
    ) -> dict[str, Any]:
        at = 0, int(self._column[row])
        numbers = measured(result.scores[at], result.z[at], result.q[at])
        found = {**self.training_row(row), **numbers, "gram": gram.get(row)}
        if by == "turnover" and self._run.train.grouped:
            # The row stands for its group, whose score this is; gram has scores of rows.
            return {**found, "key": self._run.train.groups[row], "group": None, "gram": None}
        return found

    def _gram_of_error(self, number: int) -> dict[int, dict[str, float]]:
        """Score and standard error of an error's extremes by gram, by training row."""
        if self._gram is None:
            return {}
        result = self._gram.load([number])
        return {int(row): by_gram(result, 0, rank) for rank, row in enumerate(result.train_ids[0])}

    def _gram_of_instance(self, row: int, errors: list[int]) -> dict[int, dict[str, float]]:
        """Score and standard error of a training row by gram, by those errors that list it."""
        if self._gram is None or not errors:
            return {}
        result = self._gram.load(errors)
        found = np.argwhere(result.train_ids == row).tolist()
        return {errors[at]: by_gram(result, at, rank) for at, rank in found}

    def _class(self, name: str) -> int:
        classes = self._run.train.classes
        if name not in classes:
            raise InputError(f"unknown class {name!r}; there are {', '.join(classes)}")
        return classes.index(name)

    @cached_property
    def _labels(self) -> NDArray[np.int64]:
        return np.array(self._run.train.labels)

    @cached_property
    def _error_words(self) -> list[str]:
        test, both = self._run.test, zip(self._rows.tolist(), self._predicted.tolist(), strict=True)
        found = ([*described(test, row), test.classes[predicted]] for row, predicted in both)
        return ["\n".join(words).lower() for words in found]

    @cached_property
    def _instance_words(self) -> list[str]:
        train = self._run.train
        return ["\n".join(described(train, row)).lower() for row in range(len(train))]
