"""Progress bars: widgets in notebooks that have ipywidgets, text elsewhere."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import TqdmWarning

with warnings.catch_warnings():
    # A notebook without ipywidgets gets a bar of text, which is no reason for a warning on import.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

__all__ = ["set_total", "slowly", "stages", "tqdm"]

_WAIT = 1.0
"""Seconds after which a step that is taking long gets a bar."""

_T = TypeVar("_T")


def slowly(
    items: Iterable[_T], title: str, unit: str = "batch", *, shown: bool = True
) -> Iterator[_T]:
    """Go through items with a bar that is there only while it takes long."""
    yield from tqdm(items, title, unit=unit, delay=_WAIT, leave=False, disable=not shown)


@contextmanager
def stages(title: str, count: int) -> Iterator[Callable[[str], None]]:
    """Show a bar of stages; what it yields begins one by its name.

    Only a terminal shows it: in a file a refusal is to be one line.
    """
    with tqdm(total=count, desc=title, unit="stage", leave=False, disable=None) as bar:
        begun = 0

        def begin(name: str) -> None:
            nonlocal begun
            bar.update(begun - bar.n)
            bar.set_description(f"{title}: {name}")
            begun += 1

        yield begin


def set_total(bar: Any, total: int) -> None:
    """Set the total of a bar that began without one; a notebook's widget keeps its own."""
    bar.total = total
    if hasattr(bar, "container"):
        widget = bar.container.children[1]
        widget.max, widget.bar_style, widget.layout.width = total, "", None
