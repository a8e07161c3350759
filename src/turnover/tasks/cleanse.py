"""Cleansing: removal of training rows that make predictions on a validation set worse.

Heads on features of the pretrained encoder (:mod:`turnover.tasks.linear_probe`) are trained without the
lowest rows of a ranking, and compared with heads trained on all rows, without as many random rows, and
without the rows of the highest loss. The run's own network is not trained again.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from turnover import objectives
from turnover.batches import Batch
from turnover.data.base import Data
from turnover.data.delimited import finite_number
from turnover.dropout.head import WideHead
from turnover.dropout.network import Network
from turnover.errors import InputError, check_whole
from turnover.influence.estimator import Influence
from turnover.io.bars import tqdm
from turnover.io.files import write_csv
from turnover.results.result import Result
from turnover.runs.run import Run
from turnover.runs.source import write_changed
from turnover.runs.targets import check_scored
from turnover.tasks.label_errors import check_rows
from turnover.tasks.linear_probe import (
    Calibrated,
    Frozen,
    frozen,
    logits_of,
    train_head,
    train_masked_head,
)
from turnover.tasks.review import read_column

RANKINGS = ("gram", "turn-over", "self")
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2)
NONE, RANDOM, LOSS = "none", "random", "loss"
_GIVEN = "scores"
_NOTHING = np.empty(0, dtype=np.int64)
_RANKING_HEADS = 5
MASKED_HEADS = 2
_RANKING_SEED = 2**20
"""Heads that rank have other seeds than those that are trained without what they ranked."""

Draws = Mapping[tuple[str, float], Sequence[NDArray[np.int64]]]
"""Name of a removal and fraction, to the removed rows of each seed."""


@dataclass(frozen=True)
class Ranking:
    """Scores (rows,), positive = helpful, of which the lowest are removed first.

    Those of ``"self"`` are minus the self-influence; ``z`` and ``q`` are as in :class:`turnover.Result`.
    """

    name: str
    scores: NDArray[np.floating]
    z: NDArray[np.float32] | None = None
    q: NDArray[np.float64] | None = None

    def reason(self, row: int) -> str:
        """Say why a row is removed."""
        if self.name == "self":
            return "memorized: among the highest self-influence"
        if self.name == _GIVEN:
            return "among the lowest of the given scores"
        what = "harmful" if self.scores[row] < 0 else "among the least helpful"
        return f"{what} to the validation rows, by {self.name}"


@dataclass(frozen=True)
class Point:
    """Accuracy and mean cross entropy (nats) of each seed's head, trained without some rows.

    ``removal`` is ``"none"``, ``"random"``, ``"loss"``, or the ranking's name.
    """

    removal: str
    fraction: float
    removed: int
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]


@dataclass(frozen=True)
class Cleansing:
    """Effects of removing rows, and the rows that are best removed.

    Attributes:
        ranking: scores by which rows were removed.
        curve: figures on the validation rows for every removal and fraction.
        test: figures on the run's test rows without removal, and for every removal at ``fraction``.
        fraction: share with the lowest mean loss on the validation rows; 0 if no removal lowers it.
        removed: int64, removed training rows, in the order of the ranking.
    """

    ranking: Ranking
    curve: tuple[Point, ...]
    test: tuple[Point, ...]
    fraction: float
    removed: NDArray[np.int64]

    def to_dict(self) -> dict[str, Any]:
        """Return the curves and the choice as JSON values."""
        return {
            "ranking": self.ranking.name,
            "fraction": self.fraction,
            "removed": len(self.removed),
            "validation": [asdict(point) for point in self.curve],
            "test": [asdict(point) for point in self.test],
        }


def cleanse(
    run: Run,
    validation: Data,
    *,
    ranking: str = "gram",
    scores: NDArray[np.floating] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    seeds: int = 3,
) -> Cleansing:
    """Rank the training rows of a run, and train heads without the lowest of them.

    Takes ``seeds * (1 + 3 * fractions)`` trainings of a head with 512 hidden units on frozen features.

    Args:
        validation: rows of the run's classes to predict better; none of them may be in the run.
        ranking: ``"gram"``: influence on the validation rows, by five heads trained on all rows;
            ``"turn-over"``: the same, by two wide heads trained under masks; ``"self"``: the
            self-influence that ``turnover influence`` stored, highest first.
        scores: a ranking of your own, float (train,), positive = helpful.
        fractions: shares of the training rows to remove, each in (0, 1).
        seeds: heads trained for each removal and share.

    Raises:
        InputError: an unknown ranking, fractions outside (0, 1), seeds below 1, scores of another shape
            or that are not finite, training rows in groups, validation rows of one class or that are in
            the run, or a fraction that removes all rows of a class.
    """
    _check(run, validation, ranking, scores, fractions, seeds)
    if run.masks is None and not run.pipeline.keeps_pretrained:
        warnings.warn(
            f"the heads that measure removals are trained on features of {run.folder}'s model as it is, "
            f"which has learned the removed rows: gains come out too small; train it again on the cleaned "
            f"rows to know them",
            stacklevel=2,
        )
    known = _known(run, ranking, scores)
    train, held, test = (frozen(run, data) for data in (run.train, validation, run.test))
    heads = ranking_heads(train)
    if known is None:
        # The uncalibrated loss of another domain is mostly that of a threshold and a confidence that do
        # not fit there: too many rows that shift them would be removed (docs/cleanse.md).
        if ranking == "gram":
            found = by_gram(heads, train, held)
        else:
            found = by_masks(masked_heads(train), train, held)
        known = Ranking(ranking, found.scores, found.z, found.q)
    orders = {known.name: np.argsort(known.scores, kind="stable"), LOSS: by_loss(heads, train)}
    gone = {
        (name, fraction): [
            taken_out(orders.get(name), fraction, len(train), seed) for seed in range(seeds)
        ]
        for name in (known.name, RANDOM, LOSS)
        for fraction in sorted(set(fractions))
    }
    _check_classes(run.train, gone)
    every = {(NONE, 0.0): [_NOTHING] * seeds, **gone}
    curve, tested = _retrained(every, train, held, test)
    by_ranking = [point for point in curve if point.removal in (NONE, known.name)]
    fraction = min(by_ranking, key=lambda point: (np.mean(point.loss), point.fraction)).fraction
    return Cleansing(
        known,
        tuple(curve),
        tuple(one for one in tested if one.fraction in (0, fraction)),
        fraction,
        gone[known.name, fraction][0] if fraction else _NOTHING,
    )


def read_scores(run: Run, path: Path) -> NDArray[np.float64]:
    """Read a score for every training row from a CSV file with the columns key and score."""
    found: dict[int, float] = {}
    for number, row, score in read_column(run, path, "score"):
        value = finite_number(score)
        if value is None:
            raise InputError(
                f"{path}: line {number}: {score!r} is not a finite number with a decimal point"
            )
        found[row] = value
    missing = [key for row, key in enumerate(run.train.keys) if row not in found]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} training rows have no score, such as {missing[0]!r}"
        )
    return np.array([found[row] for row in range(len(run.train))])


def write_cleansed(run: Run, found: Cleansing, out: Path, removed: Path) -> None:
    """Write the training file without the removed rows, and a CSV file of these with the reasons.

    As :func:`~turnover.runs.source.write_changed`: all else in the file stays as it was.

    Args:
        out: file of the data; its ending is that of CSV, TSV, JSON, JSON lines or Parquet, or .npz for
            images.
        removed: CSV file.

    Raises:
        InputError: a format that cannot be written, or a folder that does not exist.
    """
    gone, ranking = found.removed.tolist(), found.ranking
    write_changed(run, {}, gone, out)
    lines = [
        [
            run.train.keys[row],
            run.train.classes[run.train.labels[row]],
            ranking.reason(row),
            f"{ranking.scores[row]:.6g}",
            "" if ranking.z is None else f"{ranking.z[row]:.2f}",
            "" if ranking.q is None else f"{ranking.q[row]:.3g}",
            run.train.shown(row),
        ]
        for row in gone
    ]
    write_csv(removed, ("key", "label", "reason", "score", "z", "q", "text"), lines)


def ranking_heads(train: Frozen) -> list[WideHead]:
    """Train the heads on all rows by which rows are ranked."""
    seeds = tqdm(
        range(_RANKING_SEED, _RANKING_SEED + _RANKING_HEADS), "heads for ranking", unit="head"
    )
    return [train_head(train, range(len(train)), seed) for seed in seeds]


def masked_heads(train: Frozen) -> list[Network]:
    """Train the wide heads on all rows under masks, with row numbers as ids."""
    seeds = tqdm(range(_RANKING_SEED, _RANKING_SEED + MASKED_HEADS), "masked heads", unit="head")
    return [train_masked_head(train, seed) for seed in seeds]


def by_gram(heads: Sequence[WideHead], train: Frozen, held: Frozen) -> Result:
    """Estimate the influence of training rows on the calibrated loss of others, by their heads."""
    models = [Calibrated(head, logits_of(head, held), held.labels) for head in heads]
    influence = Influence(models, objectives.cross_entropy, "gram", progress=True)
    return influence.fit(train.batches()).aggregate(held.batches())


def by_loss(heads: Sequence[WideHead], train: Frozen) -> NDArray[np.int64]:
    """Order rows by their mean loss under heads trained on them, highest first."""
    losses = [
        functional.cross_entropy(logits_of(head, train), train.labels, reduction="none")
        for head in heads
    ]
    return np.argsort(-torch.stack(losses).mean(dim=0).numpy(), kind="stable")


def taken_out(
    order: NDArray[np.int64] | None, fraction: float, rows: int, seed: int
) -> NDArray[np.int64]:
    """Return the rows to remove: the first of an order, or rows drawn by the seed."""
    if order is None:
        order = np.random.default_rng(seed).permutation(rows)
    return order[: max(1, round(fraction * rows))]


def _check(
    run: Run,
    validation: Data,
    ranking: str,
    scores: NDArray[np.floating] | None,
    fractions: Sequence[float],
    seeds: int,
) -> None:
    if ranking not in RANKINGS:
        raise InputError(f"unknown ranking {ranking!r}; there are {', '.join(RANKINGS)}")
    if not fractions or not all(0 < fraction < 1 for fraction in fractions):
        raise InputError(
            f"fractions must be strictly between 0 and 1, at least one, got {list(fractions)}"
        )
    check_whole("seeds", seeds, 1)
    check_rows(run)
    if ranking == "self" and scores is None and run.train.grouped:
        raise InputError(
            f"{run.folder} has groups, which have no self-influence: choose another ranking"
        )
    if scores is not None and (
        np.shape(scores) != (len(run.train),) or not np.isfinite(scores).all()
    ):
        raise InputError(
            f"scores must be {len(run.train)} finite numbers, one for each training row, got "
            f"{np.shape(scores)}"
        )
    if len(set(validation.labels)) < 2:
        raise InputError(
            "the validation rows are all of one class: a validation set needs at least two classes"
        )
    for name, data in (("test", run.test), ("training", run.train)):
        there = set(data.contents())
        shared = [row for row, one in enumerate(validation.contents()) if one in there]
        if shared:
            raise InputError(
                f"{len(shared)} validation rows are also among the run's {name} rows, such as "
                f"{validation.shown(shared[0])!r:.200}: figures on rows that chose the removal would be "
                f"biased; remove them from the validation file"
            )


def _known(run: Run, name: str, scores: NDArray[np.floating] | None) -> Ranking | None:
    if scores is not None:
        return Ranking(_GIVEN, np.asarray(scores))
    if name != "self":
        return None
    stored = run.read_result("self")
    check_scored(run)
    order = np.argsort(stored.train_ids)
    if not np.array_equal(stored.train_ids[order], np.sort(run.train.ids.numpy())):
        raise InputError(
            f"{run.folder}: the stored self-influence is of other training rows: run `turnover influence "
            f"{run.folder}` again"
        )
    place = order[np.searchsorted(stored.train_ids, run.train.ids.numpy(), sorter=order)]
    return Ranking(name, -stored.scores[place], stored.z[place], stored.q[place])


def by_masks(networks: Sequence[Network], train: Frozen, held: Frozen) -> Result:
    """Estimate the influence of training rows on the calibrated loss of others, by their masked heads.

    The ids of the result are row numbers.
    """
    logits = torch.stack([logits_of(network.model, held) for network in networks]).mean(dim=0)
    calibrated = Calibrated(nn.Identity(), logits, held.labels).of

    def cost(outputs: Any, batch: Batch) -> Tensor:
        return objectives.cross_entropy(calibrated(outputs), batch)

    influence = Influence(networks, cost, "linear", progress=True)
    return influence.aggregate(held.batches(), torch.arange(len(train)))


def _check_classes(train: Data, gone: Draws) -> None:
    labels = np.array(train.labels)
    for (name, fraction), draws in gone.items():
        for rows in draws:
            left = np.bincount(np.delete(labels, rows), minlength=len(train.classes))
            if not left.all():
                raise InputError(
                    f"removing {100 * fraction:g}% of the training rows by {name} leaves no row of class "
                    f"{train.classes[int(left.argmin())]!r}: give smaller fractions"
                )


def _retrained(
    gone: Draws, train: Frozen, held: Frozen, test: Frozen
) -> tuple[list[Point], list[Point]]:
    """Train heads without rows, and measure them on the validation and the test rows."""
    curve: list[Point] = []
    tested: list[Point] = []
    every_row = np.arange(len(train))
    with tqdm(desc="cleansing", total=sum(map(len, gone.values())), unit="head") as bar:
        for (name, fraction), draws in gone.items():
            figures = []
            for seed, rows in enumerate(draws):
                head = train_head(train, torch.from_numpy(np.delete(every_row, rows)), seed)
                figures.append((_figures(head, held), _figures(head, test)))
                bar.update()
            for points, side in zip((curve, tested), zip(*figures, strict=True), strict=True):
                points.append(Point(name, fraction, len(draws[0]), *zip(*side, strict=True)))
    return curve, tested


def _figures(head: WideHead, data: Frozen) -> tuple[float, float]:
    """Accuracy, and mean cross entropy in nats."""
    logits = logits_of(head, data)
    loss = functional.cross_entropy(logits, data.labels)
    return float((logits.argmax(dim=1) == data.labels).float().mean()), float(loss)
