"""Runs on a store: a command works on a copy, and what it wrote is copied back."""

from __future__ import annotations

import functools
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
        with ExitStack() as copies:
            for name, value in options.items():
                if name in {"run", "out"} and isinstance(value, str):
                    from turnover.remote import mirrored

                    options[name] = copies.enter_context(mirrored(value, new=name == "out"))
            command(**options)

    return on_copies
