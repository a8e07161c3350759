"""Tables of files and Hugging Face data sets, read as they are: columns by name, of plain values.

Parquet is read by ``datasets``. JSON and CSV are read here: Arrow's and pandas' readers take texts that
look like dates or numbers for these, and do not survive all that is in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from turnover.data import delimited
from turnover.data.data_sets import cause_of, datasets_library, is_saved, read_data_set, read_saved
from turnover.errors import InputError
from turnover.io.parsing import read_objects

_OF_OBJECTS = (".json", ".jsonl")
ENDINGS = (*delimited.ENDINGS, ".parquet", *_OF_OBJECTS)


class Objects:
    """JSON objects as a table; what a row lacks is ``None`` in it."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows
        self.column_names = list(dict.fromkeys(name for row in rows for name in row))
        self.features: dict[str, None] = dict.fromkeys(self.column_names)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, which: str | int) -> Any:
        if isinstance(which, int):
            return {name: self._rows[which].get(name) for name in self.column_names}
        return [row.get(which) for row in self._rows]


def load_table(
    source: str, split: str, needed: Sequence[str] = (), wanted: Sequence[str] = ()
) -> Any:
    """A file, folder or Hugging Face data set as a ``datasets.Dataset``, :class:`Objects` or texts.

    Args:
        source: where it is.
        split: split of a data set, or beginning of a file's name in a folder.
        needed: columns it must have; they tell how the cells of a CSV file are separated.
        wanted: others that are read if they are there; with neither all are read.

    Raises:
        InputError: nothing is there, or it cannot be read.
    """
    path = Path(source)
    if path.is_dir():
        if is_saved(path):
            return read_saved(path, split)
        path = _file_of_split(path, split) or path
    if path.is_file():
        return _read(path, needed, wanted)
    if not path.is_dir() and (_ending(path) or path.is_absolute()):
        raise InputError(f"{source}: no such file")
    return read_data_set(source, split, needed, wanted)


def column_of(table: Any, name: str, source: str) -> list[Any]:
    """The values of a column.

    Raises:
        InputError: they cannot be read.
    """
    if hasattr(table.features[name], "decode_example"):
        raise InputError(
            f"{source}: column {name!r} holds {table.features[name]}, and no plain values"
        )
    try:
        return list(table[name])
    except Exception as error:  # what they are of is read now, and Arrow raises many kinds
        raise InputError(f"{source}: column {name!r} cannot be read: {cause_of(error)}") from error


def undecoded(table: Any, name: str, source: str) -> Callable[[int], Any]:
    """A column of images as they lie in the file, by row; no other column is decoded.

    Raises:
        InputError: it cannot be read, now or then.
    """
    refused = f"{source}: column {name!r} cannot be read"
    held = table
    try:
        if hasattr(table.features[name], "decode_example"):
            image = datasets_library().Image(decode=False)
            held = table.select_columns([name]).cast_column(name, image)
    except Exception as error:  # a column of something else
        raise InputError(f"{refused} as images: {cause_of(error)}") from error

    def read(row: int) -> Any:
        try:
            return held[row][name]
        except Exception as error:  # Arrow raises many kinds
            raise InputError(f"{refused}: row {row + 1}: {cause_of(error)}") from error

    return read


def table_of(columns: dict[str, list[Any]]) -> Any:
    """Columns in memory as a ``datasets.Dataset``."""
    return datasets_library().Dataset.from_dict(columns)


def _file_of_split(folder: Path, split: str) -> Path | None:
    """The file in a folder that has the name of a split, unless a script says what the data is."""

    def is_of_split(name: str) -> bool:
        return name.startswith(split) and name[len(split) :].lower() in ENDINGS

    found = sorted(file for file in folder.glob("*") if is_of_split(file.name) and file.is_file())
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise InputError(f"{folder} holds {names}: give the file of them that is meant")
    scripted = (folder / f"{folder.resolve().name}.py").exists()
    return found[0] if found and not scripted else None


def _read(path: Path, needed: Sequence[str], wanted: Sequence[str]) -> Any:
    ending = _ending(path)
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    if ending is None:
        raise InputError(
            f"{path}: cannot read {path.suffix or 'files without an ending'}; use "
            f"{', '.join(ENDINGS)} or the name of a Hugging Face data set"
        )
    if ending in _OF_OBJECTS:
        return Objects(read_objects(path))
    if ending in delimited.ENDINGS:
        return delimited.read_texts(path, needed, wanted)
    try:
        return datasets_library().Dataset.from_parquet(str(path), keep_in_memory=True)
    except InputError:
        raise
    except Exception as error:  # the readers raise many kinds for damaged files
        if "corresponds to no data" in cause_of(error):
            raise InputError(f"{path}: the file has no rows") from error
        raise InputError(f"{path}: cannot be read as parquet: {cause_of(error)}") from error


def _ending(path: Path) -> str | None:
    return next((one for one in ENDINGS if path.name.lower().endswith(one)), None)
