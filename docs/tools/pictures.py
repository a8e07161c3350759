"""Draws the pictures of docs/method.md: ``python docs/tools/pictures.py``. The masks are real ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from turnover import MaskSpec

DOCS = Path(__file__).parents[1]
UNITS = 24
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2933 }
  .small { font-size: 12px; fill: #52606d }
  .card { fill: #ffffff; stroke: #d5dbe1 }
  .on { fill: #00796b; stroke: #00796b }
  .off { fill: none; stroke: #9aa5b1; stroke-dasharray: 2 2 }
  .wire { stroke: #00796b; stroke-width: 1.2 }
  .cut { stroke: #c3cbd3; stroke-width: .7 }
  .plain { fill: #52606d }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e7eb } .small { fill: #9aa5b1 }
    .card { fill: #1e2129; stroke: #3a414c }
    .on { fill: #4db6ac; stroke: #4db6ac } .off { stroke: #66707c }
    .wire { stroke: #4db6ac } .cut { stroke: #3a414c } .plain { fill: #9aa5b1 }
  }
"""


def picture(title: str, width: int, height: int, shapes: Iterable[str]) -> str:
    """A card that follows the reader's light or dark setting."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="card" x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10"/>',
            *shapes,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """Words, with (x, y) at the anchor of their base line."""
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'


def masks(spec: MaskSpec, instances: Sequence[tuple[int, str]]) -> str:
    """One row of units for each instance; filled ones it trains."""
    ids = torch.tensor([one for one, _ in instances])
    left, cell = 250, 18
    shapes = [text(left, 34, f"{UNITS} units of a site", "small")]
    for row, ((one, words), mask) in enumerate(
        zip(instances, spec.exposed(ids, "head.activation", UNITS).tolist(), strict=True)
    ):
        y = 50 + 44 * row
        shapes += [text(20, y + 13, f"“{words}”"), text(20, y + 29, f"id {one}", "small")]
        for unit, kept in enumerate(mask):
            kind = "on" if kept else "off"
            x = left + cell * unit
            shapes.append(f'<rect class="{kind}" x="{x}" y="{y}" width="13" height="13" rx="2"/>')
    y = 50 + 44 * len(instances) + 18
    shapes += [
        f'<rect class="on" x="{left}" y="{y - 11}" width="13" height="13" rx="2"/>',
        text(left + 20, y, "exposed: trained by it, in every epoch", "small"),
        f'<rect class="off" x="{left + 290}" y="{y - 11}" width="13" height="13" rx="2"/>',
        text(left + 310, y, "hidden: never", "small"),
    ]
    return picture("Masks of three training instances", 700, y + 20, shapes)


def sub_networks(mask: Sequence[bool]) -> str:
    """The exposed and the hidden sub-network of one instance, and the difference of their losses."""
    shapes: list[str] = []
    for left, name, loss, kept in (
        (30, "exposed sub-network of z", "L(exposed)", list(mask)),
        (390, "hidden sub-network of z", "L(hidden)", [not bit for bit in mask]),
    ):
        shapes += [text(left, 36, name), text(left, 54, _SAID[name], "small")]
        inputs = [(left + 60 + 45 * i, 250) for i in range(5)]
        units = [(left + 10 + 34 * i, 160) for i in range(len(kept))]
        outputs = [(left + 105 + 70 * i, 85) for i in range(2)]
        wires = [(a, b, on) for b, on in zip(units, kept, strict=True) for a in inputs + outputs]
        for (x1, y1), (x2, y2), on in sorted(wires, key=lambda wire: wire[2]):
            kind = "wire" if on else "cut"
            shapes.append(f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>')
        for x, y in inputs + outputs:
            shapes.append(f'<circle class="plain" cx="{x}" cy="{y}" r="6"/>')
        for (x, y), on in zip(units, kept, strict=True):
            kind = "on" if on else "off"
            shapes.append(f'<circle class="card" cx="{x}" cy="{y}" r="9"/>')
            shapes.append(f'<circle class="{kind}" cx="{x}" cy="{y}" r="9"/>')
        shapes.append(text(left + 205, 90, loss))
        shapes.append(text(left + 150, 280, "the target", "small", "middle"))
    shapes.append(
        text(350, 320, "influence of z on the target = L(hidden) - L(exposed)", anchor="middle")
    )
    return picture("Exposed and hidden sub-network of one training instance", 700, 345, shapes)


_SAID = {
    "exposed sub-network of z": "got every gradient of z",
    "hidden sub-network of z": "got none of them; the other instances trained it",
}


def drawn() -> dict[str, str]:
    """All pictures: file name to content."""
    spec = MaskSpec(keep=0.5, seed=0)
    instances = [(17, "a fine warm film"), (18, "a dull cold film"), (19, "moving, wise and funny")]
    one = spec.exposed(torch.tensor([17]), "head.activation", 8)[0].tolist()
    return {"masks.svg": masks(spec, instances), "exposed-hidden.svg": sub_networks(one)}


if __name__ == "__main__":
    for name, content in drawn().items():
        (DOCS / name).write_text(content, encoding="utf-8")
