"""The scikit-learn classifier at its defaults beside scikit-learn's ``MLPClassifier`` at its own.

``python -m benchmarks.tables`` writes ``benchmarks/results/tables.json`` and the table of
``docs/tables.md``; ``--table`` only the table. The defaults were chosen on the data sets of ``CHOSEN``.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import (
    load_breast_cancer,
    load_digits,
    load_iris,
    load_wine,
    make_classification,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import turnover
from benchmarks import fairness
from benchmarks.fidelity.board import machine
from benchmarks.fidelity.table import replaced
from turnover.integrations.sklearn import TurnoverClassifier

RESULTS = Path(__file__).parent / "results" / "tables.json"
DOCS = Path(__file__).parent.parent / "docs" / "tables.md"
SPLITS = 5
MOST_ROWS = 1200
FLIPPED = 0.2
Json = dict[str, Any]
Rows = tuple[NDArray[np.float64], NDArray[np.int64]]


def made(seed: int, **options: Any) -> Rows:
    """Ten classes, 1,200 rows, whose boundaries are not linear."""
    options = {"n_features": 12, "n_informative": 12, "n_redundant": 0, "class_sep": 1.5} | options
    found: Rows = make_classification(
        1200, n_classes=10, n_clusters_per_class=1, random_state=seed, **options
    )
    return found


def _table(table: fairness.Table) -> Rows:
    return table.x, table.y


DATA: dict[str, Callable[[], Rows]] = {
    "digits": lambda: load_digits(return_X_y=True),
    "breast cancer": lambda: load_breast_cancer(return_X_y=True),
    "made": lambda: made(0),
    "wine": lambda: load_wine(return_X_y=True),
    "iris": lambda: load_iris(return_X_y=True),
    "made otherwise": lambda: made(7, n_features=16, n_informative=10, class_sep=2.0),
    "loans": lambda: _table(fairness.loans()),
    "wages": lambda: _table(fairness.wages()),
}
CHOSEN = ("digits", "breast cancer", "made")


def rows_of(name: str) -> Rows:
    """A data set, at most 1,200 rows of it."""
    x, y = DATA[name]()
    kept = np.random.default_rng(0).permutation(len(y))[:MOST_ROWS]
    return x[kept], y[kept]


def split(x: Any, y: Any, seed: int) -> Json:
    """Accuracy and seconds of both on one split."""
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.25, random_state=seed, stratify=y)
    models = {
        "turnover": TurnoverClassifier(random_state=seed),
        "mlp": make_pipeline(StandardScaler(), MLPClassifier(random_state=seed)),
    }
    found: Json = {}
    for name, model in models.items():
        start = time.process_time()
        model.fit(x, y)
        seconds = time.process_time() - start
        found[name] = {"accuracy": float(model.score(x_test, y_test)), "seconds": seconds}
    return found


def planted(x: Any, y: Any, seed: int) -> Json:
    """AUC of finding planted wrong labels: by hidden and by 5-fold predictions, and by self-influence."""
    random, classes = np.random.default_rng(seed), int(y.max()) + 1
    wrong = random.random(len(y)) < FLIPPED
    y = np.where(wrong, (y + random.integers(1, classes, len(y))) % classes, y)
    model = TurnoverClassifier(random_state=seed).fit(x, y)
    rows = np.arange(len(y))
    hidden = turnover.hidden_predictions(model.network_, [model.train_batch_]).probabilities
    folds = cross_val_predict(
        TurnoverClassifier(random_state=seed), x, y, cv=5, method="predict_proba"
    )
    scores = {
        "hidden": -hidden[rows, y],
        "folds": -folds[rows, y],
        "self-influence": model.self_influence()["z"].to_numpy(),
    }
    return {name: float(roc_auc_score(wrong, score)) for name, score in scores.items()}


def table(results: Json) -> str:
    lines = [
        "| | rows | this classifier | MLP | points | hidden | 5-fold | self-influence | time ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        ours, theirs = ([s[tool] for s in found["splits"]] for tool in ("turnover", "mlp"))
        both = [np.mean([one["accuracy"] for one in tool]) for tool in (ours, theirs)]
        ratio = sum(one["seconds"] for one in ours) / sum(one["seconds"] for one in theirs)
        auc = found["auc"]
        lines.append(
            f"| {name}{' *' if name in CHOSEN else ''} | {found['rows']:,} | {both[0]:.3f} | "
            f"{both[1]:.3f} | {100 * (both[0] - both[1]):+.1f} | {auc['hidden']:.3f} | "
            f"{auc['folds']:.3f} | {auc['self-influence']:.3f} | {ratio:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="only write the table")
    if not parser.parse_args().table:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore", ConvergenceWarning)
        results: Json = {}
        for name in DATA:
            x, y = rows_of(name)
            splits = [split(x, y, seed) for seed in range(SPLITS)]
            results[name] = {"rows": len(y), "splits": splits, "auc": planted(x, y, 0)}
            print(name, table({name: results[name]}).splitlines()[-1], flush=True)
        found = {"machine": machine(), "results": results}
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    content = table(json.loads(RESULTS.read_text())["results"])
    DOCS.write_text(replaced(DOCS.read_text(), "accuracy", content))


if __name__ == "__main__":
    main()
