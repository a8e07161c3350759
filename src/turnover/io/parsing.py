"""Read JSON, JSON lines and TOML that anybody may have written, and check their values.

A corrupt or malicious file raises an :class:`InputError` that names it.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import math
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import IO, Any, TypeVar, overload

from turnover.errors import InputError, needing
from turnover.io.files import replacing

DEPTH = 64
"""Most levels of nested lists and objects."""
UTF8 = "utf-8"
ENCODED = "write it as UTF-8, or name its encoding (such as --encoding cp1252)"
_Value = TypeVar("_Value")
_LARGEST_TOML = 2**20
_CHECKSUM = "checksum"
_DAMAGE = (
    *(KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError),
    *(ArithmeticError, RuntimeError, AssertionError, MemoryError),
)


def check_file(path: Path) -> None:
    """Refuse a pipe or a device, which never ends, or a folder; a missing file passes."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: missing or damaged (not a file)")


def read_text(path: Path, encoding: str = UTF8, *, own: bool = True) -> str:
    """Read a file of text, without its byte order mark (``own`` as in :func:`read_lines`)."""
    return "".join(read_lines(path, encoding, own=own))


def check_encoding(name: str) -> str:
    """Return Python's name of an encoding of texts; refuse an unknown one."""
    try:
        "a".encode(name)
        return codecs.lookup(name).name
    except (LookupError, ValueError) as error:
        raise InputError(
            f"unknown encoding {name!r}: give one such as utf-8, cp1252, latin-1, utf-16 or gb18030"
        ) from error


def decoded(file: IO[bytes], encoding: str, newline: str) -> io.TextIOWrapper:
    """Read bytes as text, without a byte order mark (``newline`` as in :func:`open`)."""
    name = check_encoding(encoding)
    return io.TextIOWrapper(file, "utf-8-sig" if name == UTF8 else name, newline=newline)


def undecodable(file: IO[bytes], path: Path, encoding: str, fix: str) -> InputError:
    """Make the error for bytes that are not in an encoding, with their line and the ``fix`` for it."""
    name = check_encoding(encoding)
    decoder, line, why = codecs.getincrementaldecoder(name)(), 1, "it ends within a character"
    try:
        for part in file:
            line += decoder.decode(part).count("\n")
    except UnicodeError as error:
        why = getattr(error, "reason", str(error))
    shown = name.upper() if name == UTF8 else encoding
    return InputError(f"{path}: line {line}: not {shown} ({why}); {fix}")


def parse_json(raw: str | bytes, where: object, *, own: bool = False) -> Any:
    """Parse a JSON value; refuse deep nesting, NaN, infinities and lone surrogates.

    Args:
        raw: the text.
        where: the file, for messages.
        own: turnover wrote it, so NaN, infinities and lone surrogates (of file names) are accepted.
    """
    try:
        text = raw if isinstance(raw, str) else raw.decode()
        value = json.loads(text, **({} if own else _FINITE))
        if not own and "\\u" in text:  # no file takes a lone surrogate ("\ud800")
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: damaged, a text holds a lone surrogate ({error})") from error
    except ValueError as error:
        raise InputError(f"{where}: missing or damaged ({error})") from error
    except RecursionError as error:
        raise InputError(_deep(where)) from error
    if text.count("[") + text.count("{") > DEPTH and _too_deep(value):
        raise InputError(_deep(where))
    return value


def read_object(path: Path, *, own: bool = False) -> dict[str, Any]:
    """Read a JSON object (``own`` as in :func:`parse_json`)."""
    return _object(parse_json(read_text(path), path, own=own), path)


def read_objects(path: Path, encoding: str = UTF8, *, own: bool = False) -> list[dict[str, Any]]:
    """Read JSON objects, one per line or in one JSON list (``own`` as in :func:`parse_json`)."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_lines(path, encoding, own=own), start=1):
        if not rows and line.lstrip().startswith("["):
            text = read_text(path, encoding, own=own)
            listed = enumerate(parse_json(text, path, own=own), start=1)
            return [_object(row, f"{path}: row {index}") for index, row in listed]
        if line.strip():
            where = f"{path}: line {number}"
            rows.append(_object(parse_json(line, where, own=own), where))
    return rows


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file of at most 1 MiB."""
    if path.is_file() and path.stat().st_size > _LARGEST_TOML:
        raise InputError(f"{path}: cannot be read as TOML: larger than 1 MiB, too much for options")
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise InputError(_deep(path)) from error
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as TOML: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that :func:`write_json` wrote, and compare its checksum if it has one."""
    values = read_object(path, own=True)
    stored = values.pop(_CHECKSUM, None)
    if stored is not None and stored != checksum(values):
        raise InputError(
            f"{path}: damaged, or changed after it was written: it does not match its {_CHECKSUM}; "
            f"restore it, or run the command that wrote it again"
        )
    return values


def write_json(path: Path, values: dict[str, Any], *, sealed: bool = False) -> None:
    """Write a JSON object, atomically; if ``sealed``, with a checksum that :func:`read_json` compares."""
    if sealed:
        values = {**values, _CHECKSUM: checksum(json.loads(json.dumps(values)))}
    with replacing(path) as draft:
        draft.write_text(json.dumps(values, indent=2) + "\n")


def checksum(values: Any) -> str:
    """Hash JSON values, in any order of their fields: 32 hexadecimal digits."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def finite_or_none(value: float) -> float | None:
    """Convert a number to float, or to ``None`` (JSON's null) if it is not finite."""
    number = float(value)
    return number if math.isfinite(number) else None


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


@contextmanager
def damage(path: Path | str, fix: str = "restore it") -> Iterator[None]:
    """Report errors of the body, which uses values of a file, as damage to it, with the ``fix`` for it."""
    try:
        yield
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{path}: damaged, or of another version ({error!r}); {fix}") from error


def read_lines(path: Path, encoding: str = UTF8, *, own: bool = True) -> Iterator[str]:
    """Read the lines of a file of text, without its byte order mark.

    Args:
        path: the file.
        encoding: of the file.
        own: turnover wrote it, or reads it as UTF-8 alone; otherwise an error names ``--encoding``.
    """
    check_file(path)
    try:
        with path.open("rb") as raw:
            try:
                yield from decoded(raw, encoding, "\n")
            except UnicodeError as error:
                with path.open("rb") as again:
                    fix = "restore it, or write it as UTF-8" if own else ENCODED
                    raise undecodable(again, path, encoding, fix) from error
    except OSError as error:
        raise InputError(f"{path}: missing or damaged ({error})") from error


def _refuse(number: str) -> float:
    raise ValueError(f"{number} is not a finite number")


def _float(number: str) -> float:
    value = float(number)
    return value if math.isfinite(value) else _refuse(number)


_FINITE: dict[str, Any] = {"parse_constant": _refuse, "parse_float": _float}


def _object(value: Any, where: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: damaged, not a JSON object")
    return value


def _deep(where: object) -> str:
    return f"{where}: damaged, lists and objects are nested more than {DEPTH} deep"


def _too_deep(value: Any, left: int = DEPTH) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return left == 0 or any(_too_deep(one, left - 1) for one in inner)
