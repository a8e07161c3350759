"""The exceptions a user can meet, so that callers can tell bad input from a defect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user passed is wrong; the message names it and the mend.

    The command line turns it into one line on stderr and exit code 2.
    """


class WriteError(InputError):
    """A disk is full, or a place cannot be written. What was begun is kept, and the same call goes on."""


class BindingError(RuntimeError):
    """The network was run under the wrong binding: ids missing, or rows that do not match them."""


@contextmanager
def needing(purpose: str, *packages: str) -> Iterator[None]:
    """The body imports what the core does not bring.

    Args:
        purpose: what the import is for, one thing, as the beginning of a sentence.
        packages: what pip installs, such as ``turnover[results]``; of several any one will do.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        why = "which is not installed" if missing else f"which cannot be imported ({error})"
        mend = ", or ".join(f"pip install '{package}'" for package in packages)
        raise InputError(f"{purpose} needs {error.name}, {why}: {mend}") from error
