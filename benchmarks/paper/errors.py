"""Are errors turned by removing the training instances that explain them?

The errors of a turn-over network on held-out rows are explained; the instances that were most harmful to
them taken together are removed at once; networks are trained on the rest, and the errors that they get
right are counted, beside those after removing as many instances of the same classes at random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import ttest_1samp
from torch import Tensor

import turnover
from benchmarks.fidelity.problems import load
from turnover import evaluation, objectives
from turnover.evaluation import Recipe, Subsets

from . import images, patches
from .networks import HEAD, attached, losses, outputs, wide_head

Json = dict[str, Any]
Rows = NDArray[np.int64]

UNITS = 8192
RECIPE = Recipe(epochs=3, learning_rate=2e-4, batch_size=100, optimizer="adam")
SEEDS = 3
DRAWS = 5
SHARE = 0.02
_SENTENCES = 2500
_IMAGES, _TEST_IMAGES = 2500, 1500
_SIGNIFICANT = 0.05
_TRUTH_SEED = 1000  # the network that is explained has seed 0


def run(data: Path | None, folder: Path) -> Json:
    """The figures on sentences and, where they are at hand, on images."""
    problem = load("D", cache=folder)
    x = torch.cat([problem.train.x, problem.test.x])
    y = torch.cat([problem.train.y, problem.test.y])
    found = {
        "sentences": figures((x[:_SENTENCES], y[:_SENTENCES]), (x[_SENTENCES:], y[_SENTENCES:]))
    }
    try:
        given = images.load(data, _IMAGES, _TEST_IMAGES)
    except turnover.InputError as error:
        print(f"images left out: {error}", flush=True)
        return {"sets": found}
    features = patches.of(torch.cat([given.x, given.test_x]), _IMAGES, folder)
    found["images"] = figures((features[:_IMAGES], given.y), (features[_IMAGES:], given.test_y))
    return {"sets": found}


def figures(
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    *,
    units: int = UNITS,
    recipe: Recipe = RECIPE,
    seeds: int = SEEDS,
    draws: int = DRAWS,
    share: float = SHARE,
) -> Json:
    """Explain the errors on held-out rows, remove, retrain and count.

    Args:
        train: inputs and labels.
        held_out: inputs and labels of the rows whose errors are explained.
        units: of the wide head.
        recipe: of every training.
        seeds: trainings without each set of instances.
        draws: random sets beside each.
        share: of the training rows are removed at most.
    """
    (x, y), (test_x, test_y) = train, held_out
    classes = int(y.max()) + 1
    build = wide_head(x, units, classes)
    (state,) = evaluation.train(build, x, y, recipe, [0], masked=HEAD).states
    with attached(build, state, HEAD, 0) as network:
        predicted = outputs(network, test_x, None, hidden=False).argmax(dim=1)
        errors = torch.nonzero(predicted != test_y).flatten()
        explained = test_x[errors], test_y[errors]
        removed = _most_harmful(network, train, explained, int(share * len(x)))
    generator = np.random.default_rng(1)
    sets = [np.empty(0, dtype=np.int64), *removed.values()]
    sets += [_alike(rows, y, generator) for rows in removed.values() for _ in range(draws)]
    keep = np.ones((len(sets), len(x)), dtype=np.bool_)
    for number, rows in enumerate(sets):
        keep[number, rows] = False
    trained = range(_TRUTH_SEED, _TRUTH_SEED + seeds)
    retraining = evaluation.Retraining(build, x, y, recipe, test_x, masked=HEAD)
    logits = evaluation.retrain(retraining, Subsets(keep), trained)
    right = logits.argmax(axis=3) == test_y.numpy()  # (sets, seeds, rows)
    turned, first = right[:, :, errors.numpy()].astype(np.float64), 1 + len(removed)
    methods = {}
    for number, (name, rows) in enumerate(removed.items()):
        at_random = slice(first + number * draws, first + (number + 1) * draws)
        chance = turned[at_random].mean(axis=0)  # (seeds, errors)
        more = (turned[1 + number] - chance).mean(axis=0)  # (errors,)
        methods[name] = {
            "removed": len(rows),
            "turned": turned[1 + number].sum(axis=1).tolist(),
            "turned_at_random": chance.sum(axis=1).tolist(),
            "more": float(more.mean()),
            "more_standard_error": float(more.std(ddof=1) / len(more) ** 0.5),
            "p": float(ttest_1samp(more, 0).pvalue),
            "accuracy": float(right[1 + number].mean()),
            "accuracy_at_random": float(right[at_random].mean()),
        }
    return {
        "rows": len(x),
        "held_out": len(test_y),
        "errors": len(errors),
        "units": units,
        "epochs": recipe.epochs,
        "seeds": seeds,
        "draws": draws,
        "turned_without_removal": turned[0].sum(axis=1).tolist(),
        "accuracy": float(right[0].mean()),
        "methods": methods,
    }


def _most_harmful(
    network: turnover.Network,
    train: tuple[Tensor, Tensor],
    errors: tuple[Tensor, Tensor],
    most: int,
) -> dict[str, Rows]:
    """So many training rows at most by each method, the most harmful to all errors together first.

    By turn-over, of those alone that are significantly harmful to an error.
    """
    x, y = train
    ids = torch.arange(len(x))
    influence = turnover.Influence(network, objectives.margin, method="linear")
    pairs = influence.estimate([errors], ids)
    total = pairs.scores.sum(axis=0)
    sure = ((pairs.q <= _SIGNIFICANT) & (pairs.scores < 0)).any(axis=0) & (total < 0)
    gram = turnover.Influence(network, method="gram").fit([(x, y, ids)])
    by_gram = gram.estimate([errors]).scores.sum(axis=0)
    loss = losses(network, x, y, None).numpy()
    order = np.argsort(total, kind="stable")
    return {
        "turn-over, q <= 0.05": order[sure[order]][:most],
        "gram": np.argsort(by_gram, kind="stable")[:most],
        "loss": np.argsort(-loss, kind="stable")[:most],
    }


def _alike(rows: Rows, y: Tensor, generator: np.random.Generator) -> Rows:
    """As many rows of every class, drawn at random."""
    labels = y.numpy()
    drawn = [
        generator.choice(np.flatnonzero(labels == name), count, replace=False)
        for name, count in zip(*np.unique(labels[rows], return_counts=True), strict=True)
    ]
    return np.concatenate(drawn) if drawn else rows
