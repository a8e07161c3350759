"""What the sites of a network do while one of its contexts is open."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
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
    probes: dict[str, list[Tensor]] | None = None
    """If given, sites multiply by ones that require a gradient, and leave them here: one for each time that
    the site's module runs, since a model may cut off the gradient of one of them."""
    moved: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    """With ``probes``, what single runs of sites multiply by in place of ones."""
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
    thread: weakref.ref[Any] | None = None
    """The thread that opened it."""

    @property
    def of_rows(self) -> bool:
        """Whether what a row is multiplied by depends on its place in the batch."""
        return (self.ids is not None and not self.every_row) or self.probes is not None

    def probe(self, site: str, ones: Tensor) -> Tensor:
        """What a site multiplies by, with ``probes``."""
        assert self.probes is not None
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return ones.requires_grad_()  # repeated in backward(), for the sake of what was saved
        runs = self.probes.setdefault(site, [])
        moved = self.moved.get((site, len(runs)))
        runs.append(ones.requires_grad_() if moved is None else ones * moved.to(ones.device))
        return runs[-1]
