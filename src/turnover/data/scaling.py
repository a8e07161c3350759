"""Images of more than 8 bits to 8 bits, so that those of one set, and of its test set, can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from turnover.data.decoding import FLOATS, INTEGERS, Picture, load_pillow
from turnover.errors import InputError
from turnover.io.parsing import field

Ranges = Mapping[str, tuple[float, float]]
"""By kind (``"integers"``, ``"floats"``): the numbers that are black and white."""
_ROWS = 256
"""Rows of an image that are scaled at once: double precision takes eight times the memory."""
_DIM = 63
_BITS = (8, 10, 12, 14, 16)
_FULL = {INTEGERS: [float(2**bits - 1) for bits in _BITS], FLOATS: [1.0, 255.0]}


class Scaling:
    """Finds one range for the numbers of a set of images, and what has to be said of the set.

    Integers up to 8, 10, 12, 14 or 16 bits and floats up to 1 or 255 are scaled from 0 to that end: the
    first that holds all of the set. Others are scaled from their least to their greatest.

    Args:
        given: ranges that are known already, of the training images.
    """

    def __init__(self, given: Ranges) -> None:
        self._given = given
        self._ranges = dict(given)
        self._found: dict[str, tuple[float, float]] = {}
        self._counts: Counter[str] = Counter()
        self._brightest = 0

    def add(self, picture: Picture) -> bool:
        """Note an image; whether it is 8 bits already."""
        self._counts["several"] += picture.several
        self._counts["unprofiled"] += picture.unprofiled
        kind = picture.kind
        if picture.deep:
            self._counts["deep"] += 1
            self._brightest = max(
                self._brightest, *(high for _, high in picture.image.getextrema())
            )
        if kind is None:
            return True
        low, high = self._found.get(kind, (picture.low, picture.high))
        self._found[kind] = (min(low, picture.low), max(high, picture.high))
        self._counts[kind] += 1
        if kind in self._given:
            start, end = self._given[kind]
            self._counts[f"{kind} beyond"] += picture.low < start or picture.high > end
        return False

    def choose(self) -> Ranges:
        """The ranges, when all images were noted."""
        for kind, (low, high) in self._found.items():
            ends = [end for end in _FULL[kind] if low >= 0 and high <= end]
            self._ranges.setdefault(kind, (0.0, ends[0]) if ends else (low, high))
        return self._ranges

    def apply(self, picture: Picture) -> Any:
        """An image of numbers as RGB; what is beyond the range is cut."""
        assert picture.kind is not None
        low, high = self._ranges[picture.kind]
        values = np.asarray(picture.image)
        grey = np.empty(values.shape, dtype=np.uint8)
        for start in range(0, len(values), _ROWS):
            rows = slice(start, start + _ROWS)
            share = (values[rows].astype(np.float64) - low) / ((high - low) or 1.0)
            grey[rows] = np.rint(share.clip(0, 1) * 255)
        if picture.inverted:
            np.subtract(255, grey, out=grey)
        if picture.transparent is not None:
            grey[values == picture.transparent] = 255
        return load_pillow().fromarray(grey).convert("RGB")

    def lines(self) -> Iterator[str]:
        """What has to be said of the set, with the number of images."""
        for kind, (low, high) in self._found.items():
            start, end = self._ranges[kind]
            beyond = self._counts[f"{kind} beyond"]
            if beyond:
                yield (
                    f"{_images(beyond)} with {kind} beyond those of the training images, and cut: "
                    f"{low:.6g} to {high:.6g} where {start:.6g} is black and {end:.6g} white"
                )
            elif kind not in self._given:
                extremes = (
                    "" if end in _FULL[kind] and start == 0 else " (their least and greatest)"
                )
                yield (
                    f"{_images(self._counts[kind])} with {kind} from {low:.6g} to {high:.6g}, scaled: "
                    f"{start:.6g} is black and {end:.6g} white{extremes}"
                )
        if self._counts["deep"] and self._brightest <= _DIM:
            yield (
                f"{_images(self._counts['deep'])} of 16 bits a color are dark: of 256 values that are read, "
                f"0 to {self._brightest} are used; multiply them to the whole range"
            )
        if self._counts["several"]:
            yield f"{_images(self._counts['several'])} with several frames or pages; the first is read"
        if self._counts["unprofiled"]:
            yield (
                f"{_images(self._counts['unprofiled'])} in CMYK with a color profile that cannot be used; "
                f"converted without it"
            )


def check_ranges(given: Ranges, training: Ranges) -> None:
    """Whether images can be compared with the training images.

    Raises:
        InputError: their numbers were scaled by another range.
    """
    for kind, ends in training.items():
        other = given.get(kind, ends)
        if other != ends:
            raise InputError(
                f"the {kind} of these images were scaled from {other}, and those of the training images "
                f"from {ends}: read them by read_images(..., ranges=training.ranges)"
            )


def saved_ranges(shape: Mapping[str, Any], where: Path) -> Ranges:
    """Ranges in a run's description; none in one that was written before there were any.

    Raises:
        InputError: something else.
    """
    found = {}
    for kind, ends in field({"ranges": {}, **shape}, "ranges", dict, where).items():
        known = kind in _FULL and isinstance(ends, list) and len(ends) == 2
        if not known or not all(type(end) in (int, float) and isfinite(end) for end in ends):
            raise InputError(f"{where}: damaged, no range of numbers: {kind!r}: {ends!r}")
        found[kind] = (float(ends[0]), float(ends[1]))
    return found


def colors(shape: Mapping[str, Any], name: str, where: Path) -> tuple[float, ...]:
    """Three numbers, one for each color."""
    values = field(shape, name, list, where)
    if len(values) != 3 or not all(type(one) in (int, float) for one in values):
        raise InputError(f"{where}: damaged, {name!r} must be three numbers, got {values}")
    least = 0.0 if name == "mean" else 1e-6
    if not all(least <= one <= 1 for one in values):
        raise InputError(f"{where}: damaged, {name!r} cannot be {values}")
    return tuple(map(float, values))


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"
