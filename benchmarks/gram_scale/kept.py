"""How much of exact gram's scores of one network is kept, by landmarks and by random projection."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from . import Json
from .networks import WAYS, Network, Scores

KEPT = 20


def agreement(network: Network) -> Json:
    """Correlations with the scores of exact gram, and the share of its strongest instances."""
    truth, labels = network.scores, network.problem.train.y.numpy()
    own = network.exact.self_influence().scores
    rows = {}
    for count in network.counts:
        for way in WAYS:
            found, scores = network.by_landmarks(way, count)
            mine = found.self_influence().scores
            top = found.estimate(network.targets, top=KEPT).train_ids
            rows[f"{way}, {count}"] = _kept(scores, truth, labels) | {
                "self": float(np.corrcoef(mine, own)[0, 1]),
                "top": _shared(top, _ends(truth)),
            }
        scores = network.projected(count)
        kept = _shared(_ends(scores), _ends(truth))
        rows[f"random projection, {count}"] = _kept(scores, truth, labels) | {"top": kept}
    problem = network.problem
    return {"instances": len(problem.train), "targets": len(problem.test), "rows": rows}


def _kept(scores: Scores, truth: Scores, labels: NDArray[np.int64]) -> Json:
    """Correlation with the truth, mean over targets; also of what differs within classes."""

    def within(values: Scores) -> Scores:
        values = values.copy()
        for label in np.unique(labels):
            values[:, labels == label] -= values[:, labels == label].mean(axis=1, keepdims=True)
        return values

    return {
        "correlation": _correlation(scores, truth),
        "within classes": _correlation(within(scores), within(truth)),
    }


def _correlation(one: Scores, other: Scores) -> float:
    found = [np.corrcoef(a, b)[0, 1] for a, b in zip(one, other, strict=True)]
    return float(np.mean(found))


def _ends(scores: Scores) -> NDArray[np.int64]:
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.concatenate([order[:, :KEPT], order[:, -KEPT:]], axis=1)


def _shared(found: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    """Share of the strongest instances of the truth that are among those found."""
    pairs = zip(found, wanted, strict=True)
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs]))
