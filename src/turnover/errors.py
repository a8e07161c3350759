"""The exceptions a user can meet, so that callers can tell bad input from a defect."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user passed is wrong; the message names it and the mend.

    The command line turns it into one line on stderr and exit code 2.
    """


class BindingError(RuntimeError):
    """The network was run under the wrong binding: ids missing, or rows that do not match them."""
