"""The methods of the board, by name. Another one is one more entry of ``METHODS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

# opendataval is imported where it is used: the tables are made without it.
Make = Callable[[int], Any]


@dataclass(frozen=True)
class Entry:
    """A method.

    Attributes:
        kind: ``"ours"``, ``"OpenDataVal's"`` or ``"other"``.
        made: its evaluator, from a seed.
        note: budget, where it has one.
    """

    kind: str
    made: Make
    note: str = ""


def _theirs(name: str, note: str = "", **options: Any) -> Entry:
    def made(seed: int) -> Any:
        from opendataval import dataval

        return getattr(dataval, name)(random_state=seed, **options)

    return Entry("OpenDataVal's", made, note)


def _gram(values: str) -> Entry:
    def made(_: int) -> Any:
        from turnover.integrations.opendataval import TurnoverEvaluator

        return TurnoverEvaluator(values=values)

    return Entry("ours", made, "1 training")


def _turn_over(values: str) -> Entry:
    def made(seed: int) -> Any:
        from turnover.integrations.opendataval import TurnoverEvaluator

        from .evaluators import wide

        return TurnoverEvaluator(partial(wide, seed), values)

    return Entry("ours", made, "1 training of 4,096 units")


def _here(name: str, note: str, kind: str = "other", **options: Any) -> Entry:
    def made(seed: int) -> Any:
        from . import evaluators

        return getattr(evaluators, name)(random_state=seed, **options)

    return Entry(kind, made, note)


METHODS = {
    "gram, validation": _gram("validation"),
    "gram, self": _gram("self"),
    "turn-over, validation": _turn_over("validation"),
    "turn-over, self": _turn_over("self"),
    "label errors": _here("LabelErrors", "no training", "ours"),
    "mean margin (AUM)": _here("MeanMargin", "1 training"),
    "LossVal, 5 epochs": _here("LossVal", "1 training", epochs=5),
    "LossVal, 30 epochs": _here("LossVal", "1 training", epochs=30),
    "Data-OOB": _theirs("DataOob", "100 trainings", num_models=100),
    "KNN-Shapley": _theirs("KNNShapley", "no training"),
    "LAVA": _theirs("LavaEvaluator", "no training"),
    "DVRL": _theirs("DVRL", "500 small trainings", rl_epochs=500),
    "influence by subsets": _theirs("InfluenceSubsample", "100 trainings", num_models=100),
    "Data Banzhaf": _theirs("DataBanzhaf", "100 trainings", num_models=100),
    "Beta-Shapley": _here("beta_shapley", "1 to 3 permutations", "OpenDataVal's", trainings=400),
    "random": _theirs("RandomEvaluator", "no training"),
}
