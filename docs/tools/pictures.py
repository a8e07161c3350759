"""Draws the pictures of docs/method.md and docs/architecture.md: ``python docs/tools/pictures.py``.

The masks are real ones, and the layers are those of the contract in pyproject.toml.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from turnover import MaskSpec

DOCS = Path(__file__).parents[1]
PYPROJECT = DOCS.parent / "pyproject.toml"
UNITS = 24
ROOMS = {
    "cli": "commands and their options",
    "report": "the HTML page",
    "view": "the interactive page",
    "tasks": "fit, score, explain, review, cleanse",
    "runs": "the folder of a fit",
    "models": "what a run trains",
    "evaluation": "checks by retraining",
    "integrations": "trainers and other tools",
    "fairness": "gaps between two groups",
    "influence": "estimators: linear, exact, rerank, gram",
    "data": "texts, images, ids",
    "training": "the training loop",
    "labels": "which labels are wrong",
    "dropout": "masks, sites, the masked network, the audit",
    "objectives": "costs of a prediction",
    "results": "z, p and q; results in memory and on disk",
    "batches": "a user's batch",
    "parallel": "many jobs, also on Ray",
    "io": "atomic files, parsing, tensors",
    "ids": "ids of instances",
    "errors": "InputError, BindingError",
}
"""What each room of ``src/turnover`` is about, in a few words."""
JOURNEYS = {
    "A training batch": [
        ("batches", "finds rows and ids"),
        ("dropout", "binds the ids"),
        ("dropout", "masks every site"),
        ("training", "loss and gradients"),
        ("runs", "saves the weights"),
    ],
    "A mask bit": [
        ("ids", "key to int64 id"),
        ("dropout", "keys a stream"),
        ("dropout", "draws the bit"),
        ("dropout", "scales the unit"),
        ("influence", "codes of +1 and -1"),
    ],
    "A score": [
        ("influence", "estimates a block"),
        ("results", "writes its chunks"),
        ("results", "ghosts give z, p, q"),
        ("tasks", "ranks per error"),
        ("report, view", "draw the page"),
    ],
}
"""Rooms that each journey goes through, and what happens there."""
STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #1f2933 }
  .small { font-size: 12px; fill: #52606d }
  .card { fill: #ffffff; stroke: #d5dbe1 }
  .on { fill: #00796b; stroke: #00796b }
  .off { fill: none; stroke: #9aa5b1; stroke-dasharray: 2 2 }
  .wire { stroke: #00796b; stroke-width: 1.2 }
  .cut { stroke: #c3cbd3; stroke-width: .7 }
  .plain { fill: #52606d }
  .room { fill: #e0f2f1; stroke: #00796b }
  .arrow { fill: none; stroke: #52606d; stroke-width: 1.5 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e7eb } .small { fill: #9aa5b1 }
    .card { fill: #1e2129; stroke: #3a414c }
    .on { fill: #4db6ac; stroke: #4db6ac } .off { stroke: #66707c }
    .wire { stroke: #4db6ac } .cut { stroke: #3a414c } .plain { fill: #9aa5b1 }
    .room { fill: #12332f; stroke: #4db6ac } .arrow { stroke: #9aa5b1 }
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


def contract() -> list[list[str]]:
    """Layers of the import contract, from the top, each with its rooms."""
    contracts = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (found,) = (one["layers"] for one in contracts if one["type"] == "layers")
    return [[room.strip(" ()") for room in layer.split("|")] for layer in found]


def layers(found: Sequence[Sequence[str]]) -> str:
    """One band for each layer, one box for each of its rooms."""
    shapes: list[str] = []
    width, height, gap = 700, 44, 8
    y = 16
    for rooms in found:
        box = (width - 40 - gap * (len(rooms) - 1)) / len(rooms)
        for column, room in enumerate(rooms):
            x = 20 + column * (box + gap)
            shapes.append(_box(x, y, box, height, room, ROOMS[room]))
        y += height + gap
    shapes.append(
        text(350, y + 14, "A room imports only from rooms below its own.", "small", "middle")
    )
    return picture("Layers of src/turnover", width, y + 28, shapes)


def journeys(found: dict[str, list[tuple[str, str]]]) -> str:
    """One lane for each journey, one box for each step."""
    shapes: list[str] = []
    width, height, gap = 900, 48, 22
    y = 20
    for name, steps in found.items():
        shapes.append(text(20, y + 12, name))
        box = (width - 40 - gap * (len(steps) - 1)) / len(steps)
        for column, (room, words) in enumerate(steps):
            x = 20 + column * (box + gap)
            shapes.append(_box(x, y + 22, box, height, room, words))
            if column:
                middle = y + 22 + height / 2
                path = f"M{x - gap + 3:g} {middle:g} h{gap - 6} m-5 -4 l5 4 l-5 4"
                shapes.append(f'<path class="arrow" d="{path}"/>')
        y += height + 52
    return picture("Three journeys through the rooms", width, y - 10, shapes)


def _box(x: float, y: float, width: float, height: float, name: str, words: str) -> str:
    """A room, with its name and a few words below."""
    middle = x + width / 2
    return "\n".join(
        [
            f'<rect class="room" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>',
            text(middle, y + 18, name, "", "middle"),
            text(middle, y + 35, words, "small", "middle"),
        ]
    )


def drawn() -> dict[str, str]:
    """All pictures: file name to content."""
    spec = MaskSpec(keep=0.5, seed=0)
    instances = [(17, "a fine warm film"), (18, "a dull cold film"), (19, "moving, wise and funny")]
    one = spec.exposed(torch.tensor([17]), "head.activation", 8)[0].tolist()
    return {
        "masks.svg": masks(spec, instances),
        "exposed-hidden.svg": sub_networks(one),
        "layers.svg": layers(contract()),
        "journeys.svg": journeys(JOURNEYS),
    }


if __name__ == "__main__":
    for name, content in drawn().items():
        (DOCS / name).write_text(content, encoding="utf-8")
