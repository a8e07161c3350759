"""Runs on a store: a command works on a copy, and what it wrote is copied back."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any


def place(given: str) -> Path | str:
    """A folder's path; a URL as it is."""
    return given if "://" in given else Path(given)


def anywhere(command: Callable[..., None]) -> Callable[..., None]:
    """The command, for which the URL of a run is as good as its folder."""

    @functools.wraps(command)
    def on_copies(**options: Any) -> None:
        urls = []
        with ExitStack() as copies:
            for name, value in options.items():
                if name in {"run", "out"} and isinstance(value, str):
                    from turnover.runs.remote import mirrored

                    urls.append(value)
                    options[name] = copies.enter_context(mirrored(value, new=name == "out"))
            command(**options)
        for url in urls:
            sys.stderr.write(f"what was written in the run is in {url}\n")

    return on_copies
