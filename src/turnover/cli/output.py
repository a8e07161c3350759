"""What a command says: tables for people, or one JSON document on stdout and the tables on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from turnover.errors import InputError
from turnover.files import writing_to


class Output:
    """Where a command prints.

    Args:
        as_json: keep stdout for the one document of :meth:`document`.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        # Texts of the data are shown as they are: brackets and colons in them mean nothing.
        self._console = Console(stderr=as_json, markup=False, emoji=False)

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
    return None if isinstance(value, float) and not math.isfinite(value) else value
