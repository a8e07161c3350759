"""What a command says: tables for people, or one JSON document on stdout and the tables on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from turnover.errors import InputError
from turnover.io.files import writing_to
from turnover.io.parsing import finite_or_none

_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
"""Control characters but line ends and tabs, halves of characters, and marks that turn the order around."""


def visible(text: str) -> str:
    r"""A text of which a terminal obeys nothing: an escape, say, is written as ``\x1b``."""
    return _OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Console(Console):
    """One on which texts of the data are shown as they are: nothing in them means anything."""

    def render_str(self, text: str, **options: Any) -> Text:
        """What Rich makes of every string, those in tables too."""
        return super().render_str(visible(text), **options)


class Output:
    """Where a command prints.

    Args:
        as_json: keep stdout for the one document of :meth:`document`.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        # Neither brackets nor colons.
        self._console = _Console(stderr=as_json, markup=False, emoji=False)

    def say(self, what: str | Table, *, style: str | None = None, highlight: bool = True) -> None:
        """Print for people; lines are broken for a terminal alone, so that paths stay whole in a file."""
        whole = isinstance(what, str) and not self._console.is_terminal
        self._console.print(what, style=style, highlight=highlight, soft_wrap=whole)

    def document(self, values: Any) -> None:
        """The JSON document, where it is asked for. Numbers that are not finite are null in it."""
        if self._as_json:
            sys.stdout.write(json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def in_results(run: Path, name: str) -> Path:
    """A file in the results of a run, whose folder may not be there before influence is estimated."""
    folder = run / "results"
    with writing_to(folder):
        folder.mkdir(exist_ok=True)
    return folder / name


def check_folder(out: Path | None) -> None:
    """Whether a file can be written there.

    Raises:
        InputError: its folder does not exist or cannot be written, or it is itself a folder.
    """
    if out is None:
        return
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} does not exist: make the folder first")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"{out} cannot be written: {out.parent} is not ours to write")
    if out.is_dir():
        raise InputError(f"{out} is a folder: name a file in it")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return finite_or_none(value) if isinstance(value, float) else value
