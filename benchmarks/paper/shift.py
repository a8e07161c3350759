"""Another domain: heads trained on sentences about films, without what harms them on electronics.

Which training rows are taken out is decided by validation rows of the other domain, and so is what it
is compared with: epochs, weight decay, threshold and temperature of heads trained on all rows. All
see the same features of a frozen BERT.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import turnover
from benchmarks.fidelity import features
from turnover import InputError, objectives
from turnover.tasks.cleanse import (
    FRACTIONS,
    LOSS,
    MASKED_HEADS,
    NONE,
    RANDOM,
    by_gram,
    by_loss,
    by_masks,
    masked_heads,
    ranking_heads,
    taken_out,
)
from turnover.tasks.linear_probe import MASKED_UNITS, Calibrated, Frozen, logits_of, train_head

Json = dict[str, Any]
Orders = dict[str, NDArray[np.int64] | None]
Logits = tuple[Tensor, Tensor]
"""Of the validation and of the test rows."""
Mend = Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]
"""From logits and labels of the validation rows to what is done to logits."""

SELF, GRAM, MASKS = "self-influence", "gram", "turn-over"
PLAIN = {"gram, margin": objectives.margin, "gram, loss as it is": objectives.cross_entropy}
"""What else than the calibrated loss gram can be asked for."""
RANKINGS = (RANDOM, LOSS, SELF, GRAM, MASKS, *PLAIN)
TUNED, TUNED_TEMPERATURE = "tuned", "tuned, with temperature"
ADDED = "validation rows added"
CLEANSED = (GRAM, MASKS, f"{GRAM}, calibrated", f"{MASKS}, calibrated")
AGAINST = (NONE, RANDOM, LOSS, f"{RANDOM}, as many", f"{LOSS}, as many", TUNED, TUNED_TEMPERATURE)
POINTS, ERRORS = 0.015, 2.0
"""*Beats*: at least so much higher an accuracy, and more than so many standard errors."""

_FOLDER = "vader_icwsm2014"
FILMS, ELECTRONICS = "movieReviewSnippets", "amazonReviewSnippets"
_LEAST = 0.3  # of the mean rating, from -4 to 4: what is nearer to 0 has no label


@dataclass(frozen=True)
class Design:
    """How much of everything.

    Attributes:
        rows: training rows, drawn from the films.
        held_out: validation rows, drawn from the electronics; the others are the test rows.
        splits: draws of both.
        heads: trained of every kind on every split.
        fractions: shares of the training rows to take out.
        epochs: of the heads that are tuned.
        decays: likewise.
    """

    rows: int = 6000
    held_out: int = 1200
    splits: int = 5
    heads: int = 2
    fractions: Sequence[float] = FRACTIONS
    epochs: Sequence[int] = (1, 3, 10)
    decays: Sequence[float] = (0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class Measured:
    """Means over the heads of one kind.

    Attributes:
        held_accuracy: on the validation rows.
        held_loss: likewise.
        accuracy: on the test rows.
        loss: likewise.
    """

    held_accuracy: float
    held_loss: float
    accuracy: float
    loss: float


@dataclass(frozen=True)
class Split:
    """What one split gives.

    Attributes:
        curve: ranking to share to figures.
        kinds: of what is compared.
        chosen: shares, and epochs and weight decays, that the validation rows chose.
    """

    curve: dict[str, dict[float, Measured]]
    kinds: dict[str, Measured]
    chosen: dict[str, Any]


def load(data: Path | None, name: str) -> tuple[list[str], NDArray[np.int64]]:
    """Sentences of a set and whether they are positive (Hutto and Gilbert 2014).

    Args:
        data: the folder of ``vader_icwsm2014``, or a file in that folder; ``None``: what the
            environment's ``TURNOVER_DATA`` says.
        name: of the set.

    Raises:
        InputError: the file is not there.
    """
    given = Path(data or os.environ.get("TURNOVER_DATA") or ".")
    path = (given if given.is_dir() else given.parent) / _FOLDER / f"{name}_GroundTruth.txt"
    if not path.is_file():
        raise InputError(
            f"{path.name} is not at {path}: give the folder that {_FOLDER} lies in as --data, or in "
            f"TURNOVER_DATA"
        )
    texts, ratings = [], []
    for line in path.read_text(encoding="latin-1").splitlines():
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= _LEAST:
            texts.append(text)
            ratings.append(float(rating))
    return texts, (np.array(ratings) > 0).astype(np.int64)


def run(data: Path | None, folder: Path) -> Json:
    """The figures of all splits."""
    sets = [load(data, name) for name in (FILMS, ELECTRONICS)]
    films, electronics = (
        Frozen(torch.from_numpy(features.of(texts, folder)), torch.from_numpy(labels), 2)
        for texts, labels in sets
    )
    return figures(films, electronics)


def figures(films: Frozen, electronics: Frozen, design: Design | None = None) -> Json:
    """Means and deviations over splits, and paired differences."""
    design = design or Design()
    found = []
    for number in range(design.splits):
        found.append(split(films, electronics, design, number))
        kinds = found[-1].kinds
        said = {name: round(kinds[name].accuracy, 4) for name in (NONE, *CLEANSED, TUNED)}
        print(f"split {number}: {said}", flush=True)
    return {
        "rows": design.rows,
        "held_out": design.held_out,
        "test_rows": len(electronics) - design.held_out,
        "splits": design.splits,
        "heads": design.heads,
        "units": MASKED_UNITS,
        "masked_heads": MASKED_HEADS,
        "kinds": {name: _summed([one.kinds[name] for one in found]) for name in found[0].kinds},
        "chosen": {name: [one.chosen[name] for one in found] for name in found[0].chosen},
        "curves": {
            name: {
                f"{fraction:g}": _summed([one.curve[name][fraction] for one in found])
                for fraction in design.fractions
            }
            for name in RANKINGS
        },
        "points": POINTS,
        "errors": ERRORS,
        "against": {name: _against(name, [one.kinds for one in found]) for name in CLEANSED},
    }


def split(films: Frozen, electronics: Frozen, design: Design, number: int) -> Split:
    """One draw of training, validation and test rows."""
    generator = np.random.default_rng(number)
    train = _taken(films, generator.permutation(len(films))[: design.rows])
    drawn = generator.permutation(len(electronics))
    held = _taken(electronics, drawn[: design.held_out])
    test = _taken(electronics, drawn[design.held_out :])
    # Heads of every kind have the same seeds: what differs is what they are trained on, and how.
    seeds = range(design.heads)

    def trained(data: Frozen, gone: Sequence[NDArray[np.int64]] = (), **how: Any) -> list[Logits]:
        found = []
        for seed in seeds:
            kept = np.delete(np.arange(len(data)), gone[seed] if gone else [])
            head = train_head(data, torch.from_numpy(kept), seed, **how)
            found.append((logits_of(head, held), logits_of(head, test)))
        return found

    def measured(given: Sequence[Logits], mend: Mend = as_is) -> Measured:
        return _measured(given, held.labels, test.labels, mend)

    without: dict[str, dict[float, list[Logits]]] = {
        name: {
            fraction: trained(
                train,
                [
                    taken_out(order, fraction, len(train), design.heads * number + seed)
                    for seed in seeds
                ],
            )
            for fraction in design.fractions
        }
        for name, order in _orders(train, held).items()
    }
    curve = {
        name: {fraction: measured(given) for fraction, given in by_share.items()}
        for name, by_share in without.items()
    }
    mended = {
        f"{name}, calibrated": {
            fraction: measured(given, calibrated) for fraction, given in without[name].items()
        }
        for name in (GRAM, MASKS)
    }
    kinds, chosen = {NONE: measured(trained(train))}, dict[str, Any]()
    for name, points in (curve | mended).items():
        chosen[name] = _least_loss(points)
        kinds[name] = points[chosen[name]]
    for name, control in product(CLEANSED, (RANDOM, LOSS)):
        kinds[f"{control}, as many as {name}"] = curve[control][chosen[name]]
    tuned = {
        (epochs, decay): trained(train, epochs=epochs, weight_decay=decay)
        for epochs, decay in product(design.epochs, design.decays)
    }
    by_threshold = {pair: measured(given, threshold) for pair, given in tuned.items()}
    chosen[TUNED] = max(by_threshold, key=lambda pair: by_threshold[pair].held_accuracy)
    kinds[TUNED] = by_threshold[chosen[TUNED]]
    by_both = {pair: measured(given, calibrated) for pair, given in tuned.items()}
    chosen[TUNED_TEMPERATURE] = _least_loss(by_both)
    kinds[TUNED_TEMPERATURE] = by_both[chosen[TUNED_TEMPERATURE]]
    both = Frozen(
        torch.cat([train.features, held.features]),
        torch.cat([train.labels, held.labels]),
        train.classes,
    )
    kinds[ADDED] = measured(trained(both))
    return Split(curve, kinds, chosen)


def paired(ours: Sequence[Measured], theirs: Sequence[Measured]) -> Json:
    """Differences over the splits, each with its standard error, and whether ours beat the others.

    Args:
        ours: on each split.
        theirs: on the same splits.
    """
    pairs = list(zip(ours, theirs, strict=True))
    accuracy = [one.accuracy - other.accuracy for one, other in pairs]
    loss = [one.loss - other.loss for one, other in pairs]
    error = stdev(accuracy) / len(pairs) ** 0.5
    return {
        "accuracy": [round(mean(accuracy), 4), round(error, 4)],
        "loss": [round(mean(loss), 4), round(stdev(loss) / len(pairs) ** 0.5, 4)],
        "beats": mean(accuracy) >= POINTS and mean(accuracy) > ERRORS * error,
    }


def as_is(logits: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Logits stay."""
    del logits, labels
    return lambda given: given


def threshold(logits: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Logits of two classes, shifted so that most rows are right: the middle one of the best shifts."""
    margins, order = (logits[:, 1] - logits[:, 0]).sort()
    positive = labels[order]
    # Rows that are right when the first so many are called negative.
    right = positive.sum() + torch.cat([torch.zeros(1), (1 - 2 * positive).cumsum(0)])
    ends = margins[0] - 1, margins[-1] + 1
    cuts = torch.cat([ends[0][None], (margins[1:] + margins[:-1]) / 2, ends[1][None]])
    best = cuts[right == right.max()]
    shift = torch.stack([best[len(best) // 2], torch.zeros(())])
    return lambda given: given + shift


def calibrated(logits: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Logits shifted and scaled so that their loss is lowest."""
    return Calibrated(nn.Identity(), logits, labels).of


def _taken(data: Frozen, rows: NDArray[np.int64]) -> Frozen:
    return Frozen(data.features[rows], data.labels[rows], data.classes)


def _orders(train: Frozen, held: Frozen) -> Orders:
    """Training rows by every ranking, what is taken out first first; ``None``: drawn at random."""
    heads, networks = ranking_heads(train), masked_heads(train)
    own = turnover.Influence(networks, objectives.cross_entropy, "exact")
    scores = {
        SELF: -own.self_influence(train.batches()).scores,
        GRAM: by_gram(heads, train, held).scores,
        MASKS: by_masks(networks, train, held).scores,
    }
    for name, objective in PLAIN.items():
        influence = turnover.Influence(heads, objective, "gram")
        scores[name] = influence.fit(train.batches()).aggregate(held.batches()).scores
    by_score = {name: np.argsort(one, kind="stable") for name, one in scores.items()}
    return {RANDOM: None, LOSS: by_loss(heads, train), **by_score}


def _least_loss(points: Mapping[Any, Measured]) -> Any:
    """What has the lowest loss on the validation rows."""
    return min(points, key=lambda one: points[one].held_loss)


def _measured(given: Sequence[Logits], held: Tensor, test: Tensor, mend: Mend) -> Measured:
    figures = []
    for held_logits, test_logits in given:
        mended = mend(held_logits, held)
        sides = (mended(held_logits), held), (mended(test_logits), test)
        figures.append([value for side in sides for value in judged(*side)])
    return Measured(*(mean(values) for values in zip(*figures, strict=True)))


def judged(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy and mean loss."""
    right = (logits.argmax(dim=1) == labels).float().mean()
    return float(right), float(functional.cross_entropy(logits, labels))


def _summed(given: Sequence[Measured]) -> dict[str, list[float]]:
    """Mean and standard deviation over the splits."""

    def spread(values: list[float]) -> list[float]:
        return [round(mean(values), 4), round(stdev(values), 4)]

    return {
        "accuracy": spread([one.accuracy for one in given]),
        "loss": spread([one.loss for one in given]),
        "validation_accuracy": spread([one.held_accuracy for one in given]),
        "validation_loss": spread([one.held_loss for one in given]),
    }


def _against(name: str, found: Sequence[Mapping[str, Measured]]) -> Json:
    compared = {}
    for other in AGAINST:
        key = f"{other} as {name}" if other.endswith("as many") else other
        compared[other] = paired([one[name] for one in found], [one[key] for one in found])
    return compared
