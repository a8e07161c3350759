"""Wrong labels: how probable each is, and which class is right instead, from features alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover.errors import InputError, check_whole
from turnover.labels import noise, ridge

_FEWEST = 10
_BETTER = 0.01
"""Nats of a label from which on shares of classes explain more than noise with a direction could."""

Features = NDArray[Any] | Tensor
Classes = NDArray[Any] | Tensor


@dataclass(frozen=True)
class LabelErrors:
    """How doubtful the label of every row is.

    Attributes:
        posterior: float32 (rows, classes), the probability that a class is the right one, given features
            and label; rows sum to 1.
        labels: int64 (rows,), the labels that were judged.
        suspicion: float64 (rows,), the log-odds that the label is wrong, in nats; the order of
            :meth:`order`.
        transition: float32 (classes, classes), estimated shares of the labels (columns) among the rows of
            each right class (rows).
        likelihood: mean log-probability, in nats, that the model gives the labels: of two sets of
            predictions the one with more explains them better.
    """

    posterior: NDArray[np.float32]
    labels: NDArray[np.int64]
    suspicion: NDArray[np.float64]
    transition: NDArray[np.float32]
    likelihood: float

    @property
    def probability(self) -> NDArray[np.float64]:
        """The probability that a label is wrong: float64 (rows,)."""
        found: NDArray[np.float64] = 1 / (1 + np.exp(-self.suspicion))
        return found

    @property
    def expected(self) -> float:
        """The expected number of wrong labels."""
        return float(self.probability.sum())

    @property
    def likely(self) -> int:
        """The number of rows whose labels are more probably wrong than right."""
        return int((self.suspicion > 0).sum())

    @property
    def suggested(self) -> NDArray[np.int64]:
        """The most probable class other than the label: int64 (rows,)."""
        others = self.posterior.copy()
        others[np.arange(len(others)), self.labels] = -1
        return np.asarray(others.argmax(axis=1))

    def order(self) -> NDArray[np.int64]:
        """Rows, the most doubtful label first: int64 (rows,)."""
        return np.argsort(-self.suspicion, kind="stable")


def label_errors(
    features: Features, labels: Classes, *, classes: int | None = None, seed: int = 0
) -> LabelErrors:
    """Estimate which labels are wrong, from features that no label has touched.

    Every row is predicted without itself: by ridge regression of the labels on the features, or on random
    Fourier features of them (Rahimi and Recht 2007), whose leave-one-out predictions have a closed form.
    Which of the two, and how much ridge, is what predicts left-out labels best. The shares of the classes are
    added where they explain the labels clearly better: elsewhere a class that grew by wrong labels would
    vouch for them. A model of the noise then
    explains the given labels by these predictions: a right class by their softmax, the label given the
    right class by a matrix of transition, both fitted by expectation and maximization (as Dawid and Skene
    1979 do for annotators). No setting depends on a right label.

    The features should be those of an encoder that was *not* trained on these labels: pretrained, or the
    standardized columns of a table. Fine-tuned ones know the labels, and hide wrong ones.

    Args:
        features: float (rows, width), finite.
        labels: int (rows,), in [0, classes).
        classes: number of classes; ``None``: the largest label + 1. One without labels is not suggested.
        seed: of the random features.

    Returns:
        :class:`LabelErrors`, rows as given.

    Raises:
        InputError: other shapes or types, values that are not finite, labels that are no classes, fewer
            than ten rows, or rows of one class alone.

    Example:
        >>> found = label_errors(embeddings, labels)
        >>> f"about {found.expected:.0f} labels are wrong"
        >>> found.order()[:100], found.suggested[found.order()[:100]]
    """
    check_whole("seed", seed, 0)
    x, y, count, used = _checked(features, labels, classes)
    of = np.searchsorted(used, y)
    left_out = ridge.leave_one_out(x, of, len(used), seed)
    plain = _explained(left_out, y, count, used)
    shared = _explained(left_out + ridge.shares_of_others(of, len(used)), y, count, used)
    return shared if shared.likelihood > plain.likelihood + _BETTER else plain


def label_errors_of(predictions: Features, labels: Classes) -> LabelErrors:
    """Estimate which labels are wrong, from out-of-sample predictions that you have.

    Args:
        predictions: float (rows, classes), logits or logarithms of probabilities of every row by a
            model that was not trained on it, such as those of :func:`turnover.hidden_predictions` or of
            five folds; finite.
        labels: int (rows,), in [0, classes).

    Returns:
        :class:`LabelErrors`, rows as given.

    Raises:
        InputError: as in :func:`label_errors`.
    """
    given = _array("predictions", predictions)
    x, y, count, used = _checked(given, labels, given.shape[1] if given.ndim == 2 else None)
    x = x[:, used]
    return _explained(x - x.mean(axis=1, keepdims=True), y, count, used)


def _explained(
    predictions: NDArray[np.float64], y: NDArray[np.int64], count: int, used: NDArray[np.int64]
) -> LabelErrors:
    """Explain labels of the used classes; no row is of another one."""
    found = noise.fit(predictions, np.searchsorted(used, y))
    posterior = np.zeros((len(y), count), np.float32)
    posterior[:, used] = found.posterior
    transition = np.eye(count, dtype=np.float32)
    transition[np.ix_(used, used)] = found.transition
    return LabelErrors(posterior, y, found.suspicion, transition, found.likelihood)


def _checked(
    features: Features, labels: Classes, classes: int | None
) -> tuple[NDArray[np.float64], NDArray[np.int64], int, NDArray[np.int64]]:
    x, y = _array("features", features), _array("labels", labels)
    whole = np.issubdtype(y.dtype, np.integer)
    if x.ndim != 2 or not x.shape[1] or y.shape != x.shape[:1] or not whole:
        raise InputError(
            f"labels of rows need features (rows, width) and integer labels (rows,), got {x.shape} and "
            f"{y.dtype} {y.shape}"
        )
    if len(y) < _FEWEST:
        raise InputError(f"{len(y)} rows are too few to find wrong labels: {_FEWEST} at least")
    x, y = x.astype(np.float64), y.astype(np.int64)
    if not np.isfinite(x).all():
        row = int(np.flatnonzero(~np.isfinite(x).all(axis=1))[0])
        raise InputError(f"the features of row {row} are not finite")
    if classes is not None:
        check_whole("classes", classes, 2)
    count = int(y.max()) + 1 if classes is None else int(classes)
    if not 0 <= y.min() <= y.max() < count:
        raise InputError(f"labels must lie in [0, {count}), got {y.min()} to {y.max()}")
    used = np.unique(y)
    if len(used) == 1:
        raise InputError(f"all rows have label {y.min()}: no label can be told from another")
    return x, y, count, used


def _array(name: str, given: Any) -> NDArray[Any]:
    if isinstance(given, Tensor) and given.layout == torch.strided:
        given = given.detach().cpu()
        given = (given.double() if given.dtype == torch.bfloat16 else given).numpy()
    try:
        found = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} must be a dense array of numbers: {error}") from error
    if found.dtype.kind not in "biuf":
        fix = "encode other columns, and call .toarray() on sparse ones"
        if name == "labels":
            fix = "number the classes from 0, as by np.unique(labels, return_inverse=True)[1]"
        raise InputError(f"{name} must be a dense array of numbers, got {found.dtype}: {fix}")
    return found
