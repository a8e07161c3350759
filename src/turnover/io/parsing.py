"""Text files in: JSON, JSON lines and TOML that anybody may have written.

Whatever is in a file, what comes back is plain values or an :class:`InputError` that names it.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, overload

from turnover.errors import InputError, needing
from turnover.io.files import replacing

DEPTH = 64
"""Lists and objects within one another."""
_Value = TypeVar("_Value")
_LARGEST_TOML = 2**20
_DAMAGE = (
    *(KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError),
    *(ArithmeticError, RuntimeError, AssertionError, MemoryError),
)


def check_file(path: Path) -> None:
    """Whether what is there, if anything, is a file, and no pipe or device that never ends.

    Raises:
        InputError: it is something else.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: missing or damaged (not a file)")


def read_text(path: Path) -> str:
    """A file's text, without a byte order mark.

    Raises:
        InputError: it cannot be read, or is not UTF-8; the line is named.
    """
    check_file(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: missing or damaged ({error})") from error
    text = _decoded(raw, path, lambda start: raw.count(b"\n", 0, start) + 1)
    return text.removeprefix("\ufeff")


def check_utf8(path: Path, lines: Iterable[bytes]) -> None:
    """Whether the lines of a file are UTF-8.

    Raises:
        InputError: one is not; it is named.
    """
    for number, line in enumerate(lines, start=1):
        _decoded(line, path, lambda _, number=number: number)  # type: ignore[misc]


def parse_json(raw: str | bytes, where: object, *, finite: bool = True, whole: bool = True) -> Any:
    """A JSON value.

    Args:
        raw: the text.
        where: what it is of, for messages.
        finite: refuse NaN and infinities, which JSON does not know and Python writes.
        whole: refuse halves of characters, which file names may hold where they are not UTF-8.

    Raises:
        InputError: not JSON, nested too deep, numbers that are refused, or halves of characters.
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode()
        value = json.loads(text, **(_FINITE if finite else {}))
        if (
            whole and "\\u" in text
        ):  # a half of a character ("\ud800") is no text, and no file takes it
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: damaged, a text holds half a character ({error})") from error
    except ValueError as error:
        raise InputError(f"{where}: missing or damaged ({error})") from error
    except RecursionError as error:
        raise InputError(_deep(where)) from error
    if text.count("[") + text.count("{") > DEPTH and _too_deep(value):
        raise InputError(_deep(where))
    return value


def read_object(path: Path, *, finite: bool = True, whole: bool = True) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        finite: as in :func:`parse_json`.
        whole: likewise.

    Raises:
        InputError: missing, not a JSON object, or as :func:`parse_json`.
    """
    value = parse_json(read_text(path), path, finite=finite, whole=whole)
    if not isinstance(value, dict):
        raise InputError(f"{path}: damaged, not a JSON object")
    return value


def read_objects(path: Path, *, whole: bool = True) -> list[dict[str, Any]]:
    """JSON objects, one a line, or in one JSON list.

    Args:
        whole: as in :func:`parse_json`.

    Raises:
        InputError: missing, or not that; the line is named.
    """
    rows: list[Any] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        if not rows and line.lstrip()[0] == "[":
            rows = parse_json(read_text(path), path, whole=whole)
            _check_objects(enumerate(rows, start=1), f"{path}: row")
            break
        rows.append(parse_json(line, f"{path}: line {number}", whole=whole))
        _check_objects([(number, rows[-1])], f"{path}: line")
    return rows


def read_toml(path: Path) -> dict[str, Any]:
    """Values of a TOML file.

    Raises:
        InputError: no such file, larger than 1 MiB, or not TOML.
    """
    if path.is_file() and path.stat().st_size > _LARGEST_TOML:
        raise InputError(f"{path}: cannot be read as TOML: larger than 1 MiB, too much for options")
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise InputError(_deep(path)) from error
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as TOML: {error}") from error


@contextmanager
def damage(path: Path | str, mend: str = "restore it") -> Iterator[None]:
    """The body takes values out of a file that was written by us, and stumbles where it was not.

    Raises:
        InputError: the body failed.
    """
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{path}: damaged, or of another version ({error!r}); {mend}") from error


@overload
def convert(values: Any, kind: type[_Value], where: object, *, closed: bool = False) -> _Value: ...
@overload
def convert(values: Any, kind: Any, where: object, *, closed: bool = False) -> Any: ...
def convert(values: Any, kind: Any, where: object, *, closed: bool = False) -> Any:
    """Check plain values from a file against a type, and convert them to it, by msgspec.

    Integers pass for floats; nothing else changes its type, and a bool is no integer.

    Args:
        values: as JSON or TOML holds them.
        kind: a dataclass, or any type that msgspec knows: ``list[str]``, ``int | None``, ``Literal[...]``.
        where: the file, for messages.
        closed: refuse fields that the dataclass does not have.

    Raises:
        InputError: a missing field, one of another type (it is named), or one that the dataclass refuses.
    """
    with needing("reading files", "turnover[results]", "turnover[evaluation]"):
        import msgspec
    try:
        if closed and isinstance(values, dict):
            unknown = values.keys() - {one.name for one in fields(kind)}
            if unknown:
                raise ValueError(f"unknown fields {', '.join(map(repr, sorted(unknown)))}")
        return msgspec.convert(values, kind)
    except ValueError as error:
        raise InputError(
            f"{where}: damaged, or of another version ({error}); restore it"
        ) from error


def field(values: Mapping[str, Any], name: str, kind: type, where: object) -> Any:
    """A value of an object, of the type it must have: an int is a float too, and a bool neither.

    Raises:
        InputError: missing, or of another type.
    """
    value = values.get(name)
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{where}: damaged, {name!r} must be of the type {kind.__name__}")
    return value


def strings(values: Mapping[str, Any], name: str, where: object) -> list[str]:
    """A list of texts in an object.

    Raises:
        InputError: missing, or something else.
    """
    found = field(values, name, list, where)
    if not all(isinstance(one, str) for one in found):
        raise InputError(f"{where}: damaged, {name!r} must hold texts")
    return list(found)


def _lines(path: Path) -> Iterator[str]:
    check_file(path)
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                yield _decoded(line, path, lambda _, number=number: number)  # type: ignore[misc]
    except OSError as error:
        raise InputError(f"{path}: missing or damaged ({error})") from error


def _decoded(raw: bytes, path: Path, line: Callable[[int], int]) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: line {line(error.start)}: not UTF-8 ({error.reason}); restore it, or write it as UTF-8"
        ) from error


def _refuse(number: str) -> float:
    raise ValueError(f"{number} is no number that JSON knows")


def _float(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse(number)


_FINITE: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _float}


def _check_objects(rows: Iterable[tuple[int, Any]], where: str) -> None:
    for number, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{where} {number}: damaged, not a JSON object")


def _deep(where: object) -> str:
    return f"{where}: damaged, more than {DEPTH} lists and objects within one another"


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, dict | list) for one in level)


_CHECKSUM = "checksum"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, without its checksum where it has one.

    Raises:
        InputError: missing, not a JSON object, or not what its checksum is of.
    """
    values = read_object(path, finite=False, whole=False)
    checksum = values.pop(_CHECKSUM, None)
    if checksum is not None and checksum != _checksum(values):
        raise InputError(
            f"{path}: damaged, or changed after it was written: it does not match its {_CHECKSUM}; "
            f"restore it, or run the command that wrote it again"
        )
    return values


def write_json(path: Path, values: dict[str, Any], *, sealed: bool = False) -> None:
    """Write a JSON object, atomically.

    Args:
        sealed: with a checksum, which :func:`read_json` compares.
    """
    if sealed:
        values = {**values, _CHECKSUM: _checksum(json.loads(json.dumps(values)))}
    with replacing(path) as draft:
        draft.write_text(json.dumps(values, indent=2) + "\n")


def _checksum(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def finite_or_none(value: float) -> float | None:
    """A plain float; ``None``, JSON's null, where it is not finite."""
    number = float(value)
    return number if math.isfinite(number) else None
