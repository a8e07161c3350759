"""The curves of wrong labels and of point removal for ``docs/``: ``python -m benchmarks.valuation.plots``."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .run import BINS, RESULTS, SIZES
from .table import DOCS, NAMES, Json, of

_STYLES = {
    "turn-over, self": ("#2457a6", "-"),
    "gram, self": ("#2457a6", "--"),
    "gram, validation": ("#2457a6", ":"),
    "mean margin (AUM)": ("#2e8b57", "-"),
    "Data-OOB": ("#c25100", "-"),
    "KNN-Shapley": ("#c25100", "--"),
    "LossVal, 30 epochs": ("#8e44ad", "-"),
    "random": ("#8a94a6", "-"),
}
_ROWS = {
    "found": "wrong labels among the lowest",
    "without_low": "test accuracy, lowest removed",
    "without_high": "test accuracy, highest removed",
}


def curves(results: Json) -> Figure:
    """What OpenDataVal's experiments say at every share of the rows, by method and data set."""
    figure: Figure
    figure, axes = plt.subplots(3, len(SIZES), figsize=(12, 8), sharex=True, sharey=True)
    for row, (key, said) in zip(axes, _ROWS.items(), strict=True):
        for one, data in zip(row, SIZES, strict=True):
            for method, (colour, line) in _STYLES.items():
                runs = [run[key] for run in of(results, "labels", method, data)]
                shares = np.arange(len(runs[0])) / BINS
                one.plot(shares, np.mean(runs, axis=0), line, color=colour, lw=1.5, label=method)
            one.set_title(NAMES[data], fontsize=9)
            one.tick_params(labelsize=8)
            one.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(said, fontsize=8)
    for one in axes[-1]:
        one.set_xlabel("share of the rows", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "turnover"  # the same figures give the same file
    figure = curves(json.loads(RESULTS.read_text())["results"])
    figure.savefig(DOCS.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
