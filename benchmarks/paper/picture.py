"""Draws the picture of ``docs/paper.md`` from the figures: cleansing by share, and losses over training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent.parent / "docs" / "paper.svg"
_STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2933 }
  .small { font-size: 11px; fill: #52606d }
  .card { fill: #ffffff; stroke: #d5dbe1 }
  .axis { stroke: #9aa5b1; stroke-width: 1 }
  polyline { fill: none; stroke-width: 2 }
  .a { stroke: #00796b } .b { stroke: #c25100 } .c { stroke: #2457a6 }
  .d { stroke: #8a94a6 } .e { stroke: #a6248e }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e7eb } .small { fill: #9aa5b1 }
    .card { fill: #1e2129; stroke: #3a414c } .axis { stroke: #66707c }
    .a { stroke: #4db6ac } .b { stroke: #ff9a4d } .c { stroke: #7ea7ee }
    .d { stroke: #9aa5b1 } .e { stroke: #e07fd0 }
  }
"""
_RANKINGS = {
    "gram": "gram",
    "turn-over": "turn-over",
    "loss": "highest loss",
    "self-influence": "self-influence",
    "random": "random",
}
_NETWORK = "BERT, LoRA and a wide head"
_CURVES = {
    "train_exposed": "train exposed",
    "train_hidden": "train hidden",
    "test_hidden": "test hidden",
}


@dataclass(frozen=True)
class Panel:
    """One chart of lines.

    Attributes:
        title: above it.
        below: label of the horizontal axis.
        ticks: labels of its places, equally far apart.
        lines: by name, a number per place.
        low: bottom of the vertical axis.
        high: its top.
        form: how its ends are written.
    """

    title: str
    below: str
    ticks: Sequence[str]
    lines: dict[str, list[float]]
    low: float
    high: float
    form: str


def panels(found: dict[str, Any]) -> list[Panel]:
    """Accuracy on another domain by the share removed, and the losses of the BERT."""
    shift, bert = found["shift"], found["hidden"]["networks"][_NETWORK]
    shares = list(next(iter(shift["curves"].values())))
    removed = {
        name: [100 * shift["curves"][key][share]["accuracy"][0] for share in shares]
        for key, name in _RANKINGS.items()
    }
    losses = {name: [mean for mean, *_ in bert["curves"][key]] for key, name in _CURVES.items()}
    return [
        Panel(
            "Accuracy on another domain, %",
            "training rows removed",
            [f"{float(share):.0%}" for share in shares],
            removed,
            74,
            80,
            "{:.0f}",
        ),
        Panel(
            "Loss of a BERT, nats",
            "training steps",
            [str(step) for step in bert["steps"]],
            losses,
            0,
            1.5,
            "{:.1f}",
        ),
    ]


def drawn(found: dict[str, Any]) -> str:
    """The picture."""
    shapes = [_panel(one, 20 + 440 * i) for i, one in enumerate(panels(found))]
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 300" role="img">',
            "<title>Cleansing for another domain, and losses of sub-networks over training</title>",
            f"<style>{_STYLE}</style>",
            '<rect class="card" x=".5" y=".5" width="899" height="299" rx="10"/>',
            *shapes,
            "</svg>\n",
        ]
    )


def _panel(one: Panel, left: int) -> str:
    top, bottom, width = 50, 245, 270
    x = [left + 30 + width * i / (len(one.ticks) - 1) for i in range(len(one.ticks))]

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - one.low) / (one.high - one.low)

    shapes = [
        f'<text x="{left}" y="28">{one.title}</text>',
        f'<path class="axis" fill="none" d="M{left + 30} {top} V{bottom} H{left + 30 + width}"/>',
        *(
            f'<text class="small" x="{left + 24}" y="{y(value) + 4:.1f}" text-anchor="end">'
            f"{one.form.format(value)}</text>"
            for value in (one.low, one.high)
        ),
        *(
            f'<text class="small" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{tick}</text>'
            for at, tick in zip(x, one.ticks, strict=True)
        ),
        f'<text class="small" x="{left + 30 + width / 2}" y="{bottom + 36}" text-anchor="middle">'
        f"{one.below}</text>",
    ]
    ends = _spread([y(values[-1]) for values in one.lines.values()])
    for kind, (name, values), end in zip("abcde", one.lines.items(), ends, strict=False):
        points = " ".join(f"{at:.1f},{y(value):.1f}" for at, value in zip(x, values, strict=True))
        shapes.append(f'<polyline class="{kind}" points="{points}"/>')
        shapes.append(f'<text class="small" x="{x[-1] + 8:.1f}" y="{end + 4:.1f}">{name}</text>')
    return "\n".join(shapes)


def _spread(heights: list[float], apart: float = 13) -> list[float]:
    """Heights of labels that do not overlap."""
    placed = list(heights)
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    for before, after in pairwise(order):
        placed[after] = max(placed[after], placed[before] + apart)
    return placed
