"""Rows of tables for the scikit-learn classifier: their names, ids and weights."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from turnover.errors import InputError, needing
from turnover.ids import check_training_ids, string_ids

with needing("the classifier", "turnover[sklearn]"):
    from sklearn.utils.class_weight import compute_class_weight
    from sklearn.utils.validation import _check_sample_weight, column_or_1d


def index_of(table: Any, rows: int) -> NDArray[Any]:
    """What the rows of a table are called: its index, or row numbers."""
    return np.asarray(table.index) if hasattr(table, "iloc") else np.arange(rows)


def check_aligned(table: Any, **columns: Any) -> None:
    """Compare the index of a table with that of what belongs to its rows, which are paired by place.

    Args:
        columns: name to a column, or ``None``.

    Warns:
        UserWarning: a column has the labels of the table in another order, and one of both numbers its
            rows from 0, so that the labels may mean nothing; or rows of the table share a label.

    Raises:
        InputError: a column has the labels of the table in another order.
    """
    if not hasattr(table, "iloc"):
        return
    for name, column in columns.items():
        if (
            not hasattr(column, "iloc")
            or len(column) != len(table)
            or column.index.equals(table.index)
        ):
            continue
        if set(column.index) != set(table.index):
            continue
        said = f"the index of {name} has the labels of X in another order, and rows are paired by place"
        if not (_numbered(table) or _numbered(column)):
            raise InputError(
                f"{said}: give {name}.loc[X.index], or {name}.to_numpy() if the places are right"
            )
        warnings.warn(f"{said}; if their labels are meant, give {name}.loc[X.index]", stacklevel=3)
    if not table.index.is_unique:
        first = table.index[table.index.duplicated()][:1].tolist()[0]
        warnings.warn(
            f"rows of X share labels in its index, such as {first!r}: influence is listed in the order of "
            f"the rows, and .loc cannot tell them apart; X.reset_index(drop=True) can",
            stacklevel=3,
        )


def _numbered(column: Any) -> bool:
    """Whether an index numbers its rows from 0, as pandas does where none is given."""
    return bool((np.asarray(column.index) == np.arange(len(column))).all())


def identified(table: Any, ids: Any, rows: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Ids of the training rows, and what they are called.

    Raises:
        InputError: negative ids, or not one for each row.
        TypeError: ids that are neither all integers nor all strings.
    """
    if ids is None:
        return np.arange(rows), index_of(table, rows)
    # numpy makes strings of numbers beside strings.
    held = np.asarray(ids, dtype=object) if isinstance(ids, list | tuple) else ids
    given = column_or_1d(held)
    if given.dtype == object and all(isinstance(one, int | np.integer) for one in given):
        given = np.asarray(given.tolist())
    if given.dtype.kind in "OUT":
        return string_ids(given.tolist()).numpy(), given
    if given.dtype.kind == "f":
        raise TypeError(
            f"ids must be integers or strings, got {given.dtype}; weights of rows are given as "
            f"fit(X, y, sample_weight=...)"
        )
    return check_training_ids(torch.as_tensor(given)).numpy(), given


def weights_of_rows(
    inputs: Any, labels: NDArray[np.int64], classes: NDArray[Any], given: Any, by_class: Any
) -> NDArray[np.float64] | None:
    """Weights of the training rows, whose mean over those above 0 is 1; ``None`` without weights.

    Args:
        inputs: table with one row for each.
        labels: (rows,), positions in ``classes``.
        classes: the labels themselves.
        given: ``sample_weight`` of scikit-learn.
        by_class: ``class_weight`` of scikit-learn, which multiplies them.

    Raises:
        InputError: negative weights, or none above 0.
        ValueError: what scikit-learn refuses: missing values, other shapes, unknown classes.
    """
    if given is None and by_class is None:
        return None
    weights = np.array(_check_sample_weight(given, inputs, dtype=np.float64))
    _check_weights(weights, "sample_weight")
    if isinstance(by_class, str) and by_class == "balanced":
        # Of the weighted rows; a class without any weight has nothing to balance.
        sums = np.bincount(labels, weights, len(classes))
        weights *= np.divide(1.0, sums, out=np.zeros_like(sums), where=sums > 0)[labels]
    elif by_class is not None:
        factors = compute_class_weight(by_class, classes=classes, y=classes[labels])
        _check_weights(np.asarray(factors, dtype=np.float64), "class_weight")
        weights *= factors[labels]
    _check_weights(weights, "the product of class_weight and sample_weight")
    if not (weights > 0).any():
        raise InputError(
            "all sample weights are 0, so no row would be learned: give rows a weight > 0"
        )
    weights /= weights.max()
    found: NDArray[np.float64] = weights / weights[weights > 0].mean()
    return found


def _check_weights(weights: NDArray[np.float64], name: str) -> None:
    wrong = weights[~(np.isfinite(weights) & (weights >= 0))]
    if len(wrong):
        raise InputError(f"{name} must be finite and >= 0, got {wrong[0]:g}")
