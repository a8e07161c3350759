"""Hugging Face data sets: of the hub, in folders of files, and written by ``save_to_disk``."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from turnover.data.delimited import ENDINGS, Texts, read_texts
from turnover.errors import InputError, needing
from turnover.io.files import check_links
from turnover.io.parsing import field, read_object, strings

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_PLACES = {"name", "version", "data_dir", "data_files", "description"}
"""Settings of a CSV data set that say where it is, and not how it is read."""
_PATTERN = (
    "its path holds one of [ ] * ?, which the library that reads it takes for a pattern; rename it"
)


def datasets_library() -> Any:
    """The package ``datasets``, without progress bars."""
    with needing("reading data", "turnover[text]", "turnover[images]"):
        import datasets
    datasets.disable_progress_bars()
    return datasets


def cause_of(error: BaseException) -> str:
    """What an error that others were raised from says."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` of a data set, or of several splits, wrote a folder."""
    return any((path / name).is_file() for name in (_STATE, _SPLITS))


def read_saved(folder: Path, split: str) -> Any:
    """A split of a folder that ``save_to_disk`` wrote; without splits all of it.

    Raises:
        InputError: no such split, or it is damaged, or files of it are elsewhere.
    """
    check_links(folder)
    if (folder / _SPLITS).is_file():
        splits = strings(read_object(folder / _SPLITS), "splits", folder / _SPLITS)
        if split not in splits:
            raise InputError(f"{folder}: no split {split!r}; it has {', '.join(splits)}")
        folder = folder / split
    state = folder / _STATE
    for one in field(read_object(state), "_data_files", list, state):
        name = one.get("filename") if isinstance(one, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{state}: damaged, {name!r} is no file of the folder")
    try:
        table = datasets_library().load_from_disk(str(folder)).with_format(None)
        table.data.table.validate(full=True)  # Arrow trusts the places a file gives its texts
    except Exception as error:  # the library raises many kinds for damaged files
        raise InputError(f"{folder}: cannot be read as a data set: {cause_of(error)}") from error
    return table


def read_data_set(source: str, split: str, needed: Sequence[str], wanted: Sequence[str]) -> Any:
    """A split of a Hugging Face data set by its name, or of a folder of files.

    CSV files are read as texts: the library would take ids and labels that look like numbers for numbers.

    Raises:
        InputError: neither, or it cannot be read.
    """
    datasets = datasets_library()
    try:
        builder = datasets.load_dataset_builder(source)
        _check_place(builder, source)
        if _is_plain_csv(builder):
            return _read_csv(datasets, builder, split, needed, wanted)
        return datasets.load_dataset(source, split=split)
    except InputError:
        raise
    except Exception as error:  # the hub client raises many kinds
        what = "file here"
        if Path(source).is_dir():
            what = f"folder with a file such as {split}.csv or {split}.parquet"
        hint = f"; {_PATTERN}" if _is_pattern(source) else ""
        raise InputError(
            f"{source}: neither a {what} nor a Hugging Face data set that can be loaded "
            f"({cause_of(error)}){hint}"
        ) from error


def _is_pattern(source: str) -> bool:
    return Path(source).is_dir() and glob.has_magic(str(Path(source).resolve()))


def _check_place(builder: Any, source: str) -> None:
    """The library takes the path of a folder for a pattern, and ``data[1]`` for ``data1`` beside it."""
    if not _is_pattern(source):
        return
    home = Path(source).resolve()
    for paths in (builder.config.data_files or {}).values():
        for path in paths:
            if not Path(path).is_relative_to(home):
                raise InputError(f"{source}: {_PATTERN}")


def _is_plain_csv(builder: Any) -> bool:
    """Whether a data set is of CSV files, and says nothing about their types."""
    if builder.name != "csv" or builder.info.features is not None:
        return False
    files = [str(path) for paths in builder.config.data_files.values() for path in paths]
    if not all(path.lower().endswith(ENDINGS) for path in files):  # in archives, say
        return False
    plain = type(builder.config)(sep=builder.config.sep)
    names = {one.name for one in fields(plain)} - _PLACES
    return all(getattr(builder.config, name) == getattr(plain, name) for name in names)


def _read_csv(
    datasets: Any, builder: Any, split: str, needed: Sequence[str], wanted: Sequence[str]
) -> Texts:
    files = {str(name): list(paths) for name, paths in builder.config.data_files.items()}
    separators = "\t" if builder.config.sep == "\t" else ",;"

    def whole(name: str) -> Texts:
        paths = datasets.DownloadManager().download(files[name])
        parts = [read_texts(Path(path), needed, wanted, separators=separators) for path in paths]
        return Texts.joined(parts, files[name])

    if split in files:
        return whole(split)
    texts = {name: whole(name) for name in files if name in split}  # a part, such as train[:100]
    pieces = datasets.ReadInstruction.from_spec(split).to_absolute(
        {name: len(one) for name, one in texts.items()}
    )
    cut = [texts[one.splitname].part(one.from_, one.to) for one in pieces]
    return Texts.joined(cut, [one.splitname for one in pieces])
