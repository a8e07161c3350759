"""Pictures of the board for ``docs/``: every method's best network, and the ghosts' p-values.

``python -m benchmarks.fidelity.plots``
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import board
from .registry import METHODS, Method

DOCS = Path(__file__).parent.parent.parent / "docs"
_COLOURS = {"ours": "#2457a6", "peer": "#c25100", "trivial": "#8a94a6"}
_NAMES = {"standard": "standard truth", "turnover": "turn-over truth"}


def bars(problems: dict[str, Any]) -> Figure:
    """Class-removed score of every method, on the network where it is highest, by both truths."""
    there = {name for found in problems.values() for name in found["methods"]}
    methods = [m for m in METHODS if m.name in there and m.kind in _COLOURS]
    shape = (len(board.TRUTHS), len(problems))
    figure, axes = plt.subplots(
        *shape, figsize=(3.2 * shape[1] + 1, 11), sharey=True, squeeze=False
    )
    for row, truth in zip(axes, board.TRUTHS, strict=True):
        for one, (name, found) in zip(row, problems.items(), strict=True):
            _problem(one, found, truth, methods)
            one.set_title(f"{name}, {_NAMES[truth]}", fontsize=10)
    figure.legend(
        handles=[plt.Line2D([], [], color=c, lw=6, label=kind) for kind, c in _COLOURS.items()],
        loc="lower center",
        ncols=3,
        frameon=False,
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    assert isinstance(figure, Figure)
    return figure


def _problem(axes: Axes, found: dict[str, Any], truth: str, methods: list[Method]) -> None:
    for place, method in enumerate(methods):
        entry = found["methods"].get(method.name, {})
        networks = [entry[network] for network in board.NETWORKS if network in entry]
        judged = [row[f"{truth}_truth"] for row in networks if f"{truth}_truth" in row]
        if not judged:
            continue
        mean, low, high = max(one["class_removed"] for one in judged)
        axes.barh(place, mean, color=_COLOURS[method.kind], height=0.7)
        axes.plot([low, high], [place, place], color="black", lw=1)
    axes.axvline(found["truth"][truth]["ceiling"]["class_removed"], color="black", ls=":", lw=1)
    axes.set_yticks(range(len(methods)), [m.name for m in methods], fontsize=8)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_xlabel("class-removed score; dotted: ceiling", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def histograms(problems: dict[str, Any]) -> Figure:
    """Densities of the p-values of ghosts that the noise floor never saw."""
    figure: Figure
    figure, axes = plt.subplots(1, len(problems), figsize=(2.6 * len(problems), 2.4), sharey=True)
    for one, (name, found) in zip(np.atleast_1d(axes), problems.items(), strict=True):
        counts = np.array(found["ghosts"]["histogram"], dtype=float)
        one.stairs(counts / counts.mean(), np.linspace(0, 1, len(counts) + 1), fill=True)
        one.axhline(1, color="black", lw=1, ls=":")
        one.set_title(name, fontsize=10)
        one.set_ylim(0, 1.3)
        one.set_xlabel("p", fontsize=8)
        one.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def main() -> None:
    problems = dict(sorted(json.loads(board.RESULTS.read_text())["problems"].items()))
    # The same figures give the same files.
    plt.rcParams["svg.hashsalt"] = "turnover"
    for name, figure in (("fidelity", bars(problems)), ("ghosts", histograms(problems))):
        figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
