"""A model of noisy labels: the right class by out-of-sample predictions, the label by the right class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Chosen on digits and on sentences with planted noise (docs/fidelity.md), checked on other data.
_SHRUNK = 0.3
"""Rows of a class that say the mean error rate, as a share of its rows."""
_START = 0.1
_ITERATIONS = 80
_NEWTON = 3
_PENALTY = 1e-3
_RATES = (1e-4, 0.7)
_SCALES = (0.01, 60.0)


@dataclass(frozen=True)
class Noise:
    """What was fitted.

    Attributes:
        posterior: (rows, classes), probability of each right class.
        suspicion: (rows,), log-odds that the label is wrong.
        transition: (right classes, labels).
        likelihood: mean log-probability of a label.
    """

    posterior: Floats
    suspicion: Floats
    transition: NDArray[np.float32]
    likelihood: float


def fit(predictions: Floats, y: NDArray[np.int64]) -> Noise:
    """Fit the scale of the predictions, and the transition from right classes to labels.

    Args:
        predictions: (rows, classes), of every row without itself, on any scale.
        y: labels (rows,).
    """
    classes = predictions.shape[1]
    spread = float(predictions.std())
    scaled, hot = predictions / (spread or 1.0), np.eye(classes)[y]
    scale = 1.0
    transition = np.full((classes, classes), _START / (classes - 1))
    np.fill_diagonal(transition, 1 - _START)
    for _ in range(_ITERATIONS):
        posterior = np.exp(_joint(scaled, scale, transition, y))
        posterior /= posterior.sum(axis=1, keepdims=True)
        transition = _transition(posterior.T @ hot, len(y))
        for _ in range(_NEWTON):
            scale = _better(scaled, scale, posterior)
    joint = _joint(scaled, scale, transition, y)
    every = np.arange(len(y))
    own, others = joint[every, y], joint.copy()
    others[every, y] = -np.inf
    most = others.max(axis=1)
    others_sum = most + np.log(np.exp(others - most[:, None]).sum(axis=1))
    label = np.logaddexp(own, others_sum)
    posterior = np.exp(joint - label[:, None])
    return Noise(posterior, others_sum - own, transition.astype(np.float32), float(label.mean()))


def _joint(scaled: Floats, scale: float, transition: Floats, y: NDArray[np.int64]) -> Floats:
    """Log-probability of each right class together with the label: (rows, classes)."""
    joint: Floats = _log_softmax(scale * scaled) + np.log(transition[:, y].T)
    return joint


def _log_softmax(logits: Floats) -> Floats:
    shifted: Floats = logits - logits.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _transition(counts: Floats, rows: int) -> Floats:
    """The transition that made the counts (right classes, labels), with error rates drawn to their mean."""
    classes = len(counts)
    wrong = counts.sum(axis=1) - np.diag(counts)
    mean = (wrong.sum() + 1) / (rows + 4)
    prior = _SHRUNK * rows / classes + 1
    rates = ((wrong + prior * mean) / (counts.sum(axis=1) + prior)).clip(*_RATES)
    others = (counts + 1) * (1 - np.eye(classes))
    others /= others.sum(axis=1, keepdims=True)
    # No other label may be more frequent than the right one: predictions that are against the labels, as
    # those of hidden networks that the others' units made up for, would explain them best turned round.
    rates = np.minimum(rates, 1 / (1 + others.max(axis=1)))
    found: Floats = others * rates[:, None] + np.diag(1 - rates)
    return found


def _better(scaled: Floats, scale: float, posterior: Floats) -> float:
    """One step of Newton's method to the scale under which predictions say the posterior best."""
    said = np.exp(_log_softmax(scale * scaled))
    mean = (said * scaled).sum(axis=1)
    slope = ((posterior * scaled).sum(axis=1) - mean).mean() - _PENALTY * scale
    curve = (said * (scaled - mean[:, None]) ** 2).sum(axis=1).mean() + _PENALTY
    return float(np.clip(scale + slope / curve, *_SCALES))
