"""Images of a run: thumbnails for the report, and contact sheets of errors."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turnover.data.base import Data
from turnover.errors import InputError
from turnover.io.files import replacing
from turnover.tasks.explain import Explanation

_THUMBNAIL = 96
_CELL, _GAP, _LINE, _FONT = 112, 12, 16, 12
_HELPFUL, _HARMFUL, _QUIET, _INK = "#0b7075", "#a1430c", "#69707d", "#1c2330"


def thumbnails(data: Data, keys: Iterable[str]) -> dict[str, str]:
    """Images of rows by key, as ``data:`` links at most 96 pixels wide; of other data nothing."""
    if data.image(0) is None:
        return {}
    image_of, links = _images_by_key(data), {}
    row_of, group_of = (
        {name: row for row, name in enumerate(names)} for names in (data.keys, data.groups)
    )
    for key in dict.fromkeys(keys):
        if key in row_of and key in group_of and data.groups[row_of[key]] != key:
            continue  # the name of a row, and of a group that it is not of
        image = _pillow().fromarray(image_of(key))
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        written = io.BytesIO()
        image.save(written, "PNG", optimize=True)
        links[key] = f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
    return links


def _images_by_key(data: Data) -> Callable[[str], Any]:
    """Pixels by a group's name, of its first row, or by a row's key."""
    first = {key: row for row, key in enumerate(data.keys)}
    first |= {name: row for row, name in reversed(list(enumerate(data.groups)))}
    return lambda key: data.image(first[key])


def write_sheet(explanations: Sequence[Explanation], train: Data, targets: Data, out: Path) -> None:
    """Write a contact sheet (PNG), atomically: a line for each explanation, its target first.

    Next to the target are the most helpful and the most harmful training images with their labels,
    scores in nats, and z; scores that are not significant are gray.
    """
    check_sheet(out, train)
    if not explanations:
        raise InputError("there is nothing to put on a contact sheet")
    from PIL import ImageDraw, ImageFont

    each = max(max(len(e.helpful), len(e.harmful)) for e in explanations)
    columns = 1 + 2 * each
    width = _GAP + columns * (_CELL + _GAP) + 2 * _GAP
    height = 2 * _GAP + _LINE + len(explanations) * (_CELL + 3 * _LINE + _GAP)
    sheet = _pillow().new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT)
    train_image, target_image = _images_by_key(train), _images_by_key(targets)

    def left(column: int) -> int:
        # Wider gaps separate target, helpful and harmful.
        return _GAP + column * (_CELL + _GAP) + _GAP * ((column > 0) + (column > each))

    def cell(column: int, top: int, image: NDArray[np.uint8], lines: list[tuple[str, str]]) -> None:
        shown = _pillow().fromarray(image).resize((_CELL, _CELL), _pillow().Resampling.NEAREST)
        sheet.paste(shown, (left(column), top))
        for number, (text, colour) in enumerate(lines):
            at = (left(column), top + _CELL + 2 + number * _LINE)
            draw.text(at, _fitting(text, draw, font), colour, font)

    for column, title in ((0, "target"), (1, "helpful"), (1 + each, "harmful")):
        draw.text((left(column), _GAP // 2), title, _INK, font)
    for number, one in enumerate(explanations):
        top = _GAP + _LINE + number * (_CELL + 3 * _LINE + _GAP)
        said = [
            (one.true_label, _INK),
            (f"as {one.predicted_label} {one.confidence:.0%}", _HARMFUL),
        ]
        cell(0, top, target_image(one.key), said)
        for first, side, colour in ((1, one.helpful, _HELPFUL), (1 + each, one.harmful, _HARMFUL)):
            for place, item in enumerate(side):
                tint = colour if item.significant else _QUIET
                lines = [(item.label, _INK), (f"{item.score:+.2f}  z {item.z:+.1f}", tint)]
                cell(first + place, top, train_image(item.key), lines)
    with replacing(out) as draft:
        sheet.save(draft, "PNG")


def check_sheet(out: Path, data: Data) -> None:
    """Refuse data without images, another ending than ``.png``, and a folder that does not exist."""
    if data.image(0) is None:
        raise InputError("--sheet is for images; the report shows texts (turnover report)")
    if out.suffix != ".png":
        raise InputError(f"{out}: a contact sheet is a .png file")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} does not exist: make the folder first")


def _fitting(text: str, draw: Any, font: Any) -> str:
    if draw.textlength(text, font) <= _CELL:
        return text
    while text and draw.textlength(f"{text}…", font) > _CELL:
        text = text[:-1]
    return f"{text}…"


def _pillow() -> Any:
    from PIL import Image

    return Image
