"""Names, ids and weights of table rows, for the scikit-learn classifier."""

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
    """Return the names of a table's rows: its index, or row numbers."""
    return np.asarray(table.index) if hasattr(table, "iloc") else np.arange(rows)


def check_aligned(table: Any, **columns: Any) -> None:
    """Check that columns, which are paired with the rows of a table by place, have the same index.

    Warns:
        UserWarning: a column has the labels of the table in another order, and the rows of one of them
            are numbered from 0, so that labels may mean nothing; or rows of the table share a label.
    """
    if not hasattr(table, "iloc"):
        return
    for name, column in columns.items():
        if not hasattr(column, "iloc") or len(column) != len(table):
            continue
        if column.index.equals(table.index) or set(column.index) != set(table.index):
            continue
        found = f"the index of {name} has the labels of X in another order, and rows are paired by place"
        if not (_numbered(table) or _numbered(column)):
            raise InputError(
                f"{found}: give {name}.loc[X.index], or {name}.to_numpy() if the places are right"
            )
        warnings.warn(f"{found}; to pair them by label, give {name}.loc[X.index]", stacklevel=3)
    if not table.index.is_unique:
        first = table.index[table.index.duplicated()][:1].tolist()[0]
        warnings.warn(
            f"rows of X share labels in its index, such as {first!r}: influence is listed in the order of "
            f"the rows, and .loc cannot tell them apart: give X.reset_index(drop=True)",
            stacklevel=3,
        )


def _numbered(column: Any) -> bool:
    """Tell whether an index numbers its rows from 0, as pandas does by default."""
    return bool((np.asarray(column.index) == np.arange(len(column))).all())


def identified(table: Any, ids: Any, rows: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Return ids and names of the training rows."""
    if ids is None:
        return np.arange(rows), index_of(table, rows)
    # numpy would convert numbers beside strings to strings.
    given = column_or_1d(np.asarray(ids, dtype=object) if isinstance(ids, list | tuple) else ids)
    if given.dtype == object and all(isinstance(one, int | np.integer) for one in given):
        given = np.asarray(given.tolist())
    if given.dtype.kind in "OUT":
        return string_ids(given.tolist()).numpy(), given
    if given.dtype.kind == "f":
        raise TypeError(
            f"ids must be integers or strings, got {given.dtype}; give weights of rows as "
            f"fit(X, y, sample_weight=...)"
        )
    return check_training_ids(torch.as_tensor(given)).numpy(), given


def weights_of_rows(
    inputs: Any, labels: NDArray[np.int64], classes: NDArray[Any], given: Any, by_class: Any
) -> NDArray[np.float64] | None:
    """Return weights of the training rows, scaled to mean 1 over those above 0; ``None`` without weights.

    Args:
        labels: (rows,), positions in ``classes``.
        given: ``sample_weight`` of scikit-learn.
        by_class: ``class_weight`` of scikit-learn, multiplied with it.
    """
    if given is None and by_class is None:
        return None
    weights = np.array(_check_sample_weight(given, inputs, dtype=np.float64))
    _check_weights(weights, "sample_weight")
    if isinstance(by_class, str) and by_class == "balanced":
        # Balances the weighted rows; a class may have no weight.
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
