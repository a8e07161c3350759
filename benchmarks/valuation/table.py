"""Puts the figures on data values into ``docs/valuation.md``, between its markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.fidelity.table import replaced

from .methods import METHODS
from .run import BINS, ON_CLEAN, RESULTS, SIZES

DOCS = Path(__file__).parent.parent.parent / "docs" / "valuation.md"
NAMES = {
    "digits": "digits",
    "breast_cancer": "breast cancer",
    "gaussian_classifier": "Gaussian, 10 features",
    "gaussian_classifier_high_dim": "Gaussian, 100 features",
}
Json = dict[str, Any]
Floats = NDArray[np.float64]

_REMOVED, _ADDED = slice(1, BINS // 2 + 1), slice(BINS // 2 + 1, BINS)
_CURVES = {
    "lowest 10-50% removed: higher is better": ("without_low", _REMOVED),
    "highest 10-50% removed: lower is better": ("without_high", _REMOVED),
    "highest 10-40% added: higher is better": ("without_low", _ADDED),
    "lowest 10-40% added: lower is better": ("without_high", _ADDED),
}


def of(results: Json, noise: str, method: str, data: str = "") -> list[Json]:
    """Runs of a method, in the order of data sets and seeds."""
    names = [f"{one}/{noise}/{method}/" for one in ([data] if data else SIZES)]
    return [run for start in names for name, run in results.items() if name.startswith(start)]


def _mean(runs: list[Json], key: str) -> float:
    return float(np.mean([run[key] for run in runs]))


def _error(values: Floats) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5)


def _lines(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _first(method: str) -> list[str]:
    return [method, METHODS[method].kind, METHODS[method].note]


def found_table(results: Json, noise: str) -> str:
    """How well low values find the rows with noise."""
    rows = []
    for method in sorted(METHODS, key=lambda one: -_mean(of(results, noise, one), "auc")):
        runs = of(results, noise, method)
        cells = _first(method)
        for data in SIZES:
            aucs = np.array([run["auc"] for run in of(results, noise, method, data)])
            cells.append(f"{aucs.mean():.3f} ± {_error(aucs):.3f}")
        cells += [f"{_mean(runs, key):.2f}" for key in ("precision", "kmeans_f1")]
        rows.append([*cells, f"{_mean(runs, 'seconds'):.1f}"])
    header = ["method", "by", "budget", *(f"AUC, {name}" for name in NAMES.values())]
    return _lines([*header, "precision", "k-means F1", "seconds"], rows)


def clean_table(results: Json) -> str:
    """AUC with noise in the validation labels, and without."""
    rows = []
    for method in ON_CLEAN:
        cells = [method]
        for data in SIZES:
            noisy, clean = (_mean(of(results, n, method, data), "auc") for n in ("labels", "clean"))
            cells.append(f"{noisy:.3f}, {clean:.3f}")
        rows.append(cells)
    return _lines(["method", *(f"{name}: noisy, clean" for name in NAMES.values())], rows)


def curves_table(results: Json) -> str:
    """Test accuracy after training without, or with, the rows at one end."""
    kept = {method: _accuracies(of(results, "labels", method)) for method in METHODS}
    order = sorted(METHODS, key=lambda method: -kept[method][0].mean())
    rows = []
    for method in order:
        cells = _first(method)[:2]
        for found, chance in zip(kept[method], kept["random"], strict=True):
            gain = 100 * (found - chance)
            said = f"{100 * found.mean():.1f}"
            if method != "random":
                said += f" ({gain.mean():+.1f} ± {_error(gain):.1f})"
            cells.append(said)
        rows.append(cells)
    return _lines(["method", "by", *_CURVES], rows)


def _accuracies(runs: list[Json]) -> list[Floats]:
    """Mean accuracy over a part of each curve, (data sets x seeds,)."""
    return [np.array([np.mean(run[key][part]) for run in runs]) for key, part in _CURVES.values()]


def tables(results: Json) -> dict[str, str]:
    """Content of the page by marker."""
    return {
        "labels": found_table(results, "labels"),
        "clean": clean_table(results),
        "features": found_table(results, "features"),
        "curves": curves_table(results),
    }


def main() -> None:
    text = DOCS.read_text()
    for marker, content in tables(json.loads(RESULTS.read_text())["results"]).items():
        text = replaced(text, marker, content)
    DOCS.write_text(text)


if __name__ == "__main__":
    main()
