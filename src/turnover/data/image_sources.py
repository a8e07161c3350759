"""Sources of labeled images: folders of classes, ``.npz`` arrays, and tables.

Files that are left out are reported; a source that cannot be read raises an InputError that names it.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from turnover.data.base import Columns, Names, names_of, present
from turnover.data.classes import label_names
from turnover.data.decoding import ENDINGS, Picture, decode, load_pillow
from turnover.data.tables import is_saved, load_table, table_of, undecoded
from turnover.errors import InputError
from turnover.io.parsing import check_file

_ARCHIVED = "__MACOSX"
_SHOWN = 5
_LONGEST_SHOWN = 50
_PLAIN = "biufU"
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}


@dataclass(frozen=True)
class Source:
    """Labeled images that are not decoded yet.

    Attributes:
        names: of the images.
        labels: of the images.
        where: the folder or column of the labels, for messages.
        given: keys, groups and ids, where the source has them.
        read: function that returns the bytes and the picture of a row.
    """

    names: list[str]
    labels: list[str]
    where: str
    given: Names
    read: Callable[[int], tuple[bytes, Picture]]


def find_images(
    source: str, columns: Columns, classes: Sequence[str] | None, split: str, *, ids_needed: bool
) -> Source:
    """Find the images of a folder, an ``.npz`` file or a table (:func:`turnover.data.images.read_images`)."""
    path = Path(source)
    if path.is_dir() and not is_saved(path):
        return _in_folder(path, columns, ids_needed, classes)
    if _is_arrays(path):
        return _in_arrays(path, columns, ids_needed)
    return _in_table(source, columns, split, ids_needed)


def holds_images(source: str) -> bool:
    """Whether a path is an ``.npz`` file, or a folder with images in the folders of its classes."""
    path = Path(source)
    return _is_arrays(path) or any(_is_image(file) for file in path.glob("*/**/*"))


def read_bytes(path: Path) -> bytes:
    """Read an image file."""
    check_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _is_arrays(path: Path) -> bool:
    return path.suffix.lower() == ".npz"


def _in_folder(
    folder: Path, columns: Columns, ids_needed: bool, classes: Sequence[str] | None
) -> Source:
    if ids_needed and (columns.id is not None or columns.group is not None):
        raise InputError(
            f"{folder}: a folder of images has no column of ids or groups; give an .npz file or a "
            f"Hugging Face data set"
        )
    paths = _listed(folder, classes)
    home = folder.resolve()
    parents = {parent: parent.resolve() for parent in {path.parent for path in paths}}
    for path in paths:
        real = path.resolve() if path.is_symlink() else parents[path.parent] / path.name
        _check_inside(real, (home,), str(path))

    def read(row: int) -> tuple[bytes, Picture]:
        raw = read_bytes(paths[row])
        return raw, decode(raw, str(paths[row]))

    names = [path.relative_to(folder).as_posix() for path in paths]
    labels = [name.partition("/")[0] for name in names]
    return Source(names, labels, "the folder", Names(), read)


def _in_arrays(path: Path, columns: Columns, ids_needed: bool) -> Source:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = present(file.files, columns, str(path), ids_needed=ids_needed)
            wanted = (columns.input, columns.label, columns.id, columns.group)
            arrays = {name: file[name] for name in wanted if name is not None}
    except InputError:
        raise
    except Exception as error:  # numpy evaluates headers as Python, and zipfile raises many kinds
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
    except (ValueError, OverflowError) as error:  # lone surrogates, numbers of another size
        raise InputError(f"{path}: cannot be read as arrays: {error}") from error

    def read(row: int) -> tuple[bytes, Picture]:
        image = load_pillow().fromarray(images[row]).convert("RGB")
        return images[row].tobytes(), Picture(image)

    return _labeled(table, str(path), columns, repr(columns.label), len(images), read)


def _in_table(source: str, columns: Columns, split: str, ids_needed: bool) -> Source:
    table = load_table(source, split)
    columns = present(table.column_names, columns, source, ids_needed=ids_needed)
    if not len(table):
        raise InputError(f"{source}: the file has no rows")
    images = undecoded(table, columns.input, source)
    homes = _homes(Path(source))

    def read(row: int) -> tuple[bytes, Picture]:
        cell, where = images(row), f"{source}: row {row + 1}"
        raw, path = None, None
        if isinstance(cell, dict):
            raw, path = cell.get("bytes"), cell.get("path")
        if not raw and isinstance(path, str) and path and "\0" not in path:
            _check_inside(Path(path).resolve(), homes, f"{where}: {path}")
            raw = read_bytes(Path(path))
        if not isinstance(raw, bytes) or not raw:
            held = ""
            if isinstance(cell, str) and cell.strip():
                held = (
                    f", but {cell[:_LONGEST_SHOWN]!r}: a table must hold images, not names of files; give "
                    f"a folder with a folder for each class"
                )
            raise InputError(f"{where} has no image in column {columns.input!r}{held}")
        return raw, decode(raw, where)

    return _labeled(table, source, columns, f"column {columns.label!r}", len(table), read)


def _labeled(
    table: Any,
    source: str,
    columns: Columns,
    where: str,
    count: int,
    read: Callable[[int], tuple[bytes, Picture]],
) -> Source:
    names = [str(row + 1) for row in range(count)]
    labels = label_names(table, columns.label, source)
    return Source(names, labels, where, names_of(table, columns, source), read)


def _homes(source: Path) -> tuple[Path, ...]:
    """Folders in which a table may name images: beside its file, or the caches of data sets."""
    if source.is_file():
        return (source.parent.resolve(),)
    import datasets
    from huggingface_hub import constants

    caches = (datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    return tuple(Path(cache).resolve() for cache in caches)


def _check_inside(real: Path, homes: Sequence[Path], named: str) -> None:
    """Refuse paths out of a data set: somebody else's may not take in the user's own images."""
    if not any(real.is_relative_to(home) for home in homes):
        raise InputError(
            f"{named} leads out of {homes[0]}: copy its target there (cp -rL), or remove it"
        )


def _listed(folder: Path, known: Sequence[str] | None) -> list[Path]:
    """Image files in the folders of classes, sorted; hidden files are skipped.

    Test data may lack some of the classes ``known`` from training; otherwise every folder needs an image.
    """
    try:
        found = sorted(path for path in folder.iterdir() if not _is_hidden(path.name))
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror}") from error
    beside = [path for path in found if not path.is_dir()]
    classes = {path: _files(path) for path in found if path.is_dir()}
    images = {path: [one for one in files if _is_image(one)] for path, files in classes.items()}
    others = {path: [one for one in files if not _is_image(one)] for path, files in classes.items()}
    left_out = [*chain(*others.values())]
    if not any(images.values()):
        endings = _endings([*left_out, *beside])
        raise InputError(
            f"{folder}: no images; it must hold one folder of images for each class "
            f"({', '.join(ENDINGS)}){f', and holds {endings}' if endings else ''}"
        )
    _check_no_splits(folder, images)
    for path in classes:
        if not images[path] and (others[path] or known is None):
            held = f"only {_endings(others[path])}" if others[path] else "nothing"
            raise InputError(
                f"{path}: no images of this class, {held}; put images there ({', '.join(ENDINGS)}), "
                f"or remove the folder"
            )
    _report(folder, beside, left_out)
    return sorted(chain(*images.values()))


def _check_no_splits(folder: Path, images: Mapping[Path, Sequence[Path]]) -> None:
    """Refuse folders of splits, which a network would learn to tell apart as classes."""
    if len(images) < 2 or any(path.name.lower() not in _SPLITS for path in images):
        return
    if any(file.parent in images for file in chain(*images.values())):
        return
    names = [path.name for path in images]
    raise InputError(
        f"{folder} holds splits, {', '.join(names)}, and no classes: give one of them, such as "
        f"{folder / names[-1]}, and another as test data (--test)"
    )


def _files(folder: Path) -> list[Path]:
    """Everything in a folder but folders; links to folders are not followed."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed: {error.strerror}") from error

    files = []
    for place, folders, names in os.walk(folder, onerror=refuse):
        shown = [name for name in folders if not _is_hidden(name)]
        folders[:] = [name for name in shown if not Path(place, name).is_symlink()]
        links = [name for name in shown if name not in folders]
        files += [Path(place, name) for name in (*names, *links) if not _is_hidden(name)]
    return files


def _is_hidden(name: str) -> bool:
    """Whether file browsers and editors left a file, such as ``.ipynb_checkpoints`` or ``._photo.png``."""
    return name.startswith(".") or name == _ARCHIVED


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS and not path.is_dir()


def _endings(paths: Iterable[Path]) -> str:
    """``.txt (2), .mp4 (1)``."""
    counts = Counter(
        "links to folders" if path.is_dir() else path.suffix.lower() or "without an ending"
        for path in paths
    )
    return ", ".join(f"{ending} ({count})" for ending, count in counts.most_common())


def _report(folder: Path, beside: Sequence[Path], others: Sequence[Path]) -> None:
    said = []
    if others:
        are = "file is not an image" if len(others) == 1 else "files are not images"
        said.append(f"{len(others)} {are} of a supported format, and left out: {_endings(others)}")
    if beside:
        names = ", ".join(path.name for path in beside[:_SHOWN])
        more = f" and {len(beside) - _SHOWN} more" if len(beside) > _SHOWN else ""
        are = "file is" if len(beside) == 1 else "files are"
        said.append(
            f"{len(beside)} {are} beside the folders of the classes, and left out: {names}{more}"
        )
    for line in said:
        warnings.warn(f"{folder}: {line}", stacklevel=6)
