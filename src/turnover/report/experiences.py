"""A page about reinforcement learning: which groups of experiences an agent would do better without."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from turnover.errors import InputError
from turnover.io.parsing import finite_or_none
from turnover.report.render import asset, page, plotly_js, save

if TYPE_CHECKING:
    from turnover.integrations.sb3.buffer import Label
    from turnover.integrations.sb3.influence import ExperienceInfluence

_LISTED = 20
"""Most groups in the table."""
_Q = 0.1
"""Largest q-value of a group that stands out."""
_ERRORS = 2
"""Standard errors, or ghosts' standard deviations, to either side of an interval of 95%."""


def render(
    found: ExperienceInfluence,
    *,
    contents: Mapping[Label, str] | None = None,
    title: str = "Experiences of an agent",
) -> str:
    """Render the complete page: see :func:`write`."""
    if contents is not None and not any(label in contents for label in found.labels):
        raise InputError(
            "contents names none of the groups: give a text by label, such as agent.contents()"
        )
    digits = _digits(found)
    significant = np.flatnonzero(found.q < _Q)
    data = {
        "labels": [str(label) for label in found.labels],
        "digits": digits,
        "whole": finite_or_none(found.whole),
        "returns": _returns(found),
        "effects": _effects(found),
    }
    return page(
        "experiences.html.j2",
        title,
        data,
        [plotly_js(), asset("charts.js") + asset("experiences.js")],
        page_title=title,
        whole=_amount(found.whole, digits),
        whole_se=_amount(found.whole_se, digits),
        episodes=found.episodes,
        groups=len(found.labels),
        transitions=int(found.transitions.sum()),
        blocks=sorted({int(found.blocks.min()), int(found.blocks.max())}),
        ghosts=len(found.ghost_return.p),
        false_positives=found.false_positives(),
        harmful=int((found.on_return.effect[significant] < 0).sum()),
        helpful=int((found.on_return.effect[significant] > 0).sum()),
        q=_Q,
        rows=_rows(found, contents, digits),
        with_contents=contents is not None,
    )


def write(
    found: ExperienceInfluence,
    path: str | Path,
    *,
    contents: Mapping[Label, str] | None = None,
    title: str = "Experiences of an agent",
) -> None:
    """Write the influence of groups of experiences as one HTML file, atomically.

    The page needs no other file and makes no request. It has the return without and with each group over
    time beside the noise of ghosts, the effect of each group with its interval, and the worst groups.

    Args:
        found: of ``agent.influence(env)``, of a Stable-Baselines3 agent.
        path: HTML file; its folder must exist.
        contents: what groups contain, a text by label, such as ``agent.contents()``; labels that are no
            groups are left out. ``None``: the table has no such column.
        title: of the page.

    Raises:
        InputError: no such folder, ``contents`` of none of the groups, or jinja2 or plotly is missing.

    Example:
        >>> found = agent.influence("Pendulum-v1")
        >>> turnover.report.experiences.write(found, "agent.html", contents=agent.contents())
    """
    save(render(found, contents=contents, title=title), path)


def _returns(found: ExperienceInfluence) -> dict[str, list[float | None]]:
    """Returns of both sub-networks, and where hidden ones would be by chance, about exposed ones."""
    sides = found.returns
    chance, spread = sides.exposed + sides.ghost_mean, _ERRORS * sides.ghost_spread
    return {
        "without": _plain(sides.hidden),
        "with": _plain(sides.exposed),
        "low": _plain(chance - spread),
        "high": _plain(chance + spread),
        "z": _plain(sides.z),
    }


def _effects(found: ExperienceInfluence) -> dict[str, list[Any]]:
    effect = found.on_return.effect
    kinds = np.where(~(found.q < _Q), "noise", np.where(effect < 0, "harmful", "helpful"))
    return {
        "effect": _plain(effect),
        "half_width": _plain(_ERRORS * found.on_return.se),
        "kind": kinds.tolist(),
    }


def _rows(
    found: ExperienceInfluence, contents: Mapping[Label, str] | None, digits: int
) -> list[dict[str, Any]]:
    """The worst groups, with returns as the table writes them."""
    numbers = {label: number for number, label in enumerate(found.labels)}
    rows = []
    for label in found.worst(_LISTED):
        at = numbers[label]
        rows.append(
            {
                "label": str(label),
                "transitions": int(found.transitions[at]),
                "blocks": int(found.blocks[at]),
                "effect": _amount(found.on_return.effect[at], digits, sign=True),
                "se": _amount(found.on_return.se[at], digits),
                "t": float(found.on_return.t[at]),
                "q": float(found.q[at]),
                "noise": not found.q[at] < _Q,
                "without": _amount(found.returns.hidden[at], digits),
                "with": _amount(found.returns.exposed[at], digits),
                "z": float(found.returns.z[at]),
                "bias_t": float(found.on_bias.t[at]),
                "loss_z": float(found.loss.z[at]),
                "contents": None if contents is None else contents.get(label),
            }
        )
    return rows


def _digits(found: ExperienceInfluence) -> int:
    """Decimals of returns: two significant digits of the typical standard error."""
    errors = found.on_return.se[np.isfinite(found.on_return.se) & (found.on_return.se > 0)]
    if not len(errors):
        return 1
    return min(max(1 - math.floor(math.log10(float(np.median(errors)))), 0), 6)


def _amount(value: float, digits: int, *, sign: bool = False) -> str:
    if not math.isfinite(value):
        return "\N{EN DASH}"
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _plain(values: Iterable[float]) -> list[float | None]:
    return [finite_or_none(value) for value in values]
