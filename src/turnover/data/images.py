"""Labelled images in: folders, arrays or Hugging Face data sets to pixels, labels and instance ids.

Reading and checking only; every image is brought to one square size, and nothing is left out in silence.
"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from turnover.data.base import Columns, check_writable, keys_and_ids, present, write
from turnover.data.classes import indexed, label_names
from turnover.data.data_sets import is_saved
from turnover.data.decoding import LARGEST, Picture, load_pillow, opened
from turnover.data.image_folders import listed
from turnover.data.scaling import Ranges, Scaling
from turnover.data.tables import load_table, table_of, undecoded
from turnover.errors import InputError
from turnover.ids import content_ids
from turnover.io.files import mapped, replacing, writing_temporary
from turnover.io.parsing import check_file

COLUMNS = Columns("image", "label")
_MANY = 1000
_LONGEST_SHOWN = 50
_PLAIN = "biufU"


@dataclass(frozen=True)
class ImageData:
    """Labelled images of one size.

    Attributes:
        pixels: uint8 (images, size, size, 3), in memory or on disk.
        rows: which of the images each row is, so that a part of the rows copies no pixels.
        names: what the images are called: a file's path in its folder.
        labels: class index of each row, into ``classes``.
        ids: int64 (rows,); equal ids form a group.
        keys: what the user calls each row: its id or group, or its name.
        classes: class names, sorted.
        ranges: of numbers of more than 8 bits (``"integers"``, ``"floats"``), what became 0 and what 255.
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

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Sequence[int]) -> ImageData:
        """The rows, in that order."""
        return replace(
            self,
            rows=[self.rows[row] for row in rows],
            names=[self.names[row] for row in rows],
            labels=[self.labels[row] for row in rows],
            ids=self.ids[list(rows)],
            keys=[self.keys[row] for row in rows],
        )

    def relabelled(self, labels: list[int]) -> ImageData:
        """The same images with other labels."""
        return replace(self, labels=labels)

    def shown(self, row: int) -> str:
        """What a list shows for a row: its name."""
        return self.names[row]

    def picture(self, row: int) -> Any:
        """A row as a Pillow image."""
        return load_pillow().fromarray(self.image(row))

    def contents(self) -> list[str]:
        """Digests of the pixels."""
        return [hashlib.sha256(self.pixels[row]).hexdigest() for row in self.rows]

    def table(self) -> dict[str, list[Any]]:
        """Key, image file and label."""
        labels = [self.classes[label] for label in self.labels]
        return {"key": self.keys, "image": self.names, "label": labels}

    def image(self, row: int) -> NDArray[np.uint8]:
        """uint8 (size, size, 3)."""
        image: NDArray[np.uint8] = self.pixels[self.rows[row]]
        return image


@dataclass(frozen=True)
class _Found:
    """Images not read yet: their names, labels, keys and ids, and bytes and image of each row."""

    names: list[str]
    labels: list[str]
    where: str
    given: tuple[list[str], Tensor] | None
    read: Callable[[int], tuple[bytes, Picture]]


class ImageReader:
    """Reads sets of images whose pixels can be compared: numbers of more than 8 bits as in the first.

    Args:
        size: height and width of the images given to the network.
        ranges: of the first set, if it was read before.
    """

    def __init__(self, size: int, ranges: Ranges | None = None) -> None:
        self._size = size
        self._ranges = ranges or {}

    def __call__(self, source: str, columns: Columns = COLUMNS, **options: Any) -> ImageData:
        """As :func:`read_images`."""
        data = read_images(source, self._size, columns, ranges=self._ranges, **options)
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
) -> ImageData:
    """Read labelled images.

    Images are turned upright as their EXIF says, and transparent ones are laid over white. The shorter
    side is brought to ``size``, and the middle is taken. Numbers of more than 8 bits are scaled to 8 bits,
    by one range for the whole set.

    Args:
        source: a folder with one folder of images for each class; an ``.npz`` file with arrays
            ``image`` (uint8 (images, height, width) or (images, height, width, 3)) and ``label``; or a
            Parquet file or Hugging Face data set with a column of images.
        size: height and width of the images given to the network.
        columns: which arrays or columns to read; a folder has none.
        classes: the classes of the training data, for data that must not have others; ``None`` takes
            them from the labels.
        split: split of a Hugging Face data set.
        ids_needed: whether the id or group column must be there.
        ranges: those of the training images, for test images that are compared with them.

    Warns:
        UserWarning: files that are left out, images of numbers that were scaled, of several pages, or
            with a color profile that cannot be used; with their number.

    Raises:
        InputError: no such file or folder, no images, an image that cannot be read (it is named), a
            missing array or column, arrays that do not fit, duplicate ids, an unknown label, a class
            without an image, or fewer than two classes.
    """
    path = Path(source)
    if path.is_dir() and not is_saved(path):
        found = _in_folder(path, columns, ids_needed, classes)
    elif path.suffix.lower() == ".npz":
        found = _in_arrays(path, columns, ids_needed)
    else:
        found = _in_table(source, columns, split, ids_needed)
    labels, known = indexed(found.labels, classes, source, found.where)
    count, scaling = len(labels), Scaling(ranges or {})
    # On disk: what is read may not fit into memory. The file goes with the array.
    with writing_temporary() as place, tempfile.TemporaryFile(dir=place) as file:
        pixels = mapped(file, (count, size, size, 3), np.uint8)
    contents, waiting = [], []
    for row in tqdm(range(count), "reading images", unit="image", disable=count < _MANY):
        raw, picture = found.read(row)
        contents.append(f"{hashlib.sha256(raw).hexdigest()}\0{found.labels[row]}")
        if scaling.add(picture):
            pixels[row] = _square(picture.image, size, f"{source}: {found.names[row]}")
        else:  # its range is that of the whole set
            waiting.append(row)
    chosen = scaling.choose()
    for row in waiting:
        image = scaling.apply(found.read(row)[1])
        pixels[row] = _square(image, size, f"{source}: {found.names[row]}")
    _say(source, scaling)
    keys, ids = found.given or (found.names, content_ids(contents))
    rows = list(range(count))
    return ImageData(pixels, rows, found.names, labels, ids, keys, known, chosen)


def read_image(path: Path, size: int, ranges: Ranges | None = None) -> NDArray[np.uint8]:
    """One image file as uint8 (size, size, 3).

    Args:
        ranges: those of the images it is compared with.

    Warns:
        UserWarning: as :func:`read_images`.

    Raises:
        InputError: no such file, or not an image.
    """
    picture, scaling = opened(_bytes(path), str(path)), Scaling(ranges or {})
    scaled = scaling.add(picture)
    scaling.choose()
    _say(str(path), scaling)
    return _square(picture.image if scaled else scaling.apply(picture), size, str(path))


def _say(source: str, scaling: Scaling) -> None:
    for line in scaling.lines():
        warnings.warn(f"{source}: {line}", stacklevel=3)


def write_images(data: ImageData, out: Path) -> None:
    """Write images and labels as ``.npz``, or their names and labels as a table, atomically.

    Raises:
        InputError: another ending, or a folder that does not exist.
    """
    if out.suffix != ".npz":
        write(data, out)
        return
    check_writable(out, ".npz")
    columns = {name: np.array(values) for name, values in data.table().items()}
    with replacing(out) as draft, zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED) as file:
        for name, values in (columns | {"image": data.pixels[data.rows]}).items():
            # Without the time, which makes no files alike, and is refused before 1980.
            member_of = zipfile.ZipInfo(f"{name}.npy")
            member_of.compress_type = zipfile.ZIP_DEFLATED
            with file.open(member_of, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)


def _in_folder(
    folder: Path, columns: Columns, ids_needed: bool, classes: Sequence[str] | None
) -> _Found:
    if ids_needed and (columns.id is not None or columns.group is not None):
        raise InputError(
            f"{folder}: a folder of images has no column of ids or groups; give an .npz file or a "
            f"Hugging Face data set"
        )
    paths = listed(folder, classes)

    home, known = (
        folder.resolve(),
        {parent: parent.resolve() for parent in {p.parent for p in paths}},
    )
    for path in paths:
        whole = path.resolve() if path.is_symlink() else known[path.parent] / path.name
        _check_inside(whole, (home,), str(path))

    def read(row: int) -> tuple[bytes, Picture]:
        raw = _bytes(paths[row])
        return raw, opened(raw, str(paths[row]))

    names = [path.relative_to(folder).as_posix() for path in paths]
    labels = [name.partition("/")[0] for name in names]
    return _Found(names, labels, "the folder", None, read)


def _in_arrays(path: Path, columns: Columns, ids_needed: bool) -> _Found:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = present(file.files, columns, str(path), ids_needed=ids_needed)
            wanted = (columns.input, columns.label, columns.id, columns.group)
            arrays = {name: file[name] for name in wanted if name is not None}
    except InputError:
        raise
    except Exception as error:  # numpy reads headers as Python does, and zipfile as it comes
        raise InputError(f"{path}: cannot be read as arrays: {error}") from error
    images = arrays.pop(columns.input)
    shaped = images.ndim in (3, 4) and images.shape[3:] in ((), (3,)) and 0 not in images.shape[1:]
    if images.dtype != np.uint8 or not shaped:
        raise InputError(
            f"{path}: {columns.input!r} must be uint8 (images, height, width) or (images, height, "
            f"width, 3), got {images.dtype} {images.shape}: scale them to 0 to 255 yourself"
        )
    for name, values in arrays.items():
        if values.shape != (len(images),):
            raise InputError(
                f"{path}: {name!r} must be ({len(images)},), one for each image, got {values.shape}"
            )
        if values.dtype.kind not in _PLAIN:
            raise InputError(f"{path}: {name!r} must be numbers or texts, got {values.dtype}")
    if not len(images):
        raise InputError(f"{path}: no images")
    try:
        table = table_of({name: values.tolist() for name, values in arrays.items()})
    except (ValueError, OverflowError) as error:  # halves of characters, numbers of another size
        raise InputError(f"{path}: cannot be read as arrays: {error}") from error

    def read(row: int) -> tuple[bytes, Picture]:
        image = load_pillow().fromarray(images[row]).convert("RGB")
        return images[row].tobytes(), Picture(image)

    return _Found(
        [str(row + 1) for row in range(len(images))],
        label_names(table, columns.label, str(path)),
        repr(columns.label),
        keys_and_ids(table, columns, str(path)),
        read,
    )


def _in_table(source: str, columns: Columns, split: str, ids_needed: bool) -> _Found:
    table = load_table(source, split)
    columns = present(table.column_names, columns, source, ids_needed=ids_needed)
    if not len(table):
        raise InputError(f"{source}: the file has no rows")
    images = undecoded(table, columns.input, source)
    homes = _homes(Path(source))

    def read(row: int) -> tuple[bytes, Picture]:
        cell, where = images(row), f"{source}: row {row + 1}"
        raw, path = (
            (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (None, None)
        )
        if not raw and isinstance(path, str) and path and "\0" not in path:
            _check_inside(Path(path).resolve(), homes, f"{where}: {path}")
            raw = _bytes(Path(path))
        if not isinstance(raw, bytes) or not raw:
            held = ""
            if isinstance(cell, str) and cell.strip():
                held = (
                    f", but {cell[:_LONGEST_SHOWN]!r}: a table holds images, and no names of files; give a "
                    f"folder with a folder for each class"
                )
            raise InputError(f"{where} has no image in column {columns.input!r}{held}")
        return raw, opened(raw, where)

    return _Found(
        [str(row + 1) for row in range(len(table))],
        label_names(table, columns.label, source),
        f"column {columns.label!r}",
        keys_and_ids(table, columns, source),
        read,
    )


def _homes(source: Path) -> tuple[Path, ...]:
    """Where the images that a table names by path may lie: beside its file, or in a data set's caches."""
    if source.is_file():
        return (source.parent.resolve(),)
    import datasets
    from huggingface_hub import constants

    caches = (datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    return tuple(Path(cache).resolve() for cache in caches)


def _check_inside(whole: Path, homes: Sequence[Path], named: str) -> None:
    """A data set of somebody else's may not take in images of the user's.

    Raises:
        InputError: it lies elsewhere.
    """
    if not any(whole.is_relative_to(home) for home in homes):
        raise InputError(
            f"{named} leads out of {homes[0]}: copy there what it leads to (cp -rL), or take it out"
        )


def _bytes(path: Path) -> bytes:
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _square(image: Any, size: int, where: str) -> NDArray[np.uint8]:
    """The image with its shorter side at ``size``, and its middle."""
    width, height = image.size
    shorter = min(width, height)
    if shorter != size:
        shape = (
            max(size, round(width * size / shorter)),
            max(size, round(height * size / shorter)),
        )
        if shape[0] * shape[1] > LARGEST:
            raise InputError(
                f"{where}: {width} x {height} pixels, too long and narrow to be brought to {size}: cut it"
            )
        image = image.resize(shape, load_pillow().Resampling.BILINEAR, reducing_gap=2.0)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
