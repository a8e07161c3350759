"""Labeled images: read from folders, arrays or Hugging Face data sets, checked, and encoded as pixels.

Every image is brought to one square size; nothing is repaired or dropped silently.
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from turnover.batches import Batch
from turnover.data.base import Columns, Data, Provenance, Row, check_writable
from turnover.data.classes import indexed
from turnover.data.decoding import LARGEST, Ranges, Scaling, decode, load_pillow
from turnover.data.encoded import Encoded
from turnover.data.image_sources import find_images, read_bytes
from turnover.errors import InputError
from turnover.ids import content_ids
from turnover.io.bars import tqdm
from turnover.io.files import mapped, replacing, write_array, writing_temporary

COLUMNS = Columns("image", "label")
Framing = Callable[[Any, str], NDArray[np.uint8]]
"""Makes uint8 (size, size, 3) of an RGB Pillow image, whose name is given for messages."""
_MANY = 1000
_SHIFT = 8
"""An augmented image is shifted by at most an eighth of its side."""


@dataclass(frozen=True)
class ImageData(Data):
    """Labeled images of one size.

    Attributes:
        pixels: uint8 (images, size, size, 3), in memory or on disk.
        rows: index of each row's image, so that selecting rows copies no pixels.
        names: of the images: a file's path in its folder, or a row number.
        labels: class index of each row, into ``classes``.
        ids: int64 (rows,); equal ids form a group.
        keys: the user's name for each row: its id, or its name.
        classes: class names, sorted.
        ranges: numbers that became 0 and 255, for images of more than 8 bits, by kind (``"integers"``,
            ``"floats"``).
        groups: name of each row's group; by default its key.
        provenance: where the images were read from; ``None``: made in memory, or read from a run.
    """

    kind: ClassVar[str] = "image"
    pixels: NDArray[np.uint8]
    rows: list[int]
    names: list[str]
    labels: list[int]
    ids: Tensor
    keys: list[str]
    classes: list[str]
    ranges: Ranges = field(default_factory=dict)
    groups: list[str] = field(default_factory=list, kw_only=True)
    provenance: Provenance | None = field(default=None, kw_only=True)

    _per_row: ClassVar[tuple[str, ...]] = ("rows", "names", "labels", "keys", "groups")

    def __post_init__(self) -> None:
        # The only way to set a field of a frozen dataclass.
        object.__setattr__(self, "groups", self.groups or self.keys)

    def shown(self, row: int) -> str:
        """Name of a row's image."""
        return self.names[row]

    def image(self, row: int) -> NDArray[np.uint8]:
        """uint8 (size, size, 3)."""
        return np.asarray(self.pixels[self.rows[row]])

    def contents(self) -> list[str]:
        """Digests of the pixels."""
        return [hashlib.sha256(self.pixels[row]).hexdigest() for row in self.rows]

    def export(self, out: Path) -> None:
        """Write images, keys and labels as ``.npz``, or keys, names and labels as a table, atomically."""
        if out.suffix != ".npz":
            super().export(out)
            return
        check_writable(out, ".npz")
        columns = {name: np.array(values) for name, values in self.table().items()}
        with replacing(out) as draft:
            write_arrays(draft, columns | {"image": self.pixels[self.rows]})

    def save(self, folder: Path, name: str) -> None:
        """Write the rows as JSON lines, and the pixels beside them."""
        super().save(folder, name)
        shape = (len(self), *self.pixels.shape[1:])
        starts = range(0, len(self), _MANY)
        parts = (self.pixels[self.rows[start : start + _MANY]] for start in starts)
        write_array(folder / f"{name}.npy", shape, np.uint8, parts)


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an ``.npz`` file, compressed and the same bytes every time."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, values in arrays.items():
            # Without the time; zip files refuse times before 1980.
            entry = zipfile.ZipInfo(f"{name}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with file.open(entry, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)


@dataclass(frozen=True)
class ImageRow(Row):
    """A row of a run's images; ``image`` is its name."""

    image: str


@dataclass(frozen=True)
class Pixels(Encoded):
    """Images of one size, standardized batch by batch.

    Attributes:
        pixels: uint8 (images, size, size, 3), in memory or on disk.
        rows: index of each row's image.
        labels: class index of each row.
        ids: int64 (rows,).
        mean: of the training images' red, green and blue values in [0, 1].
        deviation: their standard deviation.
        augment: shift and mirror the images in training.
    """

    pixels: NDArray[np.uint8]
    rows: list[int]
    labels: list[int]
    ids: Tensor
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    augment: bool

    def batch(self, rows: Sequence[int]) -> Batch:
        """Some rows, standardized: float32 (rows, 3, size, size)."""
        images = [self.pixels[self.rows[row]] for row in rows]
        labels = torch.tensor([self.labels[row] for row in rows])
        inputs = standardized(images, self.mean, self.deviation)
        return Batch(inputs, labels, self.ids[list(rows)])

    def training_batch(self, rows: Sequence[int], generator: torch.Generator) -> Batch:
        """Some rows, each shifted and every second one mirrored; their ids, and so masks, stay."""
        batch = self.batch(rows)
        if not self.augment:
            return batch
        images: Tensor = batch.inputs
        count, _, size, _ = images.shape
        reach = max(1, size // _SHIFT)
        padded = functional.pad(images, (reach, reach, reach, reach), mode="reflect")
        down, right = torch.randint(2 * reach + 1, (2, count, 1), generator=generator)
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        steps = torch.arange(size)
        columns = right + torch.where(mirrored, steps.flip(0), steps)
        at = torch.arange(count)[:, None, None]
        moved = padded.permute(0, 2, 3, 1)[at, (down + steps)[:, :, None], columns[:, None, :]]
        return Batch(moved.permute(0, 3, 1, 2).contiguous(), batch.labels, batch.ids)

    def described(self) -> str:
        """Labels, ids (which depend on the images' contents), and preparation."""
        return repr([self.labels, self.ids.tolist(), self.mean, self.deviation, self.augment])


def standardized(
    images: Sequence[NDArray[np.uint8]], mean: Sequence[float], deviation: Sequence[float]
) -> Tensor:
    """Bring colors to [0, 1], subtract a mean and divide by a deviation.

    Args:
        images: uint8 (height, width, 3) each.
        mean: of red, green and blue.
        deviation: likewise.

    Returns:
        float32 (images, 3, height, width).
    """
    values = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    center, scale = (
        torch.tensor(one, dtype=torch.float32)[:, None, None] for one in (mean, deviation)
    )
    return (values - center) / scale


class ImageReader:
    """Reads sets of images that can be compared: numbers of more than 8 bits are scaled as in the first set.

    Args:
        size: height and width of the network's images.
        ranges: of the first set, if it was read before.
        framing: as for :func:`read_images`.
    """

    def __init__(
        self, size: int, ranges: Ranges | None = None, framing: Framing | None = None
    ) -> None:
        self._size = size
        self._ranges = ranges or {}
        self._framing = framing

    def __call__(self, source: str, columns: Columns = COLUMNS, **options: Any) -> ImageData:
        """As :func:`read_images`."""
        options |= {"ranges": self._ranges, "framing": self._framing}
        data = read_images(source, self._size, columns, **options)
        self._ranges = data.ranges
        return data


def read_images(
    source: str,
    size: int,
    columns: Columns = COLUMNS,
    *,
    classes: Sequence[str] | None = None,
    split: str = "train",
    ids_needed: bool = True,
    ranges: Ranges | None = None,
    framing: Framing | None = None,
) -> ImageData:
    """Read labeled images.

    Images are turned upright as their EXIF says, and transparent ones are laid over white. The shorter
    side is brought to ``size``, and the middle is taken. Numbers of more than 8 bits are scaled to 8 bits,
    by one range for the whole set.

    Args:
        source: a folder with one folder of images for each class; an ``.npz`` file with arrays
            ``image`` (uint8 (images, height, width) or (images, height, width, 3)) and ``label``; or a
            Parquet file or Hugging Face data set with a column of images.
        size: height and width of the network's images.
        columns: arrays or columns to read; a folder has none.
        classes: classes of the training data, to refuse others; ``None`` takes them from the labels.
        split: split of a Hugging Face data set.
        ids_needed: require the id or group column.
        ranges: those of the training images, for test images that are compared with them.
        framing: makes pixels of an image, in place of resizing its shorter side and taking the middle.

    Warns:
        UserWarning: files that are left out, images of numbers that were scaled, of several pages, or
            with a color profile that cannot be used; with their number.

    Raises:
        InputError: no such file or folder, no images, an image that cannot be read (it is named), a
            missing array or column, arrays that do not fit, duplicate ids, an unknown label, a class
            without an image, or fewer than two classes.
    """
    found = find_images(source, columns, classes, split, ids_needed=ids_needed)
    labels, known = indexed(found.labels, classes, source, found.where)
    count, scaling = len(labels), Scaling(ranges or {})
    framing = framing or partial(_square, size=size)
    # On disk, as the images may not fit into memory; the file is deleted with the array.
    with writing_temporary() as place, tempfile.TemporaryFile(dir=place) as file:
        pixels = mapped(file, (count, size, size, 3), np.uint8)
    contents, waiting = [], []
    for row in tqdm(range(count), "reading images", unit="image", disable=count < _MANY):
        raw, picture = found.read(row)
        contents.append(f"{hashlib.sha256(raw).hexdigest()}\0{found.labels[row]}")
        if scaling.add(picture):
            pixels[row] = framing(picture.image, f"{source}: {found.names[row]}")
        else:  # its range is that of the whole set
            waiting.append(row)
    chosen = scaling.choose()
    for row in waiting:
        image = scaling.apply(found.read(row)[1])
        pixels[row] = framing(image, f"{source}: {found.names[row]}")
    _report(source, scaling)
    given, rows = found.given, list(range(count))
    keys = given.keys or found.names
    ids = content_ids(contents) if given.ids is None else given.ids
    return ImageData(
        *(pixels, rows, found.names, labels, ids, keys, known, chosen),
        groups=given.groups or keys,
        provenance=Provenance.of(source, columns, split),
    )


def read_image(
    path: Path, size: int, ranges: Ranges | None = None, framing: Framing | None = None
) -> NDArray[np.uint8]:
    """Read one image file as uint8 (size, size, 3), as :func:`read_images` reads and refuses it."""
    picture, scaling = decode(read_bytes(path), str(path)), Scaling(ranges or {})
    is_scaled = scaling.add(picture)
    scaling.choose()
    _report(str(path), scaling)
    framing = framing or partial(_square, size=size)
    return framing(picture.image if is_scaled else scaling.apply(picture), str(path))


def _report(source: str, scaling: Scaling) -> None:
    for line in scaling.lines():
        warnings.warn(f"{source}: {line}", stacklevel=3)


def resized(image: Any, shape: tuple[int, int], where: str, **how: Any) -> Any:
    """Resize a Pillow image to a width and height; refuse a long and narrow one that would be too large."""
    if shape[0] * shape[1] > LARGEST:
        raise InputError(
            f"{where}: {image.width} x {image.height} pixels, too long and narrow to be brought to "
            f"{min(shape)}: cut it"
        )
    return image.resize(shape, **how)


def _square(image: Any, where: str, size: int) -> NDArray[np.uint8]:
    """Bring the shorter side to ``size``, and take the middle."""
    width, height = image.size
    shorter = min(width, height)
    if shorter != size:
        shape = (
            max(size, round(width * size / shorter)),
            max(size, round(height * size / shorter)),
        )
        bilinear = load_pillow().Resampling.BILINEAR
        image = resized(image, shape, where, resample=bilinear, reducing_gap=2.0)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
