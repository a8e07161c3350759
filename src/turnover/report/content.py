"""The content of a report as plain data, not rendered.

Scores, losses and noise floors are in nats. A score is positive when the training instance was
helpful to the target and negative when it was harmful. A q-value is Benjamini-Hochberg adjusted
over the training instances of one target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from turnover.errors import InputError
from turnover.tasks.explain import Explanation, GramExplanation, Influential, Instance


@dataclass(frozen=True)
class Curve:
    """A loss curve.

    Attributes:
        name: "train exposed", "train hidden", "test exposed", "test hidden" or "test mean".
        steps: optimizer steps.
        mean: loss at each step, in nats.
        half_width: half the width of the 95% interval around each mean, in nats.
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
    """Accuracy of a model and its confidence interval, as shares from 0 to 1."""

    name: str
    accuracy: float
    low: float
    high: float
    note: str


@dataclass(frozen=True)
class Fact:
    """A measurement: its name, its value with the unit, and how it was measured."""

    name: str
    value: str
    how: str


@dataclass(frozen=True)
class HarmfulOverall(Influential):
    """A training instance that was harmful to all test targets together.

    `score`, `z` and `q` are those of the aggregate influence. `self_influence` is the influence on
    itself in nats, None when not measured.
    """

    self_influence: float | None
    self_influence_q: float | None


@dataclass(frozen=True)
class DoubtfulLabel(Instance):
    """A training instance whose label is doubtful.

    Attributes:
        wrong: the probability that the label is wrong.
        suggested: the most probable other class.
        probability_of_suggested: that this class is the right one.
    """

    wrong: float
    suggested: str
    probability_of_suggested: float


@dataclass(frozen=True)
class LabelSummary:
    """The most doubtful labels first, and what is thought of all.

    Attributes:
        rows: the most doubtful ones.
        expected: expected number of wrong labels among all training rows.
        likely: number of labels that are more probably wrong than right.
        training_rows: number of all training rows.
        source: predictions that this is by.
    """

    rows: tuple[DoubtfulLabel, ...]
    expected: float
    likely: int
    training_rows: int
    source: str


@dataclass(frozen=True)
class NoiseSummary:
    """How large scores are by chance.

    Attributes:
        median: of the targets' noise floors, in nats.
        low: their 5% quantile.
        high: their 95% quantile.
        significant_pairs: significant pairs of a training instance and a target.
        pairs: all these pairs; 0: the page does not show the significant share.
        ghost_false_positive_rate: share (0 to 1) of pairs of a fresh ghost and a target with p < 0.01.
        ghost_pairs: all these pairs; 0: the page does not show the rate.
        spearman_exact_linear: rank correlation of exact scores and their linear approximation; ``None``
            when not measured.
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

    Attributes:
        objective: what the scores are differences of.
        deploy: a sentence on which model to deploy.
        commands: shell commands that make this report again.
        labels: doubts about the training labels; ``None`` where they were not estimated.
        by_gram: whether scores are those of gram alone, of a model that was trained without masks.
        train_images: `data:` links by the training instances' keys; empty for texts.
        test_images: `data:` links by the targets' keys.
    """

    title: str
    objective: str
    classes: tuple[str, ...]
    curves: tuple[Curve, ...]
    accuracy: tuple[AccuracyRow, ...]
    deploy: str
    errors: tuple[Explanation, ...]
    harmful_overall: tuple[HarmfulOverall, ...]
    noise: NoiseSummary
    facts: tuple[Fact, ...]
    commands: tuple[str, ...]
    labels: LabelSummary | None = None
    by_gram: bool = False
    train_images: Mapping[str, str] = field(default_factory=dict)
    test_images: Mapping[str, str] = field(default_factory=dict)

    def without_texts(self) -> ReportContent:
        """Copy the content without the texts and images of targets and training instances."""
        names = ("errors", "harmful_overall", "labels")
        bare = {name: _without_texts(getattr(self, name)) for name in names}
        return replace(self, **bare, train_images={}, test_images={})


def _without_texts(value: Any) -> Any:
    """Set every field `text` to None, in values within one another."""
    if isinstance(value, tuple):
        return tuple(map(_without_texts, value))
    if isinstance(value, Instance | Explanation | GramExplanation | LabelSummary):
        values = {name: _without_texts(one) for name, one in vars(value).items()}
        return replace(value, **values | ({"text": None} if "text" in values else {}))
    return value
