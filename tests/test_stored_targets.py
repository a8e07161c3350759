"""Stored results whose targets come in other batch sizes, and objectives of unusual size."""

import numpy as np
import pytest
import torch
from torch import nn

import tiny
import turnover
from turnover import Batch, Influence, InputError, MaskSpec, objectives

IDS = torch.arange(40) * 7919
METHODS = ("linear", "exact", "rerank")
ROWS = 25


class Shifted(nn.Module):
    """An MLP with an input that all rows share."""

    def __init__(self):
        super().__init__()
        self.body = tiny.randomise(tiny.mlp(12))

    def forward(self, x, shift):
        return self.body(x + shift.mean(0))


def targets(length, size, *, shift=1.0):
    shared = torch.linspace(-shift, 2.0, length * 6).reshape(length, 6)
    x, labels = tiny.features(ROWS), torch.arange(ROWS) % 3
    starts = range(0, ROWS, size)
    return [Batch({"x": x[i : i + size], "shift": shared}, labels[i : i + size]) for i in starts]


def score(given, out=None, method="linear", objective=objectives.margin, net=None):
    net = net or turnover.attach(Shifted().eval(), ["body.1", "body.3"], MaskSpec(seed=0))
    method = tiny.method(method, candidates=5)
    estimator = Influence(net, objective, method, ghosts=30)
    extra = {} if out is None else {"out": out}
    result = estimator.estimate(given, IDS, **extra)
    return result if out is None else result.load()


@pytest.mark.parametrize("method", ["linear", "exact"])
@pytest.mark.parametrize(
    ("length", "sizes"), [(1, (8, 5)), (4, (4, 16)), (8, (8, 24)), (16, (3, 25))]
)
def test_a_shared_input_as_long_as_some_batches_is_the_same_in_all(length, sizes, method, tmp_path):
    stored = score(targets(length, sizes[0]), tmp_path / "r", method)
    tiny.assert_same(score(targets(length, sizes[1]), tmp_path / "r", method), stored)
    anew = score(targets(length, sizes[1]), method=method)
    np.testing.assert_allclose(anew.scores, stored.scores, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="other targets: target 0"):
        score(targets(length, sizes[1], shift=1.5), tmp_path / "r", method)


def plain():
    return turnover.attach(tiny.randomise(tiny.mlp(12)).eval(), "mlp", MaskSpec(seed=0))


def rows(size=8):
    batch = Batch(tiny.features(24), torch.arange(24) % 3)
    return [batch.rows(start, start + size) for start in range(0, 24, size)]


def times(factor):
    def cost(outputs, batch):
        return factor * objectives.margin(outputs, batch)

    return cost


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [1e-9, 1e-20])
def test_small_numbers_of_another_sign_or_factor_are_another_objective(factor, method, tmp_path):
    """As of an objective that is the probability of a long text."""
    stored = score(rows(), tmp_path / "r", method, times(factor), plain())
    again = score(rows(3), tmp_path / "r", method, times(factor), plain())
    np.testing.assert_array_equal(again.scores, stored.scores)
    for other in (-factor, 2 * factor):
        with pytest.raises(InputError, match="another objective"):
            score(rows(), tmp_path / "r", method, times(other), plain())


def masked_class(outputs, batch):
    """Cross entropy where class 2 is not to be predicted: infinite for its rows, of derivative 0."""
    logits = outputs.masked_fill(torch.arange(3) == 2, -torch.inf)
    return torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")


def constant(value):
    def cost(outputs, batch):
        return torch.where(batch.labels == 2, value, objectives.margin(outputs, batch))

    return cost


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("objective", [masked_class, constant(torch.inf), constant(-torch.inf)])
def test_infinite_targets_are_named_though_their_derivative_is_0(objective, method):
    method = tiny.method(method, candidates=5)
    estimator = Influence(plain(), objective, method, ghosts=30)
    for estimate in (estimator.estimate, estimator.aggregate):
        with pytest.raises(InputError, match=r"NaN or infinite for rows \["):
            estimate(rows(), IDS)
    batch = Batch(tiny.features(6), torch.arange(6) % 3, torch.arange(6))
    with pytest.raises(InputError, match=r"NaN or infinite for rows \["):
        estimator.self_influence([batch])
