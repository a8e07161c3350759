"""Exposed and hidden loss over training of easy, hard, mislabelled and randomly labelled images.

As Liu et al. 2021 compare what a network learns from, and what it learns by heart. Which row is of which
kind is decided by people's labels, not by any network: easy where all three annotators saw the right
class; hard where not all three did but the majority; mislabelled where the majority is wrong; and some
rows of every kind are given a random class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnover import evaluation
from turnover.evaluation import Recipe
from turnover.ids import ghost_ids

from . import images, patches
from .label_errors import HELD_OUT, TEST_ROWS
from .label_errors import ROWS as IMAGES
from .networks import HEAD, attached, centre, losses, wide_head

Json = dict[str, Any]

ROWS = 4000
UNITS = 2048
RECIPE = Recipe(epochs=15, learning_rate=3e-4, batch_size=100, optimizer="adam")
KINDS = ("easy", "hard", "mislabelled", "random label")
_RANDOM = 0.1


def run(data: Path | None, folder: Path) -> Json:
    """The curves of the first images, whose features are those of the wrong labels' experiment."""
    given = images.load(data, IMAGES + HELD_OUT, TEST_ROWS)
    x = patches.of(torch.cat([given.x, given.test_x]), IMAGES + HELD_OUT, folder)
    every = torch.stack([given.human[name][:ROWS] for name in images.ANNOTATORS])
    right, majority = given.y[:ROWS], given.human["aggregate"][:ROWS]
    kinds = torch.where((every == right).all(dim=0), 0, 1)
    kinds[majority != right] = 2
    test = (x[IMAGES + HELD_OUT :], given.test_y)
    return figures((x[:ROWS], majority), kinds, test)


def figures(
    train: tuple[Tensor, Tensor],
    kinds: Tensor,
    test: tuple[Tensor, Tensor],
    *,
    units: int = UNITS,
    recipe: Recipe = RECIPE,
) -> Json:
    """Both losses of every kind after every epoch, each with the half width of its 95% interval.

    Args:
        train: inputs and the labels that people gave.
        kinds: int64 (rows,), index into the kinds but the last, which is made here.
        test: inputs and right labels, run under ghosts' masks.
        units: of the wide head.
        recipe: of the training.
    """
    x, given = train
    generator = np.random.default_rng(0)
    classes = int(given.max()) + 1
    chosen = torch.from_numpy(
        generator.choice(len(given), round(_RANDOM * len(given)), replace=False)
    )
    y, kinds = given.clone(), kinds.clone()
    y[chosen] = torch.from_numpy(generator.integers(0, classes, len(chosen)))
    kinds[chosen] = len(KINDS) - 1

    build = wide_head(x, units, classes)
    epochs = range(recipe.epochs + 1)
    trained = evaluation.train(build, x, y, recipe, [0], masked=HEAD, checkpoints=epochs)
    ids, ghosts = torch.arange(len(y)), ghost_ids(len(test[1]))
    curves: Json = {name: {"exposed": [], "hidden": []} for name in (*KINDS, "test")}
    for _, (state,) in sorted(trained.checkpoints.items()):
        with attached(build, state, HEAD, 0) as network:
            for side in ("exposed", "hidden"):
                found = losses(network, x, y, ids, hidden=side == "hidden")
                for number, name in enumerate(KINDS):
                    curves[name][side].append(centre(found[kinds == number]))
                unseen = losses(network, *test, ghosts, hidden=side == "hidden")
                curves["test"][side].append(centre(unseen))
    counts = torch.bincount(kinds, minlength=len(KINDS)).tolist()
    return {
        "rows": dict(zip(KINDS, counts, strict=True)) | {"test": len(test[1])},
        "epochs": list(epochs),
        "curves": curves,
    }
