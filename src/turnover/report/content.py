"""What a report says, as plain data: no rendering.

Scores, losses and noise floors are in nats. A score is positive when the training instance was
helpful to the target and negative when it was harmful. A q-value is Benjamini-Hochberg adjusted
over the training instances of one target; at most
`turnover.tasks.explain.SIGNIFICANT_Q` counts as significant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from turnover.errors import InputError
from turnover.tasks.explain import Explanation, GramExplanation, GramInfluential, Influential

_Item = TypeVar("_Item", Influential, GramInfluential)


@dataclass(frozen=True)
class Curve:
    """A loss curve: `mean` in nats at each of `steps` (optimiser steps).

    `half_width` is half the width of the 95% interval around the mean, in nats. Names are
    "train exposed", "train hidden", "test exposed", "test hidden" and, if wanted, "test mean".
    """

    name: str
    steps: tuple[int, ...]
    mean: tuple[float, ...]
    half_width: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.steps) == len(self.mean) == len(self.half_width):
            raise InputError(
                f"curve {self.name!r}: steps, mean and half_width must be equally long, got "
                f"{len(self.steps)}, {len(self.mean)} and {len(self.half_width)}"
            )


@dataclass(frozen=True)
class AccuracyRow:
    """The accuracy of one model and its confidence interval, all as shares from 0 to 1."""

    name: str
    accuracy: float
    low: float
    high: float
    note: str


@dataclass(frozen=True)
class Fact:
    """Something measured: its name, its value with the unit, and how it was measured."""

    name: str
    value: str
    how: str


@dataclass(frozen=True)
class HarmfulOverall(Influential):
    """A training instance that was harmful to the test targets taken together.

    `score` is the aggregate influence in nats (negative: harmful), `z` and `q` belong to that
    aggregate. `self_influence` is its influence on itself in nats, None when not measured.
    """

    self_influence: float | None
    self_influence_q: float | None


@dataclass(frozen=True)
class NoiseFloor:
    """How large scores get by chance.

    `median`, `low` and `high` are the median and the 5% and 95% quantiles of the targets' noise
    floors in nats. `significant_pairs` of `pairs` (training instance, target) pairs are
    significant. `ghost_false_positive_rate` is the share (0 to 1) of the `ghost_pairs`
    (fresh ghost, target) pairs with p < 0.01. Where `pairs` or `ghost_pairs` is 0
    the page says nothing about their share, rather than that it is 0. `spearman_exact_linear` is
    the rank correlation of exact scores with their linear approximation, None when not measured.
    """

    median: float
    low: float
    high: float
    significant_pairs: int
    pairs: int
    ghost_false_positive_rate: float
    ghost_pairs: int
    spearman_exact_linear: float | None


@dataclass(frozen=True)
class ReportContent:
    """Everything a report shows.

    `objective` names what the scores are differences of, `deploy` is a sentence on which model to
    deploy, `commands` are the shell commands that make this report again. `train_images` and
    `test_images` are `data:` links by the keys of instances and targets, where these are images.
    """

    title: str
    objective: str
    classes: tuple[str, ...]
    curves: tuple[Curve, ...]
    accuracy: tuple[AccuracyRow, ...]
    deploy: str
    errors: tuple[Explanation, ...]
    harmful_overall: tuple[HarmfulOverall, ...]
    noise: NoiseFloor
    facts: tuple[Fact, ...]
    commands: tuple[str, ...]
    train_images: Mapping[str, str] = field(default_factory=dict)
    test_images: Mapping[str, str] = field(default_factory=dict)

    def without_texts(self) -> ReportContent:
        """A copy that holds no text or image of a target or training instance, only ids and labels."""

        def bare(error: Explanation) -> Explanation:
            gram = error.gram
            if gram is not None:
                gram = GramExplanation(_bare(gram.helpful), _bare(gram.harmful))
            helpful, harmful = _bare(error.helpful), _bare(error.harmful)
            return replace(error, text=None, helpful=helpful, harmful=harmful, gram=gram)

        return replace(
            self,
            errors=tuple(map(bare, self.errors)),
            harmful_overall=tuple(replace(item, text=None) for item in self.harmful_overall),
            train_images={},
            test_images={},
        )


def _bare(listed: tuple[_Item, ...]) -> tuple[_Item, ...]:
    return tuple(replace(item, text=None) for item in listed)
