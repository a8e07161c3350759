"""Scale images of more than 8 bits to 8 bits so that a set, and its test set, can be compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from turnover.data.decoding import FLOATS, INTEGERS, Picture, load_pillow
from turnover.errors import InputError

Ranges = Mapping[str, tuple[float, float]]
"""The numbers that become black and white, by kind (``"integers"``, ``"floats"``)."""
_ROWS = 256
"""Rows of an image scaled at once: double precision takes eight times the memory."""
_DIM = 63
_BITS = (8, 10, 12, 14, 16)
_FULL = {INTEGERS: [float(2**bits - 1) for bits in _BITS], FLOATS: [1.0, 255.0]}


class Scaling:
    """Finds one range for the numbers of a set of images, and collects warnings about the set.

    Integers up to 8, 10, 12, 14 or 16 bits and floats up to 1 or 255 are scaled from 0 to that end: the
    first that holds the whole set. Others are scaled from their least to their greatest.

    Args:
        given: ranges of the training images, if they are known.
    """

    def __init__(self, given: Ranges) -> None:
        self._given = given
        self._ranges = dict(given)
        self._found: dict[str, tuple[float, float]] = {}
        self._counts: Counter[str] = Counter()
        self._brightest = 0

    def add(self, picture: Picture) -> bool:
        """Count an image; returns whether it has 8 bits already."""
        self._counts["several"] += picture.several
        self._counts["unprofiled"] += picture.unprofiled
        kind = picture.kind
        if picture.deep:
            self._counts["deep"] += 1
            brightest = (high for _, high in picture.image.getextrema())
            self._brightest = max(self._brightest, *brightest)
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
        """Ranges of the set, once all images were added."""
        for kind, (low, high) in self._found.items():
            ends = [end for end in _FULL[kind] if low >= 0 and high <= end]
            self._ranges.setdefault(kind, (0.0, ends[0]) if ends else (low, high))
        return self._ranges

    def apply(self, picture: Picture) -> Any:
        """Scale an image of numbers to RGB; numbers beyond the range are cut."""
        assert picture.kind is not None
        low, high = self._ranges[picture.kind]
        values = np.asarray(picture.image)
        gray = np.empty(values.shape, dtype=np.uint8)
        for start in range(0, len(values), _ROWS):
            rows = slice(start, start + _ROWS)
            share = (values[rows].astype(np.float64) - low) / ((high - low) or 1.0)
            gray[rows] = np.rint(share.clip(0, 1) * 255)
        if picture.inverted:
            np.subtract(255, gray, out=gray)
        if picture.transparent is not None:
            gray[values == picture.transparent] = 255
        return load_pillow().fromarray(gray).convert("RGB")

    def lines(self) -> Iterator[str]:
        """Warnings about the set, with the number of images."""
        for kind, (low, high) in self._found.items():
            start, end = self._ranges[kind]
            if self._counts[f"{kind} beyond"]:
                yield (
                    f"{self._images(f'{kind} beyond')} with {kind} beyond those of the training images, and "
                    f"cut: {low:.6g} to {high:.6g} where {start:.6g} is black and {end:.6g} white"
                )
            elif kind not in self._given:
                full = end in _FULL[kind] and start == 0
                extremes = "" if full else " (their least and greatest)"
                yield (
                    f"{self._images(kind)} with {kind} from {low:.6g} to {high:.6g}, scaled: "
                    f"{start:.6g} is black and {end:.6g} white{extremes}"
                )
        if self._counts["deep"] and self._brightest <= _DIM:
            yield (
                f"{self._images('deep')} of 16 bits a color are dark: of 256 values that are read, 0 to "
                f"{self._brightest} are used; multiply them to the whole range"
            )
        if self._counts["several"]:
            yield f"{self._images('several')} with several frames or pages; the first is read"
        if self._counts["unprofiled"]:
            yield (
                f"{self._images('unprofiled')} in CMYK with a color profile that cannot be used; "
                f"converted without it"
            )

    def _images(self, what: str) -> str:
        count = self._counts[what]
        return f"{count} image{'' if count == 1 else 's'}"


def check_ranges(given: Ranges, training: Ranges) -> None:
    """Refuse images whose numbers were scaled by another range than those of the training images."""
    for kind, ends in training.items():
        other = given.get(kind, ends)
        if other != ends:
            raise InputError(
                f"the {kind} of these images were scaled from {other}, and those of the training images "
                f"from {ends}: read them by read_images(..., ranges=training.ranges)"
            )
