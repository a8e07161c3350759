"""A user's file of data with some labels changed and some rows removed; all else stays as it was."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from turnover.data import delimited
from turnover.data.base import Columns, write_columns
from turnover.data.delimited import Dialect, dialect_of, names_of, opened, records_of
from turnover.data.images import write_arrays
from turnover.data.tables import column_of, load_table
from turnover.errors import InputError
from turnover.io.parsing import UTF8, check_encoding, read_text

_BLANKS = re.compile(r"[ \t\r\n]*")
_JSON = json.JSONDecoder()
_HIGH_FIRST = {"utf-16": codecs.BOM_UTF16_BE, "utf-32": codecs.BOM_UTF32_BE}
"""Byte order marks of encodings that Python itself may write in the other order."""


def rewritten(
    path: Path,
    columns: Columns,
    out: Path,
    *,
    copied: Mapping[int, int],
    removed: Collection[int],
) -> Callable[[Path], None]:
    """Change labels of a file of data and remove rows of it.

    In the format of the file, everything else stays as it is: columns, other cells and how they are
    written, the encoding, the types. In another format its columns stay.

    Args:
        path: a file that is read as labeled data.
        columns: that are read.
        out: file to write; its ending sets the format.
        copied: rows to relabel, each with a row whose label it gets.
        removed: rows to remove.

    Returns:
        a function that writes a file; it refuses one that would be read with other texts.

    Raises:
        InputError: a file that cannot be read, or images in another format than their file's.

    Example:
        >>> write = rewritten(Path("a.csv"), Columns(), Path("b.csv"), copied={3: 0}, removed=[1])
        >>> write(Path("b.csv"))
    """
    form = _form(path)
    if form != _form(out):
        return _converted(path, columns, out, copied, removed)
    if form == ".parquet":
        return _parquet(path, columns, copied, removed)
    if form == ".npz":
        return _arrays(path, columns, copied, removed)
    changed = _objects if form in (".json", ".jsonl") else _records
    text = changed(path, columns, copied, removed)
    encoding, mark = check_encoding(columns.encoding), ""
    with opened(path) as raw:
        first = raw.read(4)
    if encoding == UTF8 and first.startswith(codecs.BOM_UTF8):
        encoding = "utf-8-sig"
    elif first.startswith(_HIGH_FIRST.get(encoding, b"none")):
        encoding, mark = f"{encoding}-be", "\ufeff"

    def marked(file: Path) -> bool:
        return dialect_of(file, _needed(columns), "\t", columns.encoding).quoted

    def write(draft: Path) -> None:
        with draft.open("w", encoding=encoding, newline="") as file:
            file.write(mark + text)
        if form == ".tsv" and marked(draft) != marked(path):
            raise InputError(
                f"{out}: without the removed rows its quote marks would be read as enclosing cells; write "
                f".csv or .jsonl"
            )

    return write


def _form(path: Path) -> str:
    name = path.name.lower()
    if name.endswith(delimited.TABS):
        return ".tsv"
    if name.endswith(delimited.ENDINGS):
        return ".csv"
    return path.suffix.lower()


def _needed(columns: Columns) -> list[str]:
    return [one for one in (columns.input, columns.second, columns.label) if one is not None]


def _records(
    path: Path, columns: Columns, copied: Mapping[int, int], removed: Collection[int]
) -> str:
    dialect = dialect_of(path, _needed(columns), encoding=columns.encoding)
    lines: list[str] = []
    spans, label = [], -1
    for line, cells in records_of(path, dialect, read=lines):
        if label < 0:
            label = names_of(cells).index(columns.label)
        else:
            spans.append(slice(line - 1, len(lines)))

    def fields(row: int) -> list[str]:
        return list(_fields("".join(lines[spans[row]]), dialect))

    labels = {row: fields(row)[2 * label] for row in set(copied.values())}
    changed = {row: fields(row) for row in copied}
    for row, parts in changed.items():
        parts[2 * label] = labels[copied[row]]
    for row in {*copied, *removed}:
        span = spans[row]
        text = "" if row in removed else "".join(changed[row])
        lines[span] = [text, *[""] * (span.stop - span.start - 1)]
    return "".join(lines)


def _fields(record: str, dialect: Dialect) -> Iterator[str]:
    """Cells of a record as they are written, each before its separator or the end of the line."""
    bare = rf"[^{dialect.separator}\r\n]*"
    field = re.compile(rf'"[^"]*(?:""[^"]*)*"|{bare}' if dialect.quoted else bare)
    at = 0
    while found := field.match(record, at):
        yield found[0]
        at = found.end()
        if record[at : at + 1] != dialect.separator:
            yield record[at:]
            return
        yield dialect.separator
        at += 1


def _objects(
    path: Path, columns: Columns, copied: Mapping[int, int], removed: Collection[int]
) -> str:
    text = read_text(path, columns.encoding, own=False)
    listed = text.lstrip().startswith("[")
    between, objects = _listed(text) if listed else _lines(text)

    def label(row: int) -> slice:
        return _value(objects[row], columns.label)

    labels = {row: objects[row][label(row)] for row in set(copied.values())}
    for row, source in copied.items():
        span = label(row)
        objects[row] = objects[row][: span.start] + labels[source] + objects[row][span.stop :]
    kept = [row for row in range(len(objects)) if row not in removed]
    parts = [between[0]]
    for row in kept:
        # What stands before an object goes with it; the first one kept has no comma before it.
        parts += [between[row] if row != kept[0] else "", objects[row]]
    return "".join([*parts, between[-1]])


def _listed(text: str) -> tuple[list[str], list[str]]:
    """What stands around the objects of a JSON list, and the objects."""
    between, objects = [], []
    start, at = 0, text.index("[") + 1
    while text[at := _end_of_blanks(text, at)] != "]":
        if text[at] == ",":
            at = _end_of_blanks(text, at + 1)
        between.append(text[start:at])
        _, start = _JSON.raw_decode(text, at)
        objects.append(text[at:start])
        at = start
    return [*between, text[start:]], objects


def _lines(text: str) -> tuple[list[str], list[str]]:
    """Empty lines around those with objects, and the latter."""
    between, objects = [""], []
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        if line.strip():
            objects.append(line)
            between.append("")
        else:
            between[-1] += line
    return between, objects


def _value(text: str, name: str) -> slice:
    """Place of a field's value in the text of a JSON object."""
    at, found = text.index("{") + 1, slice(0)
    while text[at := _end_of_blanks(text, at)] != "}":
        if text[at] == ",":
            at = _end_of_blanks(text, at + 1)
        key, at = _JSON.raw_decode(text, at)
        start = _end_of_blanks(text, _end_of_blanks(text, at) + 1)
        _, at = _JSON.raw_decode(text, start)
        if key == name:  # of two fields of one name the last counts
            found = slice(start, at)
    return found


def _end_of_blanks(text: str, at: int) -> int:
    found = _BLANKS.match(text, at)
    assert found is not None
    return found.end()


def _parquet(
    path: Path, columns: Columns, copied: Mapping[int, int], removed: Collection[int]
) -> Callable[[Path], None]:
    import pyarrow
    from pyarrow import parquet

    table = parquet.ParquetFile(path).read().unify_dictionaries()
    place = table.column_names.index(columns.label)
    rows = [copied.get(row, row) for row in range(len(table))]
    labels = table.column(place).take(pyarrow.array(rows, pyarrow.int64()))
    kept = pyarrow.array([row not in removed for row in range(len(table))], pyarrow.bool_())
    changed = table.set_column(place, table.schema.field(place), labels).filter(kept)
    return lambda draft: parquet.write_table(changed, draft)


def _arrays(
    path: Path, columns: Columns, copied: Mapping[int, int], removed: Collection[int]
) -> Callable[[Path], None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as arrays: {error}") from error
    labels = arrays[columns.label]
    count = len(labels)
    arrays[columns.label] = labels[[copied.get(row, row) for row in range(count)]]
    kept = [row for row in range(count) if row not in removed]
    changed = {
        name: values[kept] if values.shape[:1] == (count,) else values
        for name, values in arrays.items()
    }
    return lambda draft: write_arrays(draft, changed)


def _converted(
    path: Path, columns: Columns, out: Path, copied: Mapping[int, int], removed: Collection[int]
) -> Callable[[Path], None]:
    if ".npz" in (_form(path), _form(out)):
        raise InputError(f"{path} and {out} are of two formats, one of which holds arrays")
    needed = _needed(columns)
    names = load_table(str(path), "", needed, encoding=columns.encoding).column_names
    table = load_table(str(path), "", needed, names, columns.encoding)
    cells: dict[str, list[Any]] = {name: column_of(table, name, str(path)) for name in names}
    labels, feature = cells[columns.label], table.features[columns.label]
    if hasattr(feature, "int2str"):
        labels = [feature.int2str(label) for label in labels]
    cells[columns.label] = [labels[copied.get(row, row)] for row in range(len(labels))]
    kept = [row for row in range(len(labels)) if row not in removed]
    changed = {name: [values[row] for row in kept] for name, values in cells.items()}
    return lambda draft: write_columns(draft, out.suffix, changed, columns.encoding)
