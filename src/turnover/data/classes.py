"""Labels as classes: their names, their order, and names that look like two spellings of one."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

from turnover.data.delimited import Texts
from turnover.data.tables import column_of
from turnover.errors import InputError

_NUMBER = re.compile(r"[+-]?(?:\d+[.,]?\d*|[.,]\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"(-?(?:0|[1-9]\d*))(?:\.0+)?", re.ASCII)
_MANY_NUMBERS = 20
_MISSING_NUMBERS = {"nan", "na", "n/a", "none", "null", "-", "?"}
_LONGEST_NUMBER = 100
"""Longest label that is compared as a number, in characters."""
_SHOWN = 20
_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u2060\ufeff"))
"""Characters that no screen shows, such as byte order marks within a file."""


def label_names(
    table: Any, column: str, source: str, classes: Sequence[str] | None = None
) -> list[str]:
    """Read a label column as class names; refuse missing labels, regression and multi-label targets.

    A CSV file may write the ``classes`` of the training data in another way (1.0, TRUE).
    """
    feature = table.features[column]
    values = column_of(table, column, source)
    if hasattr(feature, "int2str"):
        return _names_of_indexes(feature.names, values, column, source)
    for row, value in enumerate(values):
        if isinstance(value, list | dict | tuple):
            raise InputError(
                f"{source}: column {column!r} holds lists, a multi-label target, which is not "
                f"supported: give one class per row"
            )
        if is_missing(value):
            raise InputError(f"{source}: row {row + 1} has no label in column {column!r}")
    if isinstance(table, Texts):
        return _names_of_texts(values, classes, column, source)
    truth = next((value for value in values if isinstance(value, bool)), None)
    numbers = [value for value in values if isinstance(value, int | float)]
    if numbers and any(isinstance(value, str) for value in values):
        raise InputError(
            f"{source}: column {column!r} mixes texts and numbers such as {numbers[0]} as labels; write "
            f"all of them as texts"
        )
    numbers = [value for value in numbers if not isinstance(value, bool)]
    if truth is not None and numbers:
        raise InputError(
            f"{source}: column {column!r} mixes {truth} and numbers such as {numbers[0]} as labels; write "
            f"all of them in one way"
        )
    real = next((v for v in values if isinstance(v, float | Decimal) and v % 1), None)
    if real is not None:
        raise InputError(_regression(real, column, source))
    return [str(int(value)) if isinstance(value, float) else str(value) for value in values]


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: ``None``, NaN (as pandas writes it) or blanks."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def indexed(
    names: Sequence[str], classes: Sequence[str] | None, source: str, where: str
) -> tuple[list[int], list[str]]:
    """Class index of each label, and the classes; refuse labels other than ``classes`` if they are given.

    Messages name the ``source``, and ``where`` in it the labels are.
    """
    if classes is None:
        check_alike(set(names), source, f"classes of {where}")
    known = list(classes) if classes is not None else _sorted_classes(names)
    index = {name: position for position, name in enumerate(known)}
    for row, name in enumerate(names):
        if name not in index:
            close = next((one for one in known if _loosely(one) == _loosely(name)), None)
            listed = ", ".join(known[:_SHOWN]) + (", ..." if len(known) > _SHOWN else "")
            raise InputError(
                f"{source}: unknown label {name!r} in row {row + 1}; the classes are {listed}"
                f"{_hint(name, close)}"
            )
    if len(known) < 2:
        raise InputError(
            f"{source}: {where} holds the one class {known[0]!r}; a classifier needs two or more"
        )
    return [index[name] for name in names], known


def check_alike(names: Iterable[str], source: str, what: str) -> None:
    """Refuse names that look alike, and warn of names that differ in case or are one number."""
    names = sorted(names)
    for one, other in _pairs(names, _seen)[:1]:
        if _without_blanks(one) == _without_blanks(other):
            said = f"{one!r} and {other!r} differ in blanks alone"
        else:
            said = f"{one!a} and {other!a} look alike, and are different characters"
        raise InputError(f"{source}: {what}: {said}; write them alike")
    pairs = _pairs(names, _loosely)
    if pairs:
        listed = ", ".join(f"{one!r} and {other!r}" for one, other in pairs[:3])
        more = f" and {len(pairs) - 3} more pairs" if len(pairs) > 3 else ""
        warnings.warn(
            f"{source}: {what}: {listed}{more} are kept apart, though they differ in case alone or are "
            f"one number",
            stacklevel=2,
        )


def closest(name: str, names: Sequence[str]) -> str:
    """Hint at the name that is closest to an unknown one, or an empty text."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""


def _hint(name: str, close: str | None) -> str:
    if close is None:
        return ""
    if _seen(name) == _seen(close) and _without_blanks(name) != _without_blanks(close):
        return f"; it looks like {close!r}, but is written as {name!a} instead of {close!a}"
    return f"; did you mean {close!r}?"


def _pairs(names: Iterable[str], alike: Callable[[str], object]) -> list[tuple[str, str]]:
    first: dict[object, str] = {}
    met = ((first.setdefault(alike(name), name), name) for name in names)
    return [(one, other) for one, other in met if one != other]


def _without_blanks(name: str) -> str:
    return " ".join(name.split())


def _seen(name: str) -> str:
    """Normalize a name so that names a person cannot tell apart become equal."""
    return _without_blanks(unicodedata.normalize("NFC", name.translate(_INVISIBLE)))


def _loosely(name: str) -> str | float:
    """Normalize a name so that names that differ in case or blanks, or are one number, become equal."""
    bare = _seen(name)
    if len(bare) <= _LONGEST_NUMBER and _NUMBER.fullmatch(bare) and "," not in bare:
        value = float(bare)
        return value if abs(value) < 2**53 else bare
    return bare.casefold()


def _names_of_texts(
    values: Sequence[str], classes: Sequence[str] | None, column: str, source: str
) -> list[str]:
    """Labels of a CSV file as written, but whole numbers without ``.0`` and booleans in one case."""
    distinct = set(values)
    if classes is not None and distinct <= set(classes):
        return list(values)
    real = [one for one in distinct if _is_real(one)]
    if real and _is_regression(distinct, real):
        raise InputError(_regression(min(real), column, source))
    whole = {one: found[1] for one in distinct if (found := _WHOLE.fullmatch(one))}
    if len(whole) == len(distinct):
        return [whole[one] for one in values]
    booleans = {one.lower() for one in distinct} <= {"true", "false"}
    if booleans and (classes is not None or len(distinct) > 2):
        known = {one.lower(): one for one in classes or ("True", "False")}
        return [known.get(one.lower(), one) for one in values]
    return list(values)


def _is_regression(labels: set[str], real: Sequence[str]) -> bool:
    """Whether labels, some of which are real numbers, are a regression target and not codes."""
    others = {one.casefold() for one in labels if not _NUMBER.fullmatch(one)}
    if len(real) > _MANY_NUMBERS:
        return others <= _MISSING_NUMBERS
    return not others and any("," not in one for one in real)


def _is_real(cell: str) -> bool:
    if len(cell) > _LONGEST_NUMBER or not _NUMBER.fullmatch(cell):
        return False
    return not float(cell.replace(",", ".")).is_integer()


def _regression(value: object, column: str, source: str) -> str:
    return (
        f"{source}: column {column!r} holds real numbers such as {value}, a regression target, "
        f"which is not supported: give one class per row, with a name that is not a number"
    )


def _names_of_indexes(
    classes: Sequence[str], values: Sequence[Any], column: str, source: str
) -> list[str]:
    for row, value in enumerate(values):
        if not isinstance(value, int) or not 0 <= value < len(classes):
            raise InputError(
                f"{source}: row {row + 1} has no label in column {column!r}: {value} is none of its "
                f"{len(classes)} classes"
            )
    return [classes[value] for value in values]


def _sorted_classes(names: Sequence[str]) -> list[str]:
    """Sort by value if all names are integers, else by name."""
    distinct = set(names)
    if all(
        len(name) <= _LONGEST_NUMBER and name.removeprefix("-").isdecimal() for name in distinct
    ):
        return sorted(distinct, key=lambda name: (int(name), name))
    return sorted(distinct)
