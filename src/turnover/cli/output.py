"""Output of commands: tables for people, or one JSON document on stdout and the tables on stderr."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from turnover.errors import InputError
from turnover.io.files import writing_to
from turnover.io.parsing import finite_or_none

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
"""Control characters except line ends and tabs, surrogates, and marks that reverse the writing order."""


def visible(text: str) -> str:
    r"""Escape what a terminal would obey: an escape character, say, becomes ``\x1b``."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Cut:
    """A text of the data, of which a terminal shows two lines; files have the whole."""

    def __init__(self, text: str | None) -> None:
        self._text = Text(visible(" ".join((text or "").split())))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Rich prints by this."""
        lines = self._text.wrap(console, options.max_width)
        first, rest = lines[0], lines[1:]
        yield first
        if rest:
            second = Text(" ".join(line.plain.rstrip() for line in rest))
            second.truncate(options.max_width, overflow="ellipsis")
            yield second

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Rich finds the widths of columns by this."""
        return Measurement.get(console, options, self._text)


class _Console(Console):
    """Prints texts of the data as they are, in tables too: nothing in them is markup."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Rich makes every string with this."""
        return super().render_str(visible(text), **options)


class Output:
    """Prints for people and for programs.

    Args:
        as_json: keep stdout for the one document of :meth:`document`.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._console = _Console(stderr=as_json, markup=False, emoji=False)

    def say(
        self, what: str | Table | Cut, *, style: str | None = None, highlight: bool = True
    ) -> None:
        """Print for people; only a terminal breaks lines, so that paths stay whole in a file."""
        whole = isinstance(what, str) and not self._console.is_terminal
        self._console.print(what, style=style, highlight=highlight, soft_wrap=whole)

    def warn(self, what: str) -> None:
        """Print what the user should look at."""
        self.say(what, style="yellow", highlight=False)

    def table(
        self,
        columns: Iterable[str],
        rows: Iterable[Iterable[str | Cut]],
        *,
        title: str | None = None,
        bold: Container[int] = (),
    ) -> None:
        """Print a table with the rows of some numbers in bold, and marked ``*``."""
        table = Table(*columns, title=title, title_justify="left")
        for number, (first, *cells) in enumerate(rows):
            if number in bold:  # a file shows no bold
                first = f"* {first}"
            table.add_row(first, *cells, style="bold" if number in bold else None)
        self.say(table)

    def document(self, values: Any) -> None:
        """Print the JSON document if it was asked for; numbers that are not finite become null."""
        if self._as_json:
            sys.stdout.write(json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")


def command_line(name: str, *given: object) -> str:
    """A command to paste into a shell."""
    return shlex.join(["turnover", name, *map(str, given)])


def in_results(run: Path, name: str) -> Path:
    """Name a file in a run's results, and make their folder, which influence makes otherwise."""
    folder = run / "results"
    with writing_to(folder):
        folder.mkdir(exist_ok=True)
    return folder / name


def check_folder(out: Path | None) -> None:
    """Refuse a file in a folder that is missing or read-only, and one that is itself a folder."""
    if out is None:
        return
    if not out.parent.is_dir():
        raise InputError(f"{out.parent} does not exist: make the folder first")
    if not os.access(out.parent, os.W_OK):
        raise InputError(f"{out} cannot be written: permission denied in {out.parent}")
    if out.is_dir():
        raise InputError(f"{out} is a folder: name a file in it")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return finite_or_none(value) if isinstance(value, float) else value
