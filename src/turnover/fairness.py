"""Gaps between two groups of rows in a classifier's predictions, and the training instances behind them.

Three gaps, all differences in the rate at which a class, the *positive* one, is predicted:
``"demographic_parity"`` among all rows of each group, ``"equal_opportunity"`` among its rows that are labeled
positive, and ``"equalized_odds"``, the larger of the differences among those and among the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover.batches import Batch
from turnover.dropout.modules import device_of, exclusive, trial
from turnover.errors import InputError
from turnover.influence.estimator import Influence
from turnover.influence.protocol import Ids
from turnover.objectives import logits_of, margin
from turnover.results.result import Result

GAPS = ("demographic_parity", "equal_opportunity", "equalized_odds")
_QUANTILE = 1.959964
"""Of the normal distribution, for intervals of 95%."""
_ROUNDING = 1e-7
"""Gap of equal mean probabilities, float32, of groups of different sizes."""


@dataclass(frozen=True)
class Gap:
    """A difference between two groups in the rate of positive predictions.

    Attributes:
        value: the higher rate minus the lower one, 0 to 1.
        low: lower end of its 95% interval, by Newcombe's method; below 0 the groups may be the other way
            round.
        high: upper end.
        rates: of each group.
        rows: of each group, that the rates are among.
    """

    value: float
    low: float
    high: float
    rates: dict[str, float]
    rows: dict[str, int]


@dataclass(frozen=True)
class Gaps:
    """The gaps of some predictions. ``None``: a group has no rows to measure it on.

    Attributes:
        demographic_parity: among all rows.
        equal_opportunity: among rows labeled positive.
        equalized_odds: the larger of the gaps among rows labeled positive and among the others.
        accuracy: share of the rows that are predicted as labeled.
    """

    demographic_parity: Gap
    equal_opportunity: Gap | None
    equalized_odds: Gap | None
    accuracy: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def gaps(predicted: Any, labels: Any, attribute: Any, *, positive: Any) -> Gaps:
    """Measure the gaps between two groups.

    Args:
        predicted: (rows,), predicted classes.
        labels: (rows,), classes.
        attribute: (rows,), two distinct values, which make the groups.
        positive: the class whose rates are compared.

    Raises:
        InputError: arrays of different lengths, an attribute that is missing in a row or has other than two
            values, or a positive class that is never predicted nor labeled.

    Example::

        found = gaps(model.predict(x), y, sex, positive=1)
        print(found.demographic_parity.value, found.equal_opportunity.low)
    """
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    names, members = _groups(attribute, len(labels))
    if predicted.shape != labels.shape or labels.ndim != 1:
        raise InputError(
            f"predictions and labels must be one for each row, got {predicted.shape} and {labels.shape}"
        )
    chosen, truth = predicted == positive, labels == positive
    if not chosen.any() and not truth.any():
        known = ", ".join(map(str, np.unique(labels)[:5].tolist()))
        raise InputError(f"no row is predicted or labeled {positive!r}; the labels are {known}")

    def among(rows: NDArray[np.bool_]) -> Gap | None:
        return _gap(names, [chosen[rows & group] for group in members])

    parity, opportunity, others = among(truth | ~truth), among(truth), among(~truth)
    assert parity is not None
    odds = None
    if opportunity is not None and others is not None:
        odds = max(opportunity, others, key=lambda gap: gap.value)
    return Gaps(parity, opportunity, odds, float((predicted == labels).mean()))


def gap_influence(
    influence: Influence,
    targets: Iterable[Any],
    attribute: Any,
    train_ids: Ids = None,
    *,
    gap: str = "demographic_parity",
    positive: int = 1,
) -> Result:
    """Estimate the influence of training instances, or groups of them, on a gap.

    The gap is that of mean probabilities, which has a derivative. A positive score says that the instance
    narrows it, a negative one that it widens it. Scores by gram are half to all of the change when instances
    are left out; those of turn-over are many times larger, and only rank (docs/fairness.md).

    Args:
        influence: of :func:`turnover.objectives.margin`, the default; by gram after its ``fit``.
        targets: batches of held-out rows with labels.
        attribute: (targets,), two distinct values, in the order of the batches.
        train_ids: as in :meth:`turnover.Influence.aggregate`.
        gap: one of :data:`GAPS`; ``"equalized_odds"`` is its larger difference at present.
        positive: index of the class whose rates are compared.

    Returns:
        :class:`turnover.Result` with scores (train,), in differences of probabilities.

    Raises:
        InputError: an unknown gap, another objective, targets without labels, an attribute as in
            :func:`gaps`, a group without rows to measure the gap on, or a gap of 0.

    Example::

        influence = turnover.Influence(model, method="gram").fit(train_batches)
        result = gap_influence(influence, held_out_batches, sex, gap="equal_opportunity")
        widening = result.train_ids[result.scores.argsort()[:20]]
    """
    if gap not in GAPS:
        raise InputError(f"unknown gap {gap!r}; there are {', '.join(GAPS)}")
    if influence.objective is not margin:
        raise InputError("a gap follows log-odds: leave the objective of Influence at margin")
    batches = [influence.adapter(one) if not isinstance(one, Batch) else one for one in targets]
    if not batches:
        raise InputError("no targets given")
    if any(batch.labels is None or batch.labels.dim() != 1 for batch in batches):
        raise InputError("a gap needs labels (rows,): give batches (inputs, labels)")
    labels = torch.cat([batch.labels.cpu() for batch in batches if batch.labels is not None])
    names, members = _groups(attribute, len(labels))
    probabilities = _probabilities(influence, batches, positive)
    weights = _weights(probabilities, labels.numpy() == positive, names, members, gap)
    found = influence.aggregate(_labeled(batches, positive), train_ids, weights=weights.tolist())
    return replace(found, objective=gap)


def _groups(attribute: Any, rows: int) -> tuple[list[str], list[NDArray[np.bool_]]]:
    """Names of both groups, and the rows of each: bool (rows,)."""
    values = attribute.tolist() if hasattr(attribute, "tolist") else list(attribute)
    if len(values) != rows:
        raise InputError(f"{len(values)} values of the attribute for {rows} rows: give one each")
    for row, value in enumerate(values):
        if value is None or value != value:
            raise InputError(f"row {row} has no value of the attribute: leave it out")
    known = sorted(set(values), key=str)
    if len(known) != 2:
        listed = ", ".join(map(str, known[:5]))
        raise InputError(
            f"the attribute has {len(known)} values ({listed}), and a gap is between two groups: "
            f"{'give rows of both' if len(known) < 2 else 'merge them into two'}"
        )
    members = [np.array([value == one for value in values]) for one in known]
    return list(map(str, known)), members


def _gap(names: Sequence[str], chosen: Sequence[NDArray[np.bool_]]) -> Gap | None:
    """The gap between two groups' positive predictions, bool (rows of the group,)."""
    if not all(map(len, chosen)):
        return None
    rates = [float(one.mean()) for one in chosen]
    lower, upper = sorted(range(2), key=lambda group: rates[group])
    intervals = [_wilson(rate, len(one)) for rate, one in zip(rates, chosen, strict=True)]
    value = rates[upper] - rates[lower]
    down = math.hypot(rates[upper] - intervals[upper][0], intervals[lower][1] - rates[lower])
    up = math.hypot(intervals[upper][1] - rates[upper], rates[lower] - intervals[lower][0])
    sizes = map(len, chosen)
    return Gap(
        value,
        value - down,
        value + up,
        dict(zip(names, rates, strict=True)),
        dict(zip(names, sizes, strict=True)),
    )


def _wilson(rate: float, rows: int) -> tuple[float, float]:
    """Ends of Wilson's interval of a rate."""
    square = _QUANTILE**2 / rows
    middle = rate + square / 2
    half = math.sqrt(square * (rate * (1 - rate) + square / 4))
    return (middle - half) / (1 + square), (middle + half) / (1 + square)


def _probabilities(
    influence: Influence, batches: Sequence[Batch], positive: int
) -> NDArray[np.float64]:
    """Probability of the positive class by the whole network, the mean over networks: (targets,)."""
    found = []
    with exclusive(*influence.modules):
        for model in influence.modules:
            with trial(model):
                moved = (batch.to(device_of(model)) for batch in batches)
                logits = torch.cat([logits_of(batch.call(model)).float().cpu() for batch in moved])
            if logits.dim() != 2 or not 0 <= positive < logits.shape[1]:
                raise InputError(
                    f"positive must be a class of the logits {tuple(logits.shape)}, got {positive!r}"
                )
            found.append(logits.double().softmax(dim=1)[:, positive])
    mean: NDArray[np.float64] = torch.stack(found).mean(dim=0).numpy()
    return mean


def _weights(
    probabilities: NDArray[np.float64],
    truth: NDArray[np.bool_],
    names: Sequence[str],
    members: Sequence[NDArray[np.bool_]],
    gap: str,
) -> NDArray[np.float64]:
    """Derivatives of the gap of mean probabilities by the targets' margins."""
    among = {
        "demographic_parity": [("", truth | ~truth)],
        "equal_opportunity": [("positive", truth)],
        "equalized_odds": [("positive", truth), ("other than positive", ~truth)],
    }[gap]
    found = []
    for kind, rows in among:
        sides = [rows & group for group in members]
        for name, side in zip(names, sides, strict=True):
            if not side.any():
                raise InputError(
                    f"no row of group {name!r} is labeled {kind}, and {gap} is between those rows"
                )
        difference = probabilities[sides[1]].mean() - probabilities[sides[0]].mean()
        signs = sides[1] / sides[1].sum() - sides[0] / sides[0].sum()
        found.append((abs(difference), np.sign(difference) * signs))
    value, signs = max(found, key=lambda one: one[0])
    if value <= _ROUNDING:
        raise InputError(f"{gap} is 0 already: no instance widens it")
    # A margin is minus log-odds, by which a probability p changes at the rate p (1 - p).
    weights: NDArray[np.float64] = -signs * probabilities * (1 - probabilities)
    return weights


def _labeled(batches: Iterable[Batch], label: int) -> Iterator[Batch]:
    """The batches with one label for all rows."""
    for batch in batches:
        labels: Tensor = torch.full((len(batch),), label, dtype=torch.int64)
        yield replace(batch, labels=labels)
