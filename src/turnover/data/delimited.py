"""Read and write CSV and TSV, plain or gzip: every cell stays a text; an InputError names the row."""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from turnover.errors import InputError
from turnover.io.parsing import ENCODED, UTF8, check_file, decoded, undecodable

TABS = (".tsv", ".tab", ".tsv.gz", ".tab.gz")
ENDINGS = (".csv", ".csv.gz", *TABS)
_LONGEST = 2**28
"""Most characters of a cell."""
_UNPACKED, _RATIO = 2**30, 200
"""A gzip file may unpack to so many bytes, or so many times its size."""
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True)
class Dialect:
    """How a file's cells are written.

    Attributes:
        separator: of the cells.
        quoted: whether quote marks enclose cells.
        encoding: of the file.
        fix: what to do if the file is in another encoding.
    """

    separator: str
    quoted: bool = True
    encoding: str = UTF8
    fix: str = ENCODED


class Table:
    """Columns of plain values, by name.

    Attributes:
        column_names: all columns of the file, also those that are not kept.
    """

    def __init__(self, column_names: list[str], columns: dict[str, list[Any]]) -> None:
        self.column_names = column_names
        self.features: dict[str, None] = dict.fromkeys(column_names)
        self._columns = columns

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()), []))

    def __getitem__(self, which: str | int) -> Any:
        if isinstance(which, int):
            return {name: cells[which] for name, cells in self._columns.items()}
        return self._columns[which]


class Texts(Table):
    """Columns of a CSV or TSV file: texts, whatever they look like."""

    def part(self, start: int, end: int) -> Texts:
        """Rows from ``start`` up to ``end``."""
        return Texts(
            self.column_names, {name: cells[start:end] for name, cells in self._columns.items()}
        )

    @staticmethod
    def joined(parts: Sequence[Texts], named: Sequence[str]) -> Texts:
        """Join the rows of tables, and refuse one with other columns by its name."""
        first = parts[0]
        for one, name in zip(parts, named, strict=True):
            if set(one._columns) != set(first._columns):
                raise InputError(f"{name} has other columns than {named[0]}")
        columns = {name: [cell for one in parts for cell in one[name]] for name in first._columns}
        return Texts(first.column_names, columns)


class _MalformedError(InputError):
    """A record that cannot be read, and the line it begins on."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def read_texts(
    path: Path,
    needed: Sequence[str] = (),
    wanted: Sequence[str] = (),
    *,
    separators: str | None = None,
    encoding: str = UTF8,
) -> Texts:
    """Read columns of a CSV file, or of a TSV file (``.tsv``, ``.tab``).

    Semicolons separate the cells of a CSV file if only then it has the columns needed. Quote marks enclose
    cells of a TSV file only if all of it can be read that way.

    Args:
        path: the file.
        needed: columns that the file must have; if it lacks one, only the names are read.
        wanted: other columns to keep, if they exist; with neither all are kept.
        separators: characters that may separate the cells, whatever the file's name.
        encoding: of the file.
    """
    records = _reported(records_of(path, dialect_of(path, needed, separators, encoding)))
    names = names_of(next(records, (0, []))[1])
    if not names:
        raise InputError(f"{path}: the file is empty")
    if not set(needed) <= set(names):  # cells cannot be told apart
        return Texts(names, {})
    asked = {*needed, *wanted}
    for name in asked:
        _check_once(path, names, name)
    kept = {name: index for index, name in enumerate(names) if not asked or name in asked}
    if not kept:  # one column, to count the rows
        kept = {name: index for index, name in enumerate(names[:1])}
    columns: dict[str, list[str]] = {name: [] for name in kept}
    filled = [(index, columns[name].append) for name, index in kept.items()]
    for _, cells in records:
        for index, append in filled:
            append(cells[index])
    return Texts(names, columns)


def read_table(path: Path, needed: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a CSV file row by row: line number (the header is 1) and cells; a row may lack some.

    Commas separate the cells, or semicolons or tabs if only then the file has the columns needed. Empty
    rows are skipped.
    """
    if not path.exists():
        raise InputError(f"{path}: cannot be read: no such file")
    dialect = dialect_of(path, needed, ",;\t", fix="write it as UTF-8")
    records = _reported(records_of(path, dialect, short=True))
    names = [name.strip() for name in next(records, (0, []))[1]]
    for name in needed:
        _check_once(path, names, name)
        if name not in names:
            listed = f"it has {', '.join(names)}" if names else "the file is empty"
            raise InputError(
                f"{path}: the header lacks a column: {' and '.join(needed)} are needed; {listed}"
            )
    for line, cells in records:
        if any(cell.strip() for cell in cells):
            yield line, dict(zip(names, cells, strict=False))


def finite_number(cell: str) -> float | None:
    """Number in a cell, written with a decimal point; ``None`` if it is not a finite number."""
    value = float(cell) if _NUMBER.fullmatch(cell.strip()) else math.inf
    return value if math.isfinite(value) else None


def write_texts(
    path: Path, columns: dict[str, list[Any]], *, tabs: bool = False, encoding: str = UTF8
) -> None:
    """Write columns as CSV, or as TSV, so that :func:`read_texts` reads the same texts."""
    separator = "\t" if tabs else ","
    with path.open("w", newline="", encoding=encoding) as file:
        plain, quoted = (
            csv.writer(file, delimiter=separator, lineterminator="\n", quoting=quoting)
            for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
        )
        # Quote marks in the header tell readers that they enclose cells; in other TSV they are text.
        marked = tabs and any(_special(str(cell)) for cells in columns.values() for cell in cells)
        (quoted if marked else plain).writerow(columns)
        for row in zip(*columns.values(), strict=True):
            # csv does not quote a carriage return.
            (quoted if any("\r" in str(cell) for cell in row) else plain).writerow(row)


def _special(cell: str) -> bool:
    return any(mark in cell for mark in '\t\n\r"')


def names_of(header: list[str]) -> list[str]:
    """Names of columns; one without a name gets its position, as in pandas."""
    return [name or f"Unnamed: {index}" for index, name in enumerate(header)]


def _check_once(path: Path, names: Sequence[str], name: str) -> None:
    if names.count(name) > 1:
        raise InputError(f"{path}: the header has {name!r} twice: rename one of these columns")


def dialect_of(
    path: Path,
    needed: Sequence[str],
    separators: str | None = None,
    encoding: str = UTF8,
    fix: str = ENCODED,
) -> Dialect:
    """Find how a file's cells are written.

    The first separator with which the header has the columns needed, else the first of all.

    Args:
        path: the file.
        needed: columns.
        separators: those that are possible; ``None``: those of the file's ending.
        encoding: of the file.
        fix: what to do if the file is in another one.
    """
    if separators is None:
        separators = "\t" if path.name.lower().endswith(TABS) else ",;"
    every = {one: Dialect(one, encoding=encoding, fix=fix) for one in (*separators, *_SEPARATORS)}
    found = next((one for one in separators if _has(path, every[one], needed)), None)
    if found is None:
        other = next((one for one in _SEPARATORS if _has(path, every[one], needed)), None)
        if other is not None:
            ending = ".tsv" if other == "\t" else ".csv"
            packed = ".gz" if path.suffix.lower() == ".gz" else ""
            raise InputError(
                f"{path}: {_SEPARATORS[other]} separate its cells: rename it to end in {ending}{packed}"
            )
    dialect = every[found or separators[0]]
    plain = dialect.separator == "\t" and _holds_quotes(path) and not _quoted(path, dialect)
    return replace(dialect, quoted=not plain)


def _has(path: Path, dialect: Dialect, needed: Sequence[str]) -> bool:
    try:
        return set(needed) <= {name.strip() for name in names_of(_header(path, dialect))}
    except _MalformedError:
        return False


def _header(path: Path, dialect: Dialect) -> list[str]:
    with closing(records_of(path, dialect)) as records:
        return next(records, (0, []))[1]


def _quoted(path: Path, dialect: Dialect) -> bool:
    """Whether quote marks of a TSV file enclose cells.

    Spreadsheets write them that way, but in many data sets a text may begin with one. If the file can be
    read both ways, they enclose cells only if no cell then contains a line end.
    """
    marked, bare = (replace(dialect, quoted=quoted) for quoted in (True, False))
    raw = _header(path, bare)
    if raw and all(len(name) > 1 and name[0] == name[-1] == '"' for name in raw):
        return True
    quoted, plain = (_measured(path, one) for one in (marked, bare))
    if isinstance(quoted, int) and isinstance(plain, int):
        return quoted == plain
    if isinstance(quoted, int) or isinstance(plain, int):
        return isinstance(quoted, int)
    return quoted.line > plain.line  # the reading that got further


def _measured(path: Path, dialect: Dialect) -> int | _MalformedError:
    """Number of records, or the error."""
    try:
        return sum(1 for _ in records_of(path, dialect))
    except _MalformedError as error:
        return error


def records_of(
    path: Path, dialect: Dialect, *, short: bool = False, read: list[str] | None = None
) -> Generator[tuple[int, list[str]], None, None]:
    """First line and cells of each record; rows have as many cells as the header, or fewer if ``short``.

    Lines are appended to ``read`` as they are read: at each record the last one is the record's.
    """
    # The limit belongs to the process and is too low for long texts, so it is raised for good.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST))
    separator, quoted = dialect.separator, dialect.quoted
    width, row, line = 0, 0, 1
    with _reading(path, dialect) as file:
        lines = csv.reader(
            file if read is None else _noted(file, read),
            delimiter=separator,
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
            strict=True,
        )
        try:
            for cells in lines:
                if cells and (len(cells) > 1 or width == 1 or cells[0].strip()):
                    if not width and any("\0" in cell for cell in cells):
                        fix = dialect.fix.replace("cp1252", "utf-16-le")
                        raise InputError(f"{path}: the header holds NUL bytes; {fix}")
                    if width and (len(cells) > width or (len(cells) < width and not short)):
                        raise _MalformedError(
                            f"{_named(path, row, line)} has {len(cells)} field{'s' * (len(cells) != 1)}, the "
                            f"header has {width}{_remedy(len(cells), width, separator, quoted)}",
                            line,
                        )
                    yield line, cells
                    width, row = width or len(cells), row + 1
                line = lines.line_num + 1
        except csv.Error as error:
            raise _MalformedError(
                f"{_named(path, row, line)}: {_reason(error, lines.line_num)}", line
            ) from error


def _reported(records: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, list[str]]]:
    try:
        yield from records
    except _MalformedError as error:
        raise InputError(str(error)) from error.__cause__


def _named(path: Path, row: int, line: int) -> str:
    return f"{path}: row {row} (line {line})" if row else f"{path}: the header (line {line})"


def _remedy(found: int, width: int, separator: str, quoted: bool) -> str:
    if found < width or not quoted:
        return ""
    names = ", or give every column a name" if found == width + 1 else ""
    return f"; put a cell that holds {_SEPARATORS[separator]} in quote marks{names}"


def _reason(error: csv.Error, line: int) -> str:
    said = str(error)
    if "unexpected end" in said:
        return 'a quote mark (") opens a cell and none closes it'
    if "expected after" in said:
        return (
            f'a quote mark (") opens a cell, and text follows the one that closes it on line {line}; write '
            f"quote marks within a cell twice"
        )
    if "field limit" in said:
        return f"a cell has more than {_LONGEST} characters"
    return f"cannot be read ({said})"


def _noted(lines: Iterable[str], read: list[str]) -> Iterator[str]:
    for line in lines:
        read.append(line)
        yield line


@contextmanager
def _reading(path: Path, dialect: Dialect) -> Iterator[Iterable[str]]:
    """Open a file as lines of text."""
    check_file(path)
    try:
        with opened(path) as raw, decoded(raw, dialect.encoding, "") as file:
            yield file
    except UnicodeError as error:
        with opened(path) as raw:
            raise undecodable(raw, path, dialect.encoding, dialect.fix) from error


def _holds_quotes(path: Path) -> bool:
    with opened(path) as raw:
        return any(b'"' in part for part in iter(lambda: raw.read(2**20), b""))


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open the bytes of a file, unpacked."""
    try:
        packed = path.suffix.lower() == ".gz"
        with io.BufferedReader(_Unpacked(path)) if packed else path.open("rb") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: missing or damaged ({error})") from error


class _Unpacked(io.RawIOBase):
    """Unpacks a gzip file within bounds: a small file can hold more than a disk."""

    def __init__(self, path: Path) -> None:
        self._file = gzip.open(path)  # noqa: SIM115 - closed with this
        self._path = path
        self._left = max(_UNPACKED, _RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise InputError(f"{self._path}: unpacks to far more than its size; unpack it yourself")
        return count

    def close(self) -> None:
        self._file.close()
        super().close()
