"""What the sites of a network do while one of its contexts is open."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Binding:
    """The ids of a batch, and what the sites do with them."""

    ids: Tensor | None = None
    hidden: bool | Tensor = False
    broadcast: bool = False
    """One row may become as many rows as there are ids (how exact influence shares work)."""
    of_site: dict[str, Tensor] = field(default_factory=dict)
    """Ids of single sites, in place of ``ids``."""
    every_row: bool = False
    """The one id is that of every row, however many there are."""
    sites: frozenset[str] | None = None
    """The sites that are masked or probed; at others the network runs whole. ``None``: all."""
    probes: dict[str, Tensor] | None = None
    """If given, sites multiply by ones that require a gradient, and leave them here."""
    masks: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[tuple[str, torch.dtype], Tensor] | None = None
    """If given, rows are the ids exposed and, behind them, hidden; and masks as scaled numbers are kept
    here, for the next forward under the same binding."""
    split: str | None = None
    """With ``factors``, the site that lets only the exposed rows pass."""
    whole: Tensor | None = None
    """What came to that site, before the mask."""
    exposed: Tensor | None = None
    """What that site let pass."""
    first_node: int = 0
    last_node: int | None = None


def next_node() -> int:
    """The number that autograd will give to the next node made in this thread."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]


def made_in(candidates: Iterable[Binding]) -> Binding | None:
    """The binding under which the autograd node that is running now was made, if it is known.

    Autograd numbers its nodes in order of creation.
    """
    node: Any = torch._C._current_autograd_node()
    if node is None:
        return None
    number = node._sequence_nr()
    for binding in sorted(candidates, key=lambda b: b.first_node, reverse=True):
        if binding.first_node <= number and (
            binding.last_node is None or number < binding.last_node
        ):
            return binding
    return None
