"""Which files of a folder are images of its classes; what is left out is counted and reported."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from turnover.data.decoding import ENDINGS
from turnover.errors import InputError

_ARCHIVED = "__MACOSX"
_SHOWN = 5
_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}


def listed(folder: Path, known: Sequence[str] | None) -> list[Path]:
    """The image files of a folder with one folder for each class, sorted; hidden files are skipped.

    Args:
        known: the classes of the training data, of which this data may lack some; ``None``: every folder
            must hold an image.

    Warns:
        UserWarning: other files, with their number and endings.

    Raises:
        InputError: no images, a folder of a class without one, folders of splits, or one that cannot be
            listed.
    """
    try:
        found = sorted(path for path in folder.iterdir() if not _is_hidden(path.name))
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed: {error.strerror}") from error
    beside = [path for path in found if not path.is_dir()]
    classes = {path: _files(path) for path in found if path.is_dir()}
    images = {path: [one for one in files if _is_image(one)] for path, files in classes.items()}
    left = {path: [one for one in files if not _is_image(one)] for path, files in classes.items()}
    if not any(images.values()):
        others = _endings([*chain(*left.values()), *beside])
        raise InputError(
            f"{folder}: no images; it must hold one folder of images for each class "
            f"({', '.join(ENDINGS)}){f', and holds {others}' if others else ''}"
        )
    _check_no_splits(folder, images)
    for path in classes:
        if not images[path] and (left[path] or known is None):
            held = f"only {_endings(left[path])}" if left[path] else "nothing"
            raise InputError(
                f"{path}: no images of this class, {held}; put images there ({', '.join(ENDINGS)}), "
                f"or take the folder out"
            )
    _report(folder, beside, [*chain(*left.values())])
    return sorted(chain(*images.values()))


def _check_no_splits(folder: Path, images: Mapping[Path, Sequence[Path]]) -> None:
    """Training and test images of the same classes would be told from one another."""
    if len(images) < 2 or any(path.name.lower() not in _SPLITS for path in images):
        return
    if any(file.parent in images for file in chain(*images.values())):
        return
    names = [path.name for path in images]
    raise InputError(
        f"{folder} holds splits, {', '.join(names)}, and no classes: give one of them, such as "
        f"{folder / names[-1]}, and another as test data (--test)"
    )


def holds_images(folder: Path) -> bool:
    """Whether a folder has image files in the folders of classes."""
    return any(_is_image(path) for path in folder.glob("*/**/*"))


def _files(folder: Path) -> list[Path]:
    """All that is in a folder but folders; links to folders below it are not followed."""

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
    """What file browsers and editors leave behind, such as ``.ipynb_checkpoints`` and ``._photo.png``."""
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


def _report(folder: Path, beside: Sequence[Path], left: Sequence[Path]) -> None:
    if left:
        are = "file is not an image" if len(left) == 1 else "files are not images"
        warnings.warn(
            f"{folder}: {len(left)} {are} of a format that is read, and left out: {_endings(left)}",
            stacklevel=5,
        )
    if beside:
        names = ", ".join(path.name for path in beside[:_SHOWN])
        more = f" and {len(beside) - _SHOWN} more" if len(beside) > _SHOWN else ""
        are = "file is" if len(beside) == 1 else "files are"
        warnings.warn(
            f"{folder}: {len(beside)} {are} beside the folders of the classes, and left out: {names}{more}",
            stacklevel=5,
        )
