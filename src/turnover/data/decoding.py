"""Bytes of image files to images as a person sees them: upright, over white, 8 bits a color."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from turnover.errors import InputError, needing

ENDINGS = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".webp", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff", ".jp2", ".j2k"),
)
FORMATS = ("PNG", "JPEG", "MPO", "BMP", "DIB", "GIF", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000")
"""Of Pillow's. It passes others (EPS) to other programs."""
LARGEST = 2**26
"""Pixels of an image: a small file can hold more than a machine has memory for."""
INTEGERS, FLOATS = "integers", "floats"
_ORIENTATION, _PHOTOMETRIC, _WHITE_IS_ZERO = 0x0112, 0x0106, 0


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    Attributes:
        image: Pillow's, upright: RGB, or one channel of numbers that need a range.
        kind: ``"integers"`` or ``"floats"`` of more than 8 bits, ``None`` for RGB.
        low: smallest number.
        high: largest number.
        inverted: the smallest number is white.
        transparent: the number that is shown as white.
        several: the file holds more images; this is the first.
        unprofiled: its color profile cannot be used.
        deep: it has 16 bits a color, of which Pillow gives the upper 8.
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


def opened(raw: bytes, where: str) -> Picture:
    """Decode the bytes of a file.

    Raises:
        InputError: not an image, too many pixels, or NaN among its numbers.
    """
    pillow = load_pillow()
    pillow.init()
    known = [one for one in FORMATS if one in pillow.OPEN]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused below, or does no harm
            image = pillow.open(io.BytesIO(raw), formats=known)
            if image.width * image.height > LARGEST:
                raise InputError(
                    f"{where}: {image.width} x {image.height} pixels, more than {LARGEST}: make it smaller"
                )
            deep = any(";16" in str(part.args) for part in image.tile)  # before it is decoded
            image.load()
            seen = _seen(image, where)
            return replace(seen, deep=deep and seen.kind is None)
    except InputError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        unknown = isinstance(error, pillow.UnidentifiedImageError)
        why = f"none of {', '.join(known)}" if unknown else error
        raise InputError(f"{where}: not an image that can be read: {why}") from error


def _seen(image: Any, where: str) -> Picture:
    upright, several = _upright(image), _has_several(image)
    if upright.mode == "F" or upright.mode.startswith("I"):
        return _numbers(image, upright, several, where)
    if upright.has_transparency_data:
        layer = upright.convert("RGBA")
        white = load_pillow().new("RGB", layer.size, "white")
        white.paste(layer.convert("RGB"), mask=layer.getchannel("A"))
        return Picture(white, several=several)
    if upright.mode == "CMYK" and image.info.get("icc_profile"):
        converted = _profiled(upright, image.info["icc_profile"])
        if converted is None:
            return Picture(upright.convert("RGB"), several=several, unprofiled=True)
        return Picture(converted, several=several)
    return Picture(upright.convert("RGB"), several=several)


def _numbers(image: Any, upright: Any, several: bool, where: str) -> Picture:
    values = np.asarray(upright)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():  # a NaN anywhere is the smallest and the largest
        raise InputError(f"{where}: holds NaN or infinite numbers; put numbers in their place")
    tags = getattr(image, "tag_v2", {})
    transparent = image.info.get("transparency")
    return Picture(
        upright,
        FLOATS if upright.mode == "F" else INTEGERS,
        low,
        high,
        inverted=tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO,
        transparent=transparent if isinstance(transparent, int) else None,
        several=several,
    )


def _upright(image: Any) -> Any:
    """As viewers turn it. Pillow's own function also writes EXIF anew, which fails where it is damaged."""
    turn = load_pillow().Transpose
    turns = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM}
    turns |= {5: turn.TRANSPOSE, 6: turn.ROTATE_270, 7: turn.TRANSVERSE, 8: turn.ROTATE_90}
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # noqa: BLE001 - damaged EXIF, which viewers ignore
        return image
    return image.transpose(turns[orientation]) if orientation in turns else image


def _has_several(image: Any) -> bool:
    if image.format == "MPO":  # previews and depth of one photo
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # noqa: BLE001 - the first one could be read
        return False


def _profiled(image: Any, profile: bytes) -> Any:
    """CMYK by its own color profile; ``None`` where it is damaged or of something else."""
    try:
        from PIL import ImageCms

        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        screen = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, given, screen, outputMode="RGB")
    except Exception:  # noqa: BLE001 - an import error without LittleCMS, and many kinds from within it
        return None


def load_pillow() -> Any:
    """``PIL.Image``.

    Raises:
        InputError: it is not installed.
    """
    with needing("reading images", "turnover[images]"):
        from PIL import Image
    return Image
