"""Label quality from out-of-sample predictions (Northcutt et al. 2021)."""

from __future__ import annotations

import time

import numpy as np
import torch

from turnover import evaluation

from ..methods import Attribution, Scored

FOLDS = 5


def cleanlab(task: Attribution) -> Scored:
    """1 minus cleanlab's label quality; the networks of 5 folds are part of its preparation."""
    from cleanlab.rank import get_label_quality_scores

    start = time.perf_counter()
    problem = task.problem
    fold = np.random.default_rng(0).permutation(len(problem.train)) % FOLDS
    probabilities = np.empty((len(fold), problem.classes), dtype=np.float64)
    for one in range(FOLDS):
        trained = evaluation.train(
            problem.standard,
            problem.train.x,
            problem.train.y,
            problem.recipe,
            [one],
            rows=torch.from_numpy(np.flatnonzero(fold != one))[None],
        )
        outputs = trained.logits(problem.train.x[torch.from_numpy(fold == one)])[0]
        probabilities[fold == one] = outputs.double().softmax(dim=1).numpy()
    fitted = time.perf_counter()
    quality = get_label_quality_scores(problem.train.y.numpy(), probabilities)
    suspicion = (1 - quality).astype(np.float32)
    stored = probabilities.size * 4
    # Its trainings are counted in the seconds of preparation.
    return Scored(
        None,
        suspicion,
        fitted - start,
        time.perf_counter() - fitted,
        stored,
        networks=0,
        note=f"{FOLDS} trainings in preparation",
    )
