"""Tables of files and Hugging Face data sets, read as they are: columns by name, of plain values.

CSV and Parquet are read by ``datasets``. JSON is read here: Arrow's reader takes texts that look like
dates for dates, and does not survive all that is in a file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from turnover.errors import InputError, needing
from turnover.reading import check_utf8, read_objects

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("from_csv", {"keep_default_na": False}),
    ".tsv": ("from_csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": ("from_parquet", {}),
}
_OF_OBJECTS = (".json", ".jsonl")
ENDINGS = (*_READERS, *_OF_OBJECTS)


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


def load_table(source: str, split: str) -> Any:
    """A file or Hugging Face data set as a ``datasets.Dataset``, or :class:`Objects`.

    Raises:
        InputError: neither, or one that cannot be read.
    """
    path = Path(source)
    if path.is_file():
        if path.stat().st_size == 0:
            raise InputError(f"{source}: the file is empty")
        if path.suffix not in ENDINGS:
            raise InputError(
                f"{source}: cannot read {path.suffix or 'files without an ending'}; use "
                f"{', '.join(ENDINGS)} or the name of a Hugging Face data set"
            )
        return Objects(read_objects(path)) if path.suffix in _OF_OBJECTS else _read(path)
    if path.suffix in ENDINGS or path.is_absolute():
        raise InputError(f"{source}: no such file")
    datasets = _datasets()
    try:
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # the hub client raises many kinds
        raise InputError(
            f"{source}: neither a file here nor a Hugging Face data set that can be loaded ({error})"
        ) from error


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
        raise InputError(f"{source}: column {name!r} cannot be read: {error}") from error


def undecoded(table: Any, name: str, source: str) -> Callable[[int], Any]:
    """A column of images as they lie in the file, by row; no other column is decoded.

    Raises:
        InputError: it cannot be read, now or then.
    """
    refused = f"{source}: column {name!r} cannot be read"
    held = table
    try:
        if hasattr(table.features[name], "decode_example"):
            image = _datasets().Image(decode=False)
            held = table.select_columns([name]).cast_column(name, image)
    except Exception as error:  # a column of something else
        raise InputError(f"{refused} as images: {error}") from error

    def read(row: int) -> Any:
        try:
            return held[row][name]
        except Exception as error:  # Arrow raises many kinds
            raise InputError(f"{refused}: row {row + 1}: {error}") from error

    return read


def table_of(columns: dict[str, list[Any]]) -> Any:
    """Columns in memory as a ``datasets.Dataset``."""
    return _datasets().Dataset.from_dict(columns)


def _read(path: Path) -> Any:
    method, options = _READERS[path.suffix]
    datasets = _datasets()
    if path.suffix != ".parquet":
        check_utf8(path)
    try:
        return getattr(datasets.Dataset, method)(str(path), keep_in_memory=True, **options)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise InputError(f"{path}: cannot be read: {error}") from error
        raise InputError(f"{path}: the file has no rows") from error
    except Exception as error:  # the readers raise many kinds for damaged files
        raise InputError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error


def _datasets() -> Any:
    with needing("reading data", "turnover[text]", "turnover[images]"):
        import datasets
    datasets.disable_progress_bars()
    return datasets
