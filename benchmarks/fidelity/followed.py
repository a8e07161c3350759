"""Suspicions followed along a training, and those from features alone, on the board's mislabels.

AUM: the mean over the epochs of the logit of the label less the largest other one (Pleiss et al. 2020).
Cartography: the mean probability of the label (Swayamdipta et al. 2020). *Early*: over the first third of
the epochs alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmarks.paper.networks import attached, outputs, predictions
from turnover import evaluation
from turnover.evaluation import Masked
from turnover.labels import label_errors, ridge

from .problems import Problem

Floats = NDArray[np.floating]
AT = (10, 50, 100)
"""Rows reviewed: 1%, 5% and 10%."""
_FOLDS = 5


def found_in(problem: Problem, seed: int) -> dict[str, dict[str, float]]:
    """AUC and precisions of every row."""
    found = _of_features(problem, seed)
    for network in ("standard", "turnover"):
        found |= _along(problem, network, seed)
    wrong = problem.train.wrong.numpy()
    return {name: _judged(scores, wrong) for name, scores in found.items()}


def _judged(scores: Floats, wrong: NDArray[np.bool_]) -> dict[str, float]:
    judged = evaluation.mislabel(scores, wrong, at=list(AT))
    return {"auc": judged.auc} | {f"precision_at_{at}": judged.precision_at[at] for at in AT}


def _of_features(problem: Problem, seed: int) -> dict[str, Floats]:
    from cleanlab.rank import get_label_quality_scores
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    x, y = problem.train.x.flatten(1), problem.train.y
    left_out = ridge.leave_one_out(x.double().numpy(), y.numpy(), problem.classes, seed)
    folds = cross_val_predict(
        LogisticRegression(max_iter=1000), x.numpy(), y.numpy(), cv=_FOLDS, method="predict_proba"
    )
    quality = get_label_quality_scores(y.numpy(), folds, method="normalized_margin")
    return {
        "label errors, features": label_errors(x, y, classes=problem.classes, seed=seed).suspicion,
        "left-out margin, features": -_margin(torch.from_numpy(left_out)[None], y)[0].numpy(),
        "5-fold logistic regression (cleanlab), features": 1 - quality,
    }


def _along(problem: Problem, network: str, seed: int) -> dict[str, Floats]:
    x, y, recipe = problem.train.x, problem.train.y, problem.recipe
    masked = Masked(problem.sites) if network == "turnover" else None
    build = problem.wide if masked else problem.standard
    epochs = range(1, recipe.epochs + 1)
    trained = evaluation.train(build, x, y, recipe, [seed], masked=masked, checkpoints=list(epochs))
    whole, hidden = [], []
    for epoch in epochs:
        (state,) = trained.checkpoints[epoch]
        if masked is None:
            model = build(seed).eval()
            model.load_state_dict(state)
            whole.append(predictions(model, x))
            continue
        with attached(build, state, masked, seed) as attributed:
            whole.append(outputs(attributed, x, None, hidden=False))
            hidden.append(outputs(attributed, x, torch.arange(len(y)), hidden=True))
    first = max(1, round(recipe.epochs / 6))
    found = {f"{name}, {network}": one for name, one in along(whole, y, first).items()}
    if hidden:
        of_hidden = along(hidden, y, first).items()
        found |= {f"hidden {name}, {network}": one for name, one in of_hidden}
    return found


def along(logits: Sequence[Tensor], y: Tensor, early: int) -> dict[str, Floats]:
    """Suspicions (rows,) by logits (rows, classes) after each epoch; ``early`` is that of the early loss."""
    followed = torch.stack(list(logits))  # (epochs, rows, classes)
    margins = _margin(followed, y)
    labeled = followed.log_softmax(dim=2)[:, torch.arange(len(y)), y]
    found = {
        "AUM": -margins.mean(dim=0),
        "early AUM": -margins[: max(1, round(len(logits) / 3))].mean(dim=0),
        "cartography": -labeled.exp().mean(dim=0),
        "loss": -labeled[-1],
        "early loss": -labeled[early - 1],
    }
    return {name: scores.numpy() for name, scores in found.items()}


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    """Logit of the label less the largest other one: (epochs, rows) of (epochs, rows, classes)."""
    labeled = functional.one_hot(y, logits.shape[2]).bool()
    own = logits.masked_fill(~labeled, -torch.inf).amax(dim=2)
    return own - logits.masked_fill(labeled, -torch.inf).amax(dim=2)
