"""Did the hidden sub-networks not learn? Exposed and hidden losses over training.

A VGG on images with masks on every layer, the same with masks on its last hidden layer alone (a control
that must fail: all below it has learned every image), and a BERT with LoRA and a wide head on sentences.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turnover import MaskSpec, demo, evaluation
from turnover.data import TextData
from turnover.evaluation import Build, Masked, Recipe
from turnover.integrations.transformers import ClassifierConfig
from turnover.integrations.vgg import SITES, VGG
from turnover.masks import ghost_ids
from turnover.tasks.fit import FitConfig, fit
from turnover.tasks.training import TrainingConfig

from . import images
from .sides import attached, centre, losses, outputs

Json = dict[str, Any]

ROWS, TEST_ROWS = 3000, 1000
EPOCHS = 20
_POINTS = 10
_RATIO = 0.6
_CONTROL = ("classifier.4",)  # the last hidden layer
_SENTENCES, _TEST_SENTENCES = 800, 600
_SIDES = ("train_exposed", "train_hidden", "test_exposed", "test_hidden")


def verdict(last: dict[str, list[float]]) -> Json:
    """What the four losses at the end of training, each with its half width, say.

    The hidden sub-networks did not learn if their loss on training rows is not below the interval of
    the loss on test rows in the hidden sub-networks of ghosts.
    """
    hidden, (unseen, half) = last["train_hidden"][0], last["test_hidden"]
    ratio = last["train_exposed"][0] / hidden
    learned = hidden < unseen - half
    return {
        "exposed_over_hidden": round(ratio, 4),
        "hidden_did_not_learn": not learned,
        "holds": ratio <= _RATIO and not learned,
    }


def followed(
    build: Build,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    recipe: Recipe,
    masked: Masked,
    *,
    seed: int = 0,
) -> Json:
    """Train a network under masks, and follow its four losses.

    Args:
        build: makes the network.
        train: inputs and labels.
        test: inputs and labels.
        recipe: how it is trained.
        masked: its sites.
        seed: of weights, order and masks.
    """
    epochs = sorted({round(i * recipe.epochs / _POINTS) for i in range(_POINTS + 1)})
    trained = evaluation.train(build, *train, recipe, [seed], masked=masked, checkpoints=epochs)
    ids = torch.arange(len(train[1]))
    ghosts = ghost_ids(len(test[1]))
    curves: dict[str, list[list[float]]] = {name: [] for name in _SIDES}
    for _, (state,) in sorted(trained.checkpoints.items()):
        with attached(build, state, masked, seed) as network:
            for name in _SIDES:
                rows, keys = (train, ids) if name.startswith("train") else (test, ghosts)
                found = losses(network, *rows, keys, hidden=name.endswith("hidden"))
                curves[name].append(centre(found))
    with attached(build, trained.states[0], masked, seed) as network:
        right = outputs(network, test[0], None, hidden=False).argmax(dim=1) == test[1]
        report = network.audit((train[0][:8], train[1][:8]))
    return {
        "steps": epochs,
        "curves": curves,
        "accuracy": round(float(right.float().mean()), 4),
        "leaking_share": round(report.leaking_share, 4),
        "leaking_buffers": len(report.buffers),
        "mask_units": network.mask_units,
        **verdict({name: curve[-1] for name, curve in curves.items()}),
    }


def vgg(seed: int, *, batch_norm: bool = False) -> VGG:
    """VGG-11 for CIFAR, an eighth as wide as usual in its convolutions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VGG(11, 10, size=32, width=8, hidden=512, batch_norm=batch_norm)
