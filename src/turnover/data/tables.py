"""Tables from files and Hugging Face data sets: columns by name, of plain values.

Parquet is read by ``datasets``, JSON and CSV here: the readers of Arrow and pandas convert texts that look
like dates or numbers, and fail on some files. What cannot be read raises an InputError that names it.
"""

from __future__ import annotations

import codecs
import glob
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from turnover.data import delimited
from turnover.data.delimited import Table, Texts, read_texts
from turnover.errors import InputError, needing
from turnover.io.files import check_links
from turnover.io.parsing import UTF8, check_encoding, convert, read_object, read_objects

_OF_OBJECTS = (".json", ".jsonl")
ENDINGS = (*delimited.ENDINGS, ".parquet", *_OF_OBJECTS)
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_PLACES = {"name", "version", "data_dir", "data_files", "description"}
"""Settings of a CSV data set that say where it is, and not how it is read."""
_PATTERN = "its path contains one of [ ] * ?, which the library reads as a pattern; rename it"


@dataclass(frozen=True)
class _File:
    filename: str


@dataclass(frozen=True)
class _State:
    """Part of ``state.json`` that ``save_to_disk`` writes."""

    _data_files: list[_File]


def load_table(
    source: str,
    split: str,
    needed: Sequence[str] = (),
    wanted: Sequence[str] = (),
    encoding: str = UTF8,
) -> Any:
    """Load a file, folder or Hugging Face data set as a :class:`Table` or ``datasets.Dataset``.

    Args:
        source: path or name.
        split: split of a data set, or beginning of a file's name in a folder.
        needed: columns it must have, as in :func:`turnover.data.delimited.read_texts`.
        wanted: other columns to read if they exist; with neither all are read.
        encoding: of a CSV, TSV or JSON file.
    """
    path = Path(source)
    if path.is_dir() and is_saved(path):
        return _read_saved(path, split)
    file = file_of(source, split)
    if file is not None:
        return _read_file(file, needed, wanted, encoding)
    if not path.is_dir() and (_ending(path) or path.is_absolute()):
        raise InputError(f"{source}: no such file")
    return _read_data_set(source, split, needed, wanted, encoding)


def file_of(source: str, split: str) -> Path | None:
    """The one file that a table is read from, if there is one."""
    path = Path(source)
    if path.is_dir():
        return None if is_saved(path) else _file_of_split(path, split)
    return path if path.is_file() else None


def column_of(table: Any, name: str, source: str) -> list[Any]:
    """Read a column."""
    if hasattr(table.features[name], "decode_example"):
        raise InputError(
            f"{source}: column {name!r} holds {table.features[name]}, not plain values"
        )
    try:
        return list(table[name])
    except Exception as error:  # values are read here, and Arrow raises many kinds
        raise InputError(f"{source}: column {name!r} cannot be read: {_cause(error)}") from error


def undecoded(table: Any, name: str, source: str) -> Callable[[int], Any]:
    """Function that reads a row of a column of images as bytes; no other column is decoded."""
    refused = f"{source}: column {name!r} cannot be read"
    column = table
    try:
        if hasattr(table.features[name], "decode_example"):
            image = datasets_library().Image(decode=False)
            column = table.select_columns([name]).cast_column(name, image)
    except Exception as error:  # a column of something else
        raise InputError(f"{refused} as images: {_cause(error)}") from error

    def read(row: int) -> Any:
        try:
            return column[row][name]
        except Exception as error:  # Arrow raises many kinds
            raise InputError(f"{refused}: row {row + 1}: {_cause(error)}") from error

    return read


def table_of(columns: dict[str, list[Any]]) -> Any:
    """Columns in memory as a ``datasets.Dataset``."""
    return datasets_library().Dataset.from_dict(columns)


def datasets_library() -> Any:
    """Import ``datasets``, without progress bars."""
    with needing("reading data", "turnover[text]", "turnover[images]"):
        import datasets
    datasets.disable_progress_bars()
    return datasets


def is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder, of one data set or of several splits."""
    return any((path / name).is_file() for name in (_STATE, _SPLITS))


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _ending(path: Path) -> str | None:
    return next((one for one in ENDINGS if path.name.lower().endswith(one)), None)


def _file_of_split(folder: Path, split: str) -> Path | None:
    """File in a folder that is named after a split, unless a loading script describes the data."""

    def is_of_split(name: str) -> bool:
        return name.startswith(split) and name[len(split) :].lower() in ENDINGS

    found = sorted(file for file in folder.glob("*") if is_of_split(file.name) and file.is_file())
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise InputError(f"{folder} holds {names}: give the path of one of them")
    scripted = (folder / f"{folder.resolve().name}.py").exists()
    return found[0] if found and not scripted else None


def _read_file(path: Path, needed: Sequence[str], wanted: Sequence[str], encoding: str) -> Any:
    ending = _ending(path)
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    if ending is None:
        raise InputError(
            f"{path}: cannot read {path.suffix or 'files without an ending'}; use "
            f"{', '.join(ENDINGS)} or the name of a Hugging Face data set"
        )
    if ending != ".parquet" and check_encoding(encoding) != UTF8 and _is_utf8(path):
        warnings.warn(
            f"{path} looks like UTF-8, and is read as {encoding}: leave --encoding out if texts come out "
            f"wrong",
            stacklevel=2,
        )
    if ending in _OF_OBJECTS:
        rows = read_objects(path, encoding)
        names = list(dict.fromkeys(name for row in rows for name in row))
        return Table(names, {name: [row.get(name) for row in rows] for name in names})
    if ending in delimited.ENDINGS:
        return read_texts(path, needed, wanted, encoding=encoding)
    library = datasets_library()
    try:
        return library.Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:  # the readers raise many kinds for damaged files
        if "corresponds to no data" in _cause(error):
            raise InputError(f"{path}: the file has no rows") from error
        raise InputError(f"{path}: cannot be read as parquet: {_cause(error)}") from error


def _is_utf8(path: Path) -> bool:
    """Whether a file is UTF-8 beyond ASCII, as files in other encodings hardly ever are by chance."""
    decoder, beyond = codecs.getincrementaldecoder(UTF8)(), False
    with delimited.opened(path) as raw:
        try:
            for line in raw:
                beyond = not decoder.decode(line).isascii() or beyond
        except UnicodeError:
            return False
    return beyond


def _read_saved(folder: Path, split: str) -> Any:
    """Split of a folder that ``save_to_disk`` wrote; all of it if it has no splits."""
    check_links(folder)
    if (folder / _SPLITS).is_file():
        where = folder / _SPLITS
        splits = convert(read_object(where).get("splits"), list[str], f"{where}: splits")
        if split not in splits:
            raise InputError(f"{folder}: no split {split!r}; it has {', '.join(splits)}")
        folder = folder / split
    where = folder / _STATE
    for file in convert(read_object(where), _State, where)._data_files:
        if Path(file.filename).name != file.filename:
            raise InputError(f"{where}: damaged, {file.filename!r} is not a file of the folder")
    try:
        table = datasets_library().load_from_disk(str(folder)).with_format(None)
        table.data.table.validate(full=True)  # Arrow trusts the offsets in a file
    except Exception as error:  # the library raises many kinds for damaged files
        raise InputError(f"{folder}: cannot be read as a data set: {_cause(error)}") from error
    return table


def _read_data_set(
    source: str, split: str, needed: Sequence[str], wanted: Sequence[str], encoding: str
) -> Any:
    """Split of a Hugging Face data set, by name, or of a folder of files.

    CSV files are read as texts: the library would convert ids and labels that look like numbers.
    """
    datasets = datasets_library()
    try:
        builder = datasets.load_dataset_builder(source)
        _check_place(builder, source)
        if _is_plain_csv(builder):
            return _read_csv(datasets, builder, split, needed, wanted, encoding)
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
            f"({_cause(error)}){hint}"
        ) from error


def _is_pattern(source: str) -> bool:
    return Path(source).is_dir() and glob.has_magic(str(Path(source).resolve()))


def _check_place(builder: Any, source: str) -> None:
    """Refuse files outside the folder: the library reads ``data[1]`` as a pattern that fits ``data1``."""
    if not _is_pattern(source):
        return
    home = Path(source).resolve()
    for paths in (builder.config.data_files or {}).values():
        if not all(Path(path).is_relative_to(home) for path in paths):
            raise InputError(f"{source}: {_PATTERN}")


def _is_plain_csv(builder: Any) -> bool:
    """Whether a data set consists of CSV files, and does not declare their types."""
    if builder.name != "csv" or builder.info.features is not None:
        return False
    files = [str(path) for paths in builder.config.data_files.values() for path in paths]
    if not all(path.lower().endswith(delimited.ENDINGS) for path in files):  # such as archives
        return False
    plain = type(builder.config)(sep=builder.config.sep)
    names = {one.name for one in fields(plain)} - _PLACES
    return all(getattr(builder.config, name) == getattr(plain, name) for name in names)


def _read_csv(
    datasets: Any,
    builder: Any,
    split: str,
    needed: Sequence[str],
    wanted: Sequence[str],
    encoding: str,
) -> Texts:
    files = {str(name): list(paths) for name, paths in builder.config.data_files.items()}
    separators = "\t" if builder.config.sep == "\t" else ",;"

    how = {"separators": separators, "encoding": encoding}

    def whole(name: str) -> Texts:
        paths = datasets.DownloadManager().download(files[name])
        parts = [read_texts(Path(path), needed, wanted, **how) for path in paths]
        return Texts.joined(parts, files[name])

    if split in files:
        return whole(split)
    texts = {name: whole(name) for name in files if name in split}  # a part, such as train[:100]
    pieces = datasets.ReadInstruction.from_spec(split).to_absolute(
        {name: len(one) for name, one in texts.items()}
    )
    cut = [texts[one.splitname].part(one.from_, one.to) for one in pieces]
    return Texts.joined(cut, [one.splitname for one in pieces])
