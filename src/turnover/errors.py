"""Exceptions, which separate the user's errors from defects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real


class InputError(ValueError):
    """Invalid input; the message names the cause and the fix.

    The command line prints it as one line on stderr and exits with code 2.
    """


class WriteError(InputError):
    """A full disk, or a location without write permission; the same call resumes what was written."""


class BindingError(RuntimeError):
    """A run of the network without ids, or with ids that do not match the rows."""


def check_whole(name: str, value: object, least: int) -> None:
    """Refuse what is not a whole number, or too small; ``True`` and ``False`` are no numbers."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} must be a whole number >= {least}, got {value!r}")
    if value < least:
        raise InputError(f"{name} must be >= {least}, got {value}")


def check_number(name: str, value: object, *, finite: bool = True, also: str = "") -> None:
    """Refuse what is no number from 0 up; ``also`` names what else may stand there."""
    number = isinstance(value, Real) and not isinstance(value, bool) and float(value) >= 0
    if not number or (finite and value == float("inf")):
        raise InputError(f"{name} must be a number >= 0{also}, got {value!r}")


@contextmanager
def needing(purpose: str, *packages: str) -> Iterator[None]:
    """Context for imports of optional packages.

    Args:
        purpose: purpose of the import, a singular noun that begins the message.
        packages: alternatives for pip, such as ``turnover[results]``.
    """
    try:
        yield
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        why = "which is not installed" if missing else f"which cannot be imported ({error})"
        fix = ", or ".join(f"pip install '{package}'" for package in packages)
        raise InputError(f"{purpose} needs {error.name}, {why}: {fix}") from error
