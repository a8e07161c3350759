"""Ridge regression of labels on features, and the prediction of every row without itself.

The prediction without row i follows from the one with it: ``(f_i - h_i y_i) / (1 - h_i)``, where h is the
leverage (Allen 1974, PRESS). Rows are read block by block, so memory is bounded by the features and by
squares of their width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Block = Callable[[slice], Floats]

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Candidates, in units of the mean square of a row."""
_FOURIER = 1000
_SAMPLE = 500
_ROWS = 5000
_CERTAIN = 1e-9
_LEAST = 1e-200


def leave_one_out(x: Floats, y: NDArray[np.int64], classes: int, seed: int) -> Floats:
    """Predictions of one-hot labels less 1 / classes, (rows, classes), each without its own row.

    Args:
        x: features (rows, width).
        y: labels (rows,).
        classes: number of classes.
        seed: of the random features.
    """
    x = x / (np.abs(x).max() or 1.0)
    x = x - x.mean(axis=0)
    hot = np.eye(classes)[y] - 1 / classes
    fitted = [_fit(blocks, len(x), hot) for blocks in (_linear(x), _fourier(x, seed))]
    return min(fitted, key=lambda one: one[0])[1]


def shares_of_others(y: NDArray[np.int64], classes: int) -> Floats:
    """Shares of the classes among the other rows, less 1 / classes: (rows, classes)."""
    hot = np.eye(classes)[y]
    found: Floats = (hot.sum(axis=0) - hot) / (len(y) - 1) - 1 / classes
    return found


def _linear(x: Floats) -> Block:
    if x.shape[1] > len(x):  # the same inner products in fewer dimensions
        values, vectors = np.linalg.eigh(x @ x.T)
        x = vectors * np.sqrt(values.clip(0))
    return lambda rows: x[rows]


def _fourier(x: Floats, seed: int) -> Block:
    """Random features of a Gaussian kernel whose width is the median distance of rows."""
    generator = np.random.default_rng(seed)
    sample = x[generator.permutation(len(x))[:_SAMPLE]]
    squares = (sample**2).sum(axis=1)
    distances = (squares[:, None] + squares - 2 * sample @ sample.T)[
        np.triu_indices(len(sample), 1)
    ]
    width = max(float(np.median(distances)), _LEAST)
    directions = generator.standard_normal((x.shape[1], _FOURIER // 2)) * np.sqrt(2 / width)

    def block(rows: slice) -> Floats:
        angles = x[rows] @ directions
        return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)

    mean = sum(block(rows).sum(axis=0) for rows in _blocks(len(x))) / len(x)
    return partial(_centered, block, mean)


def _centered(block: Block, mean: Floats, rows: slice) -> Floats:
    return block(rows) - mean


def _blocks(count: int) -> list[slice]:
    return [slice(at, min(at + _ROWS, count)) for at in range(0, count, _ROWS)]


def _fit(block: Block, count: int, hot: Floats) -> tuple[float, Floats]:
    """The best ridge's mean squared error of left-out labels, and its predictions."""
    parts = _blocks(count)
    square: Floats | float = 0.0
    moments: Floats | float = 0.0
    for rows in parts:
        columns = block(rows)
        square, moments = square + columns.T @ columns, moments + columns.T @ hot[rows]
    values, vectors = np.linalg.eigh(square)
    values = values.clip(0)
    ridges = np.array(RIDGES) * max(float(values.sum()) / count, _LEAST)
    mean = hot.mean(axis=0)
    weights = vectors.T @ moments

    def predicted(rows: slice, turned: Floats, one: float) -> Floats:
        found = mean + turned @ (weights / (values + one)[:, None])
        leverage = (1 / count + turned**2 @ (1 / (values + one)))[:, None].clip(0, 1 - _CERTAIN)
        without: Floats = (found - leverage * hot[rows]) / (1 - leverage)
        # No class has an intercept: a class that grew by wrong labels would pull predictions to itself. It
        # goes only here, and as the others' mean: on columns centered with the row itself, the row is minus
        # the sum of the others, so that classes of equal size would tell its label.
        without -= (count * mean - hot[rows]) / (count - 1)
        return without

    errors = np.zeros(len(ridges))
    for rows in parts:
        turned = block(rows) @ vectors
        errors += [((predicted(rows, turned, one) - hot[rows]) ** 2).sum() for one in ridges]
    best = int(np.argmin(errors))
    found = [predicted(rows, block(rows) @ vectors, ridges[best]) for rows in parts]
    return float(errors[best]), np.concatenate(found)
