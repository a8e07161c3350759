"""Weights of classes in the training loss, for classes that are rare or count for more."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from turnover.data.base import Data
from turnover.errors import InputError
from turnover.io.parsing import convert, damage
from turnover.runs.run import Run

BALANCED = "balanced"

ClassWeights = Literal["balanced"] | Mapping[str, float] | None
"""``"balanced"``, weights by class name (default 1), or ``None`` for equal weights."""


def check_class_weights(asked: ClassWeights) -> None:
    """Refuse other words, and weights that are not finite and above 0 in float32."""
    if asked is None or asked == BALANCED:
        return
    if isinstance(asked, str):
        raise InputError(f"class weights are {BALANCED!r} or NAME=WEIGHT, got {asked!r}")
    for name, weight in asked.items():
        if not 0 < torch.tensor(float(weight), dtype=torch.float32).item() < math.inf:
            raise InputError(
                f"the weight of class {name!r} must be a finite number above 0 in single precision, got "
                f"{weight}"
            )


def parse_class_weights(given: Sequence[str] | None) -> ClassWeights:
    """Parse command-line values: ``balanced`` alone, or ``NAME=WEIGHT`` for each class once."""
    if not given:
        return None
    if list(given) == [BALANCED]:
        return "balanced"
    weights: dict[str, float] = {}
    for one in given:
        name, _, number = one.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or math.isnan(weight):
            raise InputError(
                f"--class-weights is {BALANCED} alone, or NAME=WEIGHT for each class, got {one!r}"
            )
        if name in weights:
            raise InputError(f"--class-weights names the class {name!r} twice: give it once")
        weights[name] = weight
    return weights


def weights_of_run(run: Run) -> Tensor | None:
    """Class weights that a run was trained with."""
    where = run.folder / "config.json"
    with damage(where):
        given = run.config.get("training", {}).get("class_weights")
        asked = convert(given, ClassWeights, f"{where}: class_weights")
        check_class_weights(asked)
        return class_weights(asked, run.train)


def class_weights(asked: ClassWeights, data: Data) -> Tensor | None:
    """Weight of every class, float32 (classes,); ``None`` for equal weights.

    Balanced weights are rows over (classes with rows x rows of the class), so that all classes have the same
    total weight, and rows have the mean weight 1.
    """
    if asked is None:
        return None
    if isinstance(asked, str):
        counts = Counter(data.labels)
        share = len(data) / len(counts)
        found = [
            share / counts[index] if index in counts else 1.0 for index in range(len(data.classes))
        ]
        return torch.tensor(found)
    for name in asked:
        if name not in data.classes:
            close = difflib.get_close_matches(name, data.classes, n=3, cutoff=0.4)
            raise InputError(
                f"--class-weights: no class {name!r}; "
                f"{'closest' if close else 'classes'}: {', '.join(close or data.classes[:10])}"
            )
    return torch.tensor([float(asked.get(name, 1.0)) for name in data.classes])
