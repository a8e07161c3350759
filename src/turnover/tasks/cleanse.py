"""Cleansing: which training rows to take out so that a validation set is predicted better.

Rows are ranked, the lowest of the ranking are taken out, and new heads on the pretrained encoder's
features (:mod:`turnover.tasks.linear_probe`) are trained without them, beside heads trained on all rows,
without as many drawn at random, and without those of the highest loss. The run's own network is not
trained again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm

from turnover import objectives
from turnover.batches import Batch
from turnover.data.base import Data
from turnover.data.delimited import finite_number
from turnover.dropout.head import WideHead
from turnover.dropout.network import Network
from turnover.errors import InputError
from turnover.influence.estimator import Influence
from turnover.io.files import write_csv
from turnover.results.result import Result
from turnover.runs.run import Run
from turnover.runs.targets import check_scored
from turnover.tasks.linear_probe import (
    Calibrated,
    Frozen,
    frozen,
    logits_of,
    train_head,
    train_masked_head,
)
from turnover.tasks.review import check_rows, read_column

RANKINGS = ("gram", "turn-over", "self")
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2)
NONE, RANDOM, LOSS = "none", "random", "loss"
_GIVEN = "scores"
_NOTHING = np.empty(0, dtype=np.int64)
_ROWS = 250
_RANKING_HEADS = 5
MASKED_HEADS = 2
_RANKING_SEED = 2**20
"""Heads that rank have other seeds than those that are trained without what they ranked."""


@dataclass(frozen=True)
class Ranking:
    """What the training rows are taken out by, lowest first.

    Attributes:
        name: ``"gram"``, ``"turn-over"``, ``"self"`` or ``"scores"``.
        scores: float (rows,), positive = helpful; of ``"self"`` minus the self-influence.
        z: float32 (rows,), scores in units of their noise; ``None`` where it is not known.
        q: float64 (rows,), adjusted p-values; likewise.
    """

    name: str
    scores: NDArray[np.floating]
    z: NDArray[np.float32] | None = None
    q: NDArray[np.float64] | None = None

    def reason(self, row: int) -> str:
        """Why a row is taken out."""
        if self.name == "self":
            return "learned by heart: among the highest self-influence"
        if self.name == _GIVEN:
            return "among the lowest of the given scores"
        what = "harmful" if self.scores[row] < 0 else "among the least helpful"
        return f"{what} to the validation rows, by {self.name}"


@dataclass(frozen=True)
class Point:
    """Heads trained without some rows, on one set of rows.

    Attributes:
        removal: ``"none"``, ``"random"``, ``"loss"``, or the ranking's name.
        fraction: share of the training rows taken out.
        removed: how many these are.
        accuracy: of each seed's head.
        loss: likewise, mean cross entropy in nats.
    """

    removal: str
    fraction: float
    removed: int
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]


@dataclass(frozen=True)
class Cleansing:
    """What taking rows out did.

    Attributes:
        ranking: what rows were taken out by.
        curve: on the validation rows, every removal and fraction.
        test: on the run's test rows, without removal and with each at the chosen fraction.
        fraction: that at which the ranking had the lowest mean loss on the validation rows; 0: without
            removal it was as low.
        removed: int64, training rows taken out, the first first.
    """

    ranking: Ranking
    curve: tuple[Point, ...]
    test: tuple[Point, ...]
    fraction: float
    removed: NDArray[np.int64]

    def to_dict(self) -> dict[str, Any]:
        """The curves and the choice as JSON values."""
        points = {name: [asdict(one) for one in getattr(self, name)] for name in ("curve", "test")}
        return {
            "ranking": self.ranking.name,
            "fraction": self.fraction,
            "removed": len(self.removed),
            "validation": points["curve"],
            "test": points["test"],
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
        validation: rows to be predicted better, of the run's classes; none of them in the run.
        ranking: ``"gram"``: influence on the validation rows, of five heads trained on all rows;
            ``"turn-over"``: likewise, of two wide heads trained under masks; ``"self"``: the
            self-influence that ``turnover influence`` stored, the highest first.
        scores: a ranking of the user's in place of these, float (train,), positive = helpful.
        fractions: shares of the training rows to take out, each in (0, 1).
        seeds: heads trained without each.

    Raises:
        InputError: an unknown ranking, fractions outside (0, 1), seeds below 1, scores that do not
            fit, training rows in groups, validation rows of one class or that are in the run, or a
            fraction that leaves nothing of a class.
    """
    _check(run, validation, ranking, scores, fractions, seeds)
    known = _known(run, ranking, scores)
    train, held, test = (frozen(run, data) for data in (run.train, validation, run.test))
    heads = ranking_heads(train)
    if known is None:
        known = _estimated(ranking, heads, train, held)
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
    fraction = _best(curve, known.name)
    return Cleansing(
        known,
        tuple(curve),
        tuple(one for one in tested if one.fraction in (0, fraction)),
        fraction,
        gone[known.name, fraction][0] if fraction else _NOTHING,
    )


def read_scores(run: Run, path: Path) -> NDArray[np.float64]:
    """A score for every training row, from a CSV file with the columns key and score.

    Raises:
        InputError: no such file, a missing column, an unknown, repeated or missing key, or a score
            that is not a finite number.
    """
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
    """Write the training data without the rows taken out, and a CSV of these with the reasons.

    Args:
        out: CSV, TSV, JSON lines or Parquet file of the data, or .npz of images; the ending tells.
        removed: CSV file.

    Raises:
        InputError: a format that cannot be written, or a folder that does not exist.
    """
    gone, ranking = found.removed.tolist(), found.ranking
    kept = sorted(set(range(len(run.train))) - set(gone))
    run.train.take(kept).export(out)
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
    """Train heads on all rows, with other seeds than any that is trained without some."""
    seeds = _bar("heads for ranking", _RANKING_HEADS)
    return [train_head(train, range(len(train)), seed) for seed in seeds]


def masked_heads(train: Frozen) -> list[Network]:
    """Train wide heads on all rows under masks, each row's number being its id."""
    return [train_masked_head(train, seed) for seed in _bar("masked heads", MASKED_HEADS)]


def _bar(name: str, heads: int) -> Iterable[int]:
    """Seeds of heads that rank, under a progress bar."""
    return tqdm(range(_RANKING_SEED, _RANKING_SEED + heads), desc=name, unit="head")


def by_gram(heads: Sequence[WideHead], train: Frozen, held: Frozen) -> Result:
    """Influence of training rows on the calibrated loss of others, of heads trained on them."""
    models = [Calibrated(head, logits_of(head, held), held.labels) for head in heads]
    influence = Influence(models, objectives.cross_entropy, "gram", progress=True)
    return influence.fit(batches(train)).aggregate(batches(held))


def by_loss(heads: Sequence[WideHead], train: Frozen) -> NDArray[np.int64]:
    """Rows by their mean loss under heads trained on them, the highest first."""
    losses = [
        functional.cross_entropy(logits_of(head, train), train.labels, reduction="none")
        for head in heads
    ]
    return np.argsort(-torch.stack(losses).mean(dim=0).numpy(), kind="stable")


def taken_out(
    order: NDArray[np.int64] | None, fraction: float, rows: int, seed: int
) -> NDArray[np.int64]:
    """Rows taken out: the first of an order, or a draw of the seed's own."""
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
            f"fractions must lie strictly between 0 and 1, at least one, got {list(fractions)}"
        )
    if seeds < 1:
        raise InputError(f"seeds must be >= 1, got {seeds}")
    check_rows(run)
    if scores is not None and (
        np.shape(scores) != (len(run.train),) or not np.isfinite(scores).all()
    ):
        raise InputError(
            f"scores must be {len(run.train)} finite numbers, one for each training row, got "
            f"{np.shape(scores)}"
        )
    if len(set(validation.labels)) < 2:
        raise InputError(
            "the validation rows are all of one class: what harms the others cannot be told by them"
        )
    for name, data in (("test", run.test), ("training", run.train)):
        there = set(data.contents())
        shared = [row for row, one in enumerate(validation.contents()) if one in there]
        if shared:
            raise InputError(
                f"{len(shared)} validation rows are also among the run's {name} rows, such as "
                f"{validation.shown(shared[0])!r}: figures on rows that chose what was taken out say "
                f"nothing; leave them out of the validation file"
            )


def _estimated(name: str, heads: Sequence[WideHead], train: Frozen, held: Frozen) -> Ranking:
    # The plain loss of another domain is largely that of a threshold and a confidence that do not
    # fit there. Whatever shifts them would be taken out, and too much of it (docs/cleanse.md).
    if name == "turn-over":
        result = by_masks(masked_heads(train), train, held)
    else:
        result = by_gram(heads, train, held)
    return Ranking(name, result.scores, result.z, result.q)


def _known(run: Run, name: str, scores: NDArray[np.floating] | None) -> Ranking | None:
    """A ranking that is there already."""
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
    """Influence of training rows on the calibrated loss of others, of wide heads trained under masks.

    The ids of the result are the rows' numbers.
    """
    logits = torch.stack([logits_of(network.model, held) for network in networks]).mean(dim=0)
    calibrated = Calibrated(nn.Identity(), logits, held.labels).of

    def cost(outputs: Any, batch: Batch) -> Tensor:
        return objectives.cross_entropy(calibrated(outputs), batch)

    influence = Influence(networks, cost, "linear", progress=True)
    return influence.aggregate(batches(held), torch.arange(len(train)))


def batches(data: Frozen) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Features, labels and the rows' numbers as ids."""
    columns = (data.features, data.labels, torch.arange(len(data)))
    return list(zip(*(torch.split(values, _ROWS) for values in columns), strict=True))


def _check_classes(
    train: Data, gone: Mapping[tuple[str, float], Sequence[NDArray[np.int64]]]
) -> None:
    labels = np.array(train.labels)
    for (name, fraction), draws in gone.items():
        for rows in draws:
            left = np.bincount(np.delete(labels, rows), minlength=len(train.classes))
            if not left.all():
                raise InputError(
                    f"without {100 * fraction:g}% of the training rows by {name} nothing is left of the "
                    f"class {train.classes[int(left.argmin())]!r}: take smaller fractions"
                )


def _retrained(
    gone: Mapping[tuple[str, float], Sequence[NDArray[np.int64]]],
    train: Frozen,
    held: Frozen,
    test: Frozen,
) -> tuple[list[Point], list[Point]]:
    """Train heads without rows, and measure them on the validation and on the test rows."""
    curve: list[Point] = []
    tested: list[Point] = []
    every_row = np.arange(len(train))
    with tqdm(desc="cleansing", total=sum(map(len, gone.values())), unit="head") as bar:
        for (name, fraction), draws in gone.items():
            figures = []
            for seed, rows in enumerate(draws):
                kept = torch.from_numpy(np.delete(every_row, rows))
                head = train_head(train, kept, seed)
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


def _best(curve: Sequence[Point], name: str) -> float:
    """The fraction with the lowest mean loss, the smallest of several; 0 among them."""
    points = [one for one in curve if one.removal in (NONE, name)]
    return min(points, key=lambda one: (np.mean(one.loss), one.fraction)).fraction
