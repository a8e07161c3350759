"""Progress bars: widgets in notebooks that have ipywidgets, text elsewhere."""

import warnings
from typing import Any

from tqdm import TqdmWarning

with warnings.catch_warnings():
    # A notebook without ipywidgets gets a bar of text, which is no reason for a warning on import.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

__all__ = ["set_total", "tqdm"]


def set_total(bar: Any, total: int) -> None:
    """Set the total of a bar that began without one; a notebook's widget keeps its own."""
    bar.total = total
    if hasattr(bar, "container"):
        widget = bar.container.children[1]
        widget.max, widget.bar_style, widget.layout.width = total, "", None
