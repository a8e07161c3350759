"""Sources of training data, three of them corrupted: found, and compared with leaving each out.

Sentences are dealt out to sources of planted sizes, and in each a planted share of labels is flipped. One
turn-over network is trained with the source as its rows' id. The truth is the same masked training
without each of the sources.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import turnover
from benchmarks.fidelity.problems import load
from turnover import evaluation, objectives
from turnover.evaluation import Recipe, Subsets
from turnover.evaluation.correlation import correlate

from .networks import HEAD, attached, wide_head

Json = dict[str, Any]
Floats = NDArray[np.float64]

SOURCES = 20
CORRUPTED = 3
ROWS = 2500
UNITS = 1024
RECIPE = Recipe(epochs=3, learning_rate=2e-4, batch_size=100, optimizer="adam")
NETWORKS = 5
TRUTH_SEEDS = 15
# Learns flipped labels by heart: what that does to the scores.
_LONGER = Recipe(epochs=10, learning_rate=2e-4, batch_size=100, optimizer="adam")
_LONGER_NETWORKS = 2
_LONGER_TRUTH_SEEDS = 5
_TRUTH_SEED = 1000  # networks that are attributed have the seeds from 0 on
_LARGEST = 10  # times the smallest source
_ERRORS = (0.0, 0.05, 0.1, 0.2, 0.3)
_CORRUPT = 0.8
_SIGNIFICANT = 0.05


def run(folder: Path) -> Json:
    """The figures on movie-review sentences with the features of a frozen BERT."""
    problem = load("D", cache=folder)
    x, y = (
        torch.cat([problem.train.x, problem.test.x]),
        torch.cat([problem.train.y, problem.test.y]),
    )
    train, held_out = (x[:ROWS], y[:ROWS]), (x[ROWS:], y[ROWS:])
    longer = figures(
        train,
        held_out,
        recipe=_LONGER,
        networks=_LONGER_NETWORKS,
        truth_seeds=_LONGER_TRUTH_SEEDS,
    )
    return figures(train, held_out) | {"longer": longer}


def planted(rows: int) -> tuple[NDArray[np.int64], Floats, NDArray[np.bool_]]:
    """Sizes (sources,) that add up to the rows, shares of wrong labels, and which are corrupted.

    Sizes grow geometrically, tenfold; sizes and shares are dealt out independently.
    """
    generator = np.random.default_rng(0)
    shares = np.geomspace(1, _LARGEST, SOURCES)
    sizes = np.floor(rows * shares / shares.sum()).astype(np.int64)
    sizes[-1] += rows - sizes.sum()
    generator.shuffle(sizes)
    corrupted = np.zeros(SOURCES, dtype=np.bool_)
    corrupted[generator.choice(SOURCES, CORRUPTED, replace=False)] = True
    errors = generator.choice(_ERRORS, SOURCES)
    errors[corrupted] = _CORRUPT
    return sizes, errors, corrupted


def flipped(y: Tensor, source: Tensor, errors: Floats) -> Tensor:
    """The labels (two classes), in every source a share of them flipped."""
    generator = np.random.default_rng(1)
    labels = y.clone()
    for number, share in enumerate(errors):
        rows = np.flatnonzero(source.numpy() == number)
        chosen = generator.choice(rows, round(share * len(rows)), replace=False)
        labels[torch.from_numpy(chosen)] = 1 - labels[torch.from_numpy(chosen)]
    return labels


def figures(
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    *,
    units: int = UNITS,
    recipe: Recipe = RECIPE,
    networks: int = NETWORKS,
    truth_seeds: int = TRUTH_SEEDS,
) -> Json:
    """Plant sources in rows of two classes, find their influence, and judge it by retraining.

    Args:
        train: inputs (rows, features) and labels.
        held_out: inputs and right labels of the rows whose mean log-odds are the objective.
        units: of the wide head.
        recipe: of every training.
        networks: turn-over networks that are attributed.
        truth_seeds: trainings without each of the sources.
    """
    x, right = train
    sizes, errors, corrupted = planted(len(x))
    source = torch.from_numpy(np.repeat(np.arange(SOURCES), sizes))
    y = flipped(right, source, errors)

    build = wide_head(x, units, 2)
    keep = np.ones((1 + SOURCES, len(x)), dtype=np.bool_)
    for number in range(SOURCES):
        keep[1 + number, source.numpy() == number] = False
    seeds = range(_TRUTH_SEED, _TRUTH_SEED + truth_seeds)
    retraining = evaluation.Retraining(build, x, y, recipe, held_out[0], ids=source, masked=HEAD)
    logits = evaluation.retrain(retraining, Subsets(keep), seeds)
    margins = evaluation.minus_cost(logits, held_out[1]).mean(axis=2).astype(np.float64)
    effects = (margins[0] - margins[1:]).T  # (seeds, sources), positive = helpful

    trained = evaluation.train(build, x, y, recipe, range(networks), ids=source, masked=HEAD)
    results, by_gram = [], []
    for seed, state in enumerate(trained.states):
        with attached(build, state, HEAD, seed) as network:
            influence = turnover.Influence(network, objectives.margin, method="linear")
            results.append(influence.aggregate([held_out], torch.arange(SOURCES)))
            gram = turnover.Influence(network, method="gram").fit([(x, y, torch.arange(len(x)))])
            pairs = gram.estimate([held_out]).scores.mean(axis=0)
            by_gram.append(np.bincount(source.numpy(), weights=pairs, minlength=SOURCES))
    scores = np.stack([result.scores for result in results]).astype(np.float64)
    q = np.stack([result.q for result in results])
    harmful = (q <= _SIGNIFICANT) & (scores < 0)  # (networks, sources)
    trivial = {"size": sizes.astype(np.float64), "minus wrong labels": -errors * sizes}
    rows: dict[str, Floats] = {"turn-over": scores, "gram, summed": np.stack(by_gram)}
    rows |= {name: values[None] for name, values in trivial.items()}
    truth = effects.mean(axis=0)
    return {
        "rows": len(x),
        "held_out": len(held_out[1]),
        "units": units,
        "epochs": recipe.epochs,
        "networks": networks,
        "truth_seeds": truth_seeds,
        "accuracy": float((logits[0].argmax(axis=2) == held_out[1].numpy()).mean()),
        "effect_sd": float(truth.std(ddof=1)),
        "effect_standard_error": float((effects.std(axis=0, ddof=1) / truth_seeds**0.5).mean()),
        "ceiling": ceilings(effects),
        "methods": {name: agreement(values, effects, ~corrupted) for name, values in rows.items()},
        "corrupted_found": harmful[:, corrupted].sum(axis=1).tolist(),
        "others_called_harmful": harmful[:, ~corrupted].sum(axis=1).tolist(),
        "sources": [
            {
                "rows": int(sizes[number]),
                "wrong": float(errors[number]),
                "corrupted": bool(corrupted[number]),
                "effect": float(truth[number]),
                "effect_standard_error": float(effects[:, number].std(ddof=1) / truth_seeds**0.5),
                "score": float(scores[0, number]),
                "z": float(results[0].z[number]),
                "q": float(q[0, number]),
                "gram": float(by_gram[0][number]),
            }
            for number in range(SOURCES)
        ],
    }


def ceilings(effects: Floats) -> Json:
    """What the expected effects would read, from the agreement of halves of the seeds."""
    runs = effects[:, None]
    return {
        "spearman": correlate(runs.mean(axis=0), runs).ceiling,
        "pearson": _pearson_ceiling(effects),
    }


def _pearson_ceiling(effects: Floats) -> float:
    """Square root of the share of the variance of the seeds' mean that is not the seeds'."""
    noise = effects.var(axis=0, ddof=1).mean() / len(effects)
    return float(max(0.0, 1 - noise / effects.mean(axis=0).var(ddof=1)) ** 0.5)


def agreement(scores: Floats, effects: Floats, others: NDArray[np.bool_]) -> Json:
    """Correlation of scores (networks, sources) with effects (seeds, sources).

    Of single networks (mean and deviation) and of their mean; the rank correlation also without the
    corrupted sources, which any method should tell from the others.
    """
    truth = effects.mean(axis=0)
    single = np.array([np.corrcoef(one, truth)[0, 1] for one in scores])
    together = correlate(scores.mean(axis=0)[None], effects[:, None])
    ranks = [correlate(one[None], effects[:, None]).mean for one in scores]
    apart = [correlate(one[None, others], effects[:, None, others]).mean for one in scores]
    spread = len(scores) > 1
    return {
        "pearson": float(single.mean()),
        "pearson_sd": float(single.std(ddof=1)) if spread else None,
        "pearson_together": float(np.corrcoef(scores.mean(axis=0), truth)[0, 1]),
        "spearman": float(np.mean(ranks)),
        "spearman_sd": float(np.std(ranks, ddof=1)) if spread else None,
        "spearman_together": [together.mean, together.low, together.high],
        "spearman_without_corrupted": float(np.mean(apart)),
    }
