"""Did the hidden sub-networks not learn? Exposed and hidden losses over training.

Convolutional networks on images, with masks on every layer, or on those that are trained; a control
that must fail, with masks on the last hidden layer alone (all below it has learned every image); and a
BERT with LoRA and a wide head on sentences.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.fidelity import features
from benchmarks.fidelity.problems import convolutions
from turnover import evaluation
from turnover.data import demo
from turnover.data.text import TextData
from turnover.evaluation import Build, Masked, Recipe
from turnover.ids import ghost_ids
from turnover.models.text import ClassifierConfig
from turnover.models.vgg import SITES, VGG
from turnover.tasks.fit import FitConfig, fit
from turnover.tasks.training import TrainingConfig

from . import images
from .networks import attached, centre, losses, outputs

Json = dict[str, Any]

ROWS, OTHER_ROWS, TEST_ROWS = 3000, 7000, 1000
_POINTS = 10
_RATIO = 0.6
_RECIPE = Recipe(epochs=8, learning_rate=1e-3, batch_size=50, optimizer="adam")
_LONGER = Recipe(epochs=20, learning_rate=1e-3, batch_size=50, optimizer="adam")
_LAST = ("classifier.4",)  # the last hidden layer of the VGG
_SENTENCES, _TEST_SENTENCES = 600, 600
_BERT_EPOCHS = 6
_CURVE_ROWS = 200
SIDES = ("train_exposed", "train_hidden", "test_exposed", "test_hidden")


def run(data: Path | None, folder: Path) -> Json:
    """The figures of all networks."""
    given = images.load(data, ROWS + OTHER_ROWS, TEST_ROWS)
    train, test = (given.x[:ROWS], given.y[:ROWS]), (given.test_x, given.test_y)
    others = given.x[ROWS:], given.y[ROWS:]
    small = partial(convolutions, hidden=512, bias=False)
    masked: dict[str, tuple[Build, tuple[str, ...], Recipe]] = {
        "VGG-11, masks on every layer": (vgg, SITES, _RECIPE),
        "VGG-11, masks on the last hidden layer alone (control)": (vgg, _LAST, _RECIPE),
        "VGG-11, convolutions frozen after other images, masks on the rest": (
            frozen(others, _RECIPE),
            ("mlp",),
            _LONGER,
        ),
        "three convolutions, masks on every layer": (small, SITES, _RECIPE),
    }
    found = {}
    for name, (build, sites, recipe) in masked.items():
        found[name] = followed(build, train, test, recipe, Masked(sites))
        print(name, found[name]["last"], found[name]["accuracy"], flush=True)
    found["BERT, LoRA and a wide head"] = bert(folder)
    counts = {"rows": ROWS, "other_rows": OTHER_ROWS, "test_rows": TEST_ROWS}
    sentences = {"sentences": _SENTENCES, "test_sentences": _TEST_SENTENCES}
    return {**counts, **sentences, "ratio": _RATIO, "networks": found}


def verdict(last: dict[str, list[float]], right: float, rows: int, classes: int) -> Json:
    """What the four losses at the end of training, each with its half width, say.

    The hidden sub-networks did not learn if their loss on training rows is not below the interval of
    the loss on test rows in the hidden sub-networks of ghosts. That alone says little: a network that
    recognises masks and no inputs passes too, so the whole network must have learned something.

    Args:
        last: of each side, mean and half width.
        right: share of the test rows that the whole network gets right.
        rows: test rows.
        classes: as many, about equally frequent.
    """
    hidden, (unseen, half) = last["train_hidden"][0], last["test_hidden"]
    ratio = last["train_exposed"][0] / hidden
    learned = hidden < unseen - half
    chance = right - 1.96 * (right * (1 - right) / rows) ** 0.5 <= 1 / classes
    return {
        "exposed_over_hidden": round(ratio, 4),
        "hidden_did_not_learn": not learned,
        "above_chance": not chance,
        "holds": ratio <= _RATIO and not learned and not chance,
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
    curves: dict[str, list[list[float]]] = {name: [] for name in SIDES}
    for _, (state,) in sorted(trained.checkpoints.items()):
        with attached(build, state, masked, seed) as network:
            for name in SIDES:
                rows, keys = (train, ids) if name.startswith("train") else (test, ghosts)
                found = losses(network, *rows, keys, hidden=name.endswith("hidden"))
                curves[name].append(centre(found))
    with attached(build, trained.states[0], masked, seed) as network:
        predicted = outputs(network, test[0], None, hidden=False)
        report = network.audit((train[0][:8], train[1][:8]))
    right = float((predicted.argmax(dim=1) == test[1]).float().mean())
    last = {name: curve[-1] for name, curve in curves.items()}
    return {
        "unit": "epoch",
        "steps": epochs,
        "curves": curves,
        "last": last,
        "accuracy": round(right, 4),
        "leaking_share": round(report.leaking_share, 4),
        "leaking_buffers": len(report.buffers),
        "mask_units": network.mask_units,
        **verdict(last, right, len(test[1]), predicted.shape[1]),
    }


def vgg(seed: int) -> VGG:
    """VGG-11 for CIFAR, an eighth as wide as usual in its convolutions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VGG(11, 10, size=32, width=8, hidden=512)


def frozen(others: tuple[Tensor, Tensor], recipe: Recipe) -> Build:
    """VGG-11 with the convolutions of one that was trained plainly on other images."""
    (trained,) = evaluation.train(vgg, *others, recipe, [1]).models()

    def build(seed: int) -> nn.Module:
        model = vgg(seed)
        model.features.load_state_dict(trained.get_submodule("features").state_dict())
        model.features.requires_grad_(False)
        return model

    return build


def bert(folder: Path) -> Json:
    """What ``turnover fit`` says of itself, on a few hundred sentences."""
    texts, y = features.sentences()
    names = ["fresh", "rotten"]
    classes = y.tolist()

    def data(first: int, count: int) -> TextData:
        rows = range(first, first + count)
        return TextData(
            [texts[row] for row in rows],
            [classes[row] for row in rows],
            torch.arange(first, first + count),
            [str(row) for row in rows],
            names,
        )

    config = FitConfig(
        ClassifierConfig(str(demo.model_folder())),
        TrainingConfig(epochs=_BERT_EPOCHS),
        compare=False,
        curve_rows=_CURVE_ROWS,
    )
    metrics = fit(
        config,
        data(0, _SENTENCES),
        data(_SENTENCES, _TEST_SENTENCES),
        folder / "bert",
        overwrite=True,
    )
    return followed_by_fit(metrics, _TEST_SENTENCES, len(names))


def followed_by_fit(metrics: Json, test_rows: int, classes: int) -> Json:
    """The four losses that ``turnover fit`` followed, from its metrics, and what they say."""
    last = {name: [metrics["loss"][name], metrics["loss_half_width"][name]] for name in SIDES}
    accuracy = metrics["accuracy"]["turnover"]
    return {
        "unit": "step",
        "steps": metrics["curves"]["steps"],
        "curves": metrics["curves"]["losses"],
        "last": last,
        "accuracy": accuracy,
        "leaking_share": metrics["audit"]["leaking_share"],
        "leaking_buffers": len(metrics["audit"]["buffers"]),
        "mask_units": metrics["mask_units"],
        **verdict(last, accuracy, test_rows, classes),
    }
