"""The exceptions a user can meet, so that callers can tell bad input from a defect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Something the user passed is wrong; the message names it and the mend.

    The command line turns it into one line on stderr and exit code 2.
    """


class BindingError(RuntimeError):
    """The network was run under the wrong binding: ids missing, or rows that do not match them."""


@contextmanager
def needing(extra: str, purpose: str) -> Iterator[None]:
    """The body imports what an extra of this package brings.

    Args:
        extra: its name, as in ``pip install 'turnover[extra]'``.
        purpose: what the import is for, as the beginning of a sentence.

    Raises:
        InputError: it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{purpose} needs {error.name}, which is not installed: pip install 'turnover[{extra}]'"
        ) from error
