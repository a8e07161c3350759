"""Decode image files as a person sees them: upright, over white, 8 bits a color.

Numbers of more than 8 bits are scaled so that images of a set, and of its test set, can be compared.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from turnover.errors import InputError, needing

ENDINGS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".jp2", ".j2k"),
)
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000")
"""Pillow's formats that are decoded; it passes some others (EPS) to other programs."""
LARGEST = 2**26
"""Most pixels of an image: a small file can hold more than fits into memory."""
INTEGERS, FLOATS = "integers", "floats"
Ranges = Mapping[str, tuple[float, float]]
"""The numbers that become black and white, by kind (``"integers"``, ``"floats"``)."""
_ROWS = 256
"""Rows of an image scaled at once: double precision takes eight times the memory."""
_DIM = 63
_BITS = (8, 10, 12, 14, 16)
_FULL = {INTEGERS: [float(2**bits - 1) for bits in _BITS], FLOATS: [1.0, 255.0]}
_log = logging.getLogger(__name__)
_ORIENTATION, _PHOTOMETRIC, _WHITE_IS_ZERO = 0x0112, 0x0106, 0


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    Attributes:
        image: upright Pillow image: RGB, or one channel of numbers that need a range.
        kind: ``"integers"`` or ``"floats"`` of more than 8 bits, ``None`` for RGB.
        low: smallest number.
        high: largest number.
        inverted: the smallest number is white.
        transparent: number shown as white.
        several: the file holds more images; this is the first.
        unprofiled: the color profile cannot be used.
        deep: the file has 16 bits a color, of which Pillow returns the upper 8.
    """

    image: Any
    kind: str | None = None
    low: float = 0.0
    high: float = 0.0
    inverted: bool = False
    transparent: int | None = None
    several: bool = False
    unprofiled: bool = False
    deep: bool = False


def decode(raw: bytes, where: str) -> Picture:
    """Decode the bytes of an image file; refuse other files, too many pixels, and NaN."""
    pillow = load_pillow()
    pillow.init()
    known = [one for one in FORMATS if one in pillow.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is refused below, or harmless
            image = pillow.open(io.BytesIO(raw), formats=known)
            if image.width * image.height > LARGEST:
                raise InputError(
                    f"{where}: {image.width} x {image.height} pixels, more than {LARGEST}: make it smaller"
                )
            deep = any(";16" in str(part.args) for part in image.tile)  # before it is decoded
            image.load()
            picture = replace(_converted(image, where), several=_has_several(image))
            return replace(picture, deep=deep and picture.kind is None)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        unknown = isinstance(error, pillow.UnidentifiedImageError)
        why = f"none of {', '.join(known)}" if unknown else error
        raise InputError(f"{where}: not an image that can be read: {why}") from error


def _converted(image: Any, where: str) -> Picture:
    upright = _upright(image)
    if upright.mode == "F" or upright.mode.startswith("I"):
        return _numbers(image, upright, where)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        white = load_pillow().new("RGB", layer.size, "white")
        white.paste(layer.convert("RGB"), mask=layer.getchannel("A"))
        return Picture(white)
    profile = image.info.get("icc_profile") if upright.mode == "CMYK" else None
    profiled = _profiled(upright, profile) if profile else None
    if profiled is not None:
        return Picture(profiled)
    return Picture(upright.convert("RGB"), unprofiled=bool(profile))


def _numbers(image: Any, upright: Any, where: str) -> Picture:
    values = np.asarray(upright)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():  # a NaN anywhere is the smallest and the largest
        raise InputError(f"{where}: holds NaN or infinite numbers; replace them")
    tags = getattr(image, "tag_v2", {})
    transparent = image.info.get("transparency")
    return Picture(
        upright,
        FLOATS if upright.mode == "F" else INTEGERS,
        low,
        high,
        inverted=tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO,
        transparent=transparent if isinstance(transparent, int) else None,
    )


def _upright(image: Any) -> Any:
    """Turn an image as viewers do; ``ImageOps.exif_transpose`` fails on damaged EXIF, which it rewrites."""
    turn = load_pillow().Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM}
    turns |= {5: turn.TRANSPOSE, 6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - damaged EXIF, which viewers ignore
        _log.debug("EXIF is damaged, so the image is not turned", exc_info=True)
        return image
    return image.transpose(turns[orientation]) if orientation in turns else image


def _has_several(image: Any) -> bool:
    if image.format == "MPO":  # previews and depth of one photo
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # noqa: BLE001 - the first one was decoded
        _log.debug("frames cannot be counted", exc_info=True)
        return False


def _profiled(image: Any, profile: bytes) -> Any:
    """Convert CMYK by its color profile; ``None`` if the profile is damaged or of another kind."""
    try:
        from PIL import ImageCms

        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        screen = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, given, screen, outputMode="RGB")
    except Exception:  # noqa: BLE001 - without LittleCMS, or an error from within it
        _log.debug("the color profile cannot be used", exc_info=True)
        return None


def load_pillow() -> Any:
    """Import ``PIL.Image``, or refuse with what to install."""
    with needing("reading images", "turnover[images]"):
        from PIL import Image
    return Image


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
