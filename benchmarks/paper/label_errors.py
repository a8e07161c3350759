"""Wrong human labels of CIFAR-10N: found by how many methods, and what removing them does.

All see the same features, which no label has touched (:mod:`.patches`), and train on the human labels.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import turnover
from benchmarks.fidelity.followed import along
from benchmarks.fidelity.problems import mlp
from turnover import evaluation, objectives
from turnover.evaluation import Build, Recipe

from . import images, patches
from .networks import HEAD, attached, outputs, predictions, wide_head

Json = dict[str, Any]
Floats = NDArray[np.floating]
Bools = NDArray[np.bool_]

LABELS = ("aggregate", "random1", "worse")
ROWS, HELD_OUT, TEST_ROWS = 6000, 1000, 2000
SEEDS = 10
UNITS = 2048
HIDDEN = 256
TURNOVER = Recipe(epochs=8, learning_rate=3e-4, batch_size=100, optimizer="adam")
STANDARD = Recipe(epochs=10, learning_rate=1e-3, batch_size=100, optimizer="adam")
REMOVED = (
    "random",
    "label errors of the features",
    "turn-over self-influence",
    "turn-over hidden",
    "turn-over hidden, calibrated",
    "loss of the turn-over mean network",
    "loss",
    "early loss",
    "AUM",
    "5-fold, probability of the label",
    "cleanlab, 5-fold",
)
"""What is removed by."""
_EARLY = 2
_FOLDS = 5
_BUDGETS = {"1%": 0.01, "5%": 0.05}


def run(data: Path | None, folder: Path) -> Json:
    """The figures on three sets of human labels."""
    given = images.load(data, ROWS + HELD_OUT, TEST_ROWS)
    x = patches.of(torch.cat([given.x, given.test_x]), ROWS + HELD_OUT, folder)
    found = {
        name: figures(
            (x[:ROWS], y[:ROWS], given.y[:ROWS]),
            (x[ROWS : ROWS + HELD_OUT], y[ROWS:]),
            (x[ROWS + HELD_OUT :], given.test_y),
        )
        for name, y in ((name, given.human[name]) for name in LABELS)
    }
    return {"rows": ROWS, "held_out": HELD_OUT, "test_rows": TEST_ROWS, "labels": found}


def figures(
    train: tuple[Tensor, Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    seeds: int = SEEDS,
    units: int = UNITS,
    turnover_recipe: Recipe = TURNOVER,
    standard_recipe: Recipe = STANDARD,
) -> Json:
    """One set of labels: every method's figures, means and deviations over seeds.

    Args:
        train: features, given labels, right labels.
        held_out: features and given labels of rows that calibrate hidden predictions.
        test: features and right labels.
        seeds: of networks, orders, masks and folds.
        units: of the wide head.
        turnover_recipe: of the wide head under masks.
        standard_recipe: of all other networks.
    """
    x, y, right = train
    wrong = (y != right).numpy()
    classes = int(max(right.max(), y.max())) + 1
    errors = int(wrong.sum())
    standard = partial(mlp, widths=(x.shape[1], HIDDEN, classes))
    finding: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    cleaning: dict[str, list[float]] = defaultdict(list)
    issues: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(seeds):
        masked = wide_head(x, units, classes)
        suspicions, probabilities = _with_masks(masked, (x, y), held_out, turnover_recipe, seed)
        more, folds = _without_masks(standard, (x, y), standard_recipe, seed)
        suspicions |= more
        generator = np.random.default_rng(seed)
        suspicions["random"] = generator.random(len(y))
        for name, scores in suspicions.items():
            for figure, value in judged(scores, wrong).items():
                finding[name][figure].append(value)
        for name, given in (("5-fold", folds), ("turn-over hidden", probabilities)):
            for figure, value in confident_learning(y.numpy(), given, wrong).items():
                issues[name][figure].append(value)
        removed: dict[str, Floats] = {name: suspicions[name] for name in REMOVED}
        removed["what is wrong (oracle)"] = wrong.astype(np.float64)
        everything = np.arange(len(y))
        kept_rows = {"nothing": everything} | {
            name: np.setdiff1d(everything, np.argsort(-scores, kind="stable")[:errors])
            for name, scores in removed.items()
        }
        for name, kept in kept_rows.items():
            # Other seeds than those of the networks that found the labels.
            cleaning[name].append(
                _accuracy(standard, (x[kept], y[kept]), test, standard_recipe, seeds + seed)
            )
        aucs = {name: round(values["auc"][-1], 3) for name, values in finding.items()}
        print(f"{errors} wrong, seed {seed}: {aucs}", flush=True)
    return {
        "wrong": errors,
        "wrong_share": round(errors / len(y), 4),
        "seeds": seeds,
        "finding": {name: _summed(values) for name, values in finding.items()},
        "cleanlab": version("cleanlab"),
        "confident_learning": {name: _summed(values) for name, values in issues.items()},
        "accuracy_after_removal": {name: _spread(values) for name, values in cleaning.items()},
    }


def judged(scores: Floats, wrong: Bools) -> dict[str, float]:
    """AUC, and precision and recall at budgets of review: 1%, 5%, and as many rows as are wrong."""
    errors = int(wrong.sum())
    budgets = {name: max(1, round(share * len(wrong))) for name, share in _BUDGETS.items()}
    budgets["as many as are wrong"] = errors
    found = evaluation.mislabel(scores, wrong, at=list(budgets.values()))
    figures = {"auc": found.auc}
    for name, budget in budgets.items():
        figures[f"precision at {name}"] = found.precision_at[budget]
        figures[f"recall at {name}"] = found.precision_at[budget] * budget / errors
    return figures


def confident_learning(labels: NDArray[np.int64], given: Floats, wrong: Bools) -> dict[str, float]:
    """What cleanlab's filter, which chooses how many, says of out-of-sample probabilities."""
    from cleanlab.filter import find_label_issues

    flagged = find_label_issues(labels, given, n_jobs=1)
    right = float(wrong[flagged].sum())
    return {
        "flagged": float(flagged.sum()),
        "precision": right / max(1.0, float(flagged.sum())),
        "recall": right / float(wrong.sum()),
    }


def _with_masks(
    build: Build,
    train: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    recipe: Recipe,
    seed: int,
) -> tuple[dict[str, Floats], Floats]:
    """Suspicions from one turn-over network, and its calibrated hidden predictions."""
    x, y = train
    epochs = list(range(1, recipe.epochs + 1))
    trained = evaluation.train(build, x, y, recipe, [seed], masked=HEAD, checkpoints=epochs)
    (state,) = trained.states
    ids = torch.arange(len(y))
    whole, unlearned = [], []
    for epoch in epochs:
        with attached(build, trained.checkpoints[epoch][0], HEAD, seed) as network:
            whole.append(outputs(network, x, None, hidden=False))
            unlearned.append(outputs(network, x, ids, hidden=True))
    followed = along(whole, y, _EARLY), along(unlearned, y, _EARLY)
    batches = list(zip(*(torch.split(part, 500) for part in (x, y, ids)), strict=True))
    with attached(build, state, HEAD, seed) as network:
        own = turnover.Influence(network, objectives.cross_entropy, method="exact")
        influence = own.self_influence(batches).scores
        calibrated = turnover.hidden_predictions(network, batches, [held_out]).probabilities
        hidden = turnover.hidden_predictions(network, batches).probabilities
        loss = _loss(network.model, x, y)
    return {
        "label errors of the features": turnover.label_errors(x, y, seed=seed).suspicion,
        "AUM of the turn-over mean network": followed[0]["AUM"],
        "early AUM of the turn-over mean network": followed[0]["early AUM"],
        "AUM of the turn-over hidden networks": followed[1]["AUM"],
        "early AUM of the turn-over hidden networks": followed[1]["early AUM"],
        "turn-over self-influence": influence,
        "turn-over hidden": 1 - hidden[ids, y],
        "turn-over hidden, calibrated": 1 - calibrated[ids, y],
        "loss of the turn-over mean network": loss,
        "cleanlab on turn-over hidden": _cleanlab(y, calibrated),
    }, calibrated


def _without_masks(
    build: Build, train: tuple[Tensor, Tensor], recipe: Recipe, seed: int
) -> tuple[dict[str, Floats], Floats]:
    """Suspicions from one standard network, and from cleanlab on five; its out-of-sample predictions."""
    x, y = train
    epochs = list(range(1, recipe.epochs + 1))
    trained = evaluation.train(build, x, y, recipe, [seed], checkpoints=epochs)
    logits = []
    for epoch in epochs:
        model = build(seed).eval()
        model.load_state_dict(trained.checkpoints[epoch][0])
        logits.append(predictions(model, x))
    followed = along(logits, y, _EARLY)
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)) % _FOLDS)
    outside = torch.empty(len(y), trained.logits(x[:1]).shape[2])
    for one in range(_FOLDS):
        (model,) = evaluation.train(build, x[fold != one], y[fold != one], recipe, [seed]).models()
        outside[fold == one] = predictions(model, x[fold == one]).softmax(dim=1)
    probabilities = outside.numpy()
    return {
        **{name: followed[name] for name in ("loss", "early loss", "AUM", "early AUM")},
        "cartography": followed["cartography"],
        "5-fold, probability of the label": 1 - probabilities[torch.arange(len(y)), y],
        "cleanlab, 5-fold": _cleanlab(y, probabilities),
    }, probabilities


def _cleanlab(y: Tensor, probabilities: Floats) -> Floats:
    """1 minus label quality, with confident learning's thresholds of the classes taken off."""
    from cleanlab.rank import get_label_quality_scores

    quality: Floats = get_label_quality_scores(y.numpy(), probabilities, adjust_pred_probs=True)
    return 1 - quality


def _loss(model: nn.Module, x: Tensor, y: Tensor) -> Floats:
    found: Floats = functional.cross_entropy(predictions(model, x), y, reduction="none").numpy()
    return found


def _accuracy(
    build: Build,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    recipe: Recipe,
    seed: int,
) -> float:
    (model,) = evaluation.train(build, *train, recipe, [seed]).models()
    return float((predictions(model, test[0]).argmax(dim=1) == test[1]).float().mean())


def _summed(values: dict[str, list[float]]) -> dict[str, list[float]]:
    return {figure: _spread(each) for figure, each in values.items()}


def _spread(values: list[float]) -> list[float]:
    """Mean and standard deviation."""
    return [round(mean(values), 4), round(stdev(values) if len(values) > 1 else 0.0, 4)]
