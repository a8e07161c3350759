"""Gram on layers that do not run for every row, or not in every batch, or not always alike."""

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from turnover import Batch, Gram, Influence, objectives

ROWS = 24
pytestmark = pytest.mark.filterwarnings("ignore:turnover. gram knows no rule")


class Routed(nn.Module):
    """An expert for rows whose first feature is positive."""

    def __init__(self):
        super().__init__()
        self.first, self.expert, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        chosen = (x[:, 0] > 0).nonzero().flatten()
        if len(chosen):
            hidden = hidden.index_add(0, chosen, self.expert(hidden[chosen]))
        return self.last(hidden)


class Reversed(Routed):
    """The expert is given its rows from the last one on."""

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        chosen = (x[:, 0] > 0).nonzero().flatten().flip(0)
        if len(chosen):
            hidden = hidden.index_add(0, chosen, self.expert(hidden[chosen]))
        return self.last(hidden)


class Again(Routed):
    """A layer that runs a second time if anything in the batch is positive, for those rows alone."""

    def forward(self, x):
        hidden = torch.tanh(self.expert(torch.tanh(self.first(x))))
        if bool((x[:, 0] > 0).any()):
            hidden = torch.where(x[:, :1] > 0, torch.tanh(self.expert(hidden)), hidden)
        return self.last(hidden)


class ByToken(Routed):
    """An expert for single tokens: as many as there are rows, by chance, but not one of each."""

    def forward(self, x):
        tokens = torch.stack([x, x.flip(1)], dim=1)
        hidden = torch.tanh(self.first(tokens)).flatten(0, 1)
        chosen = (tokens[..., 0] > 0).flatten().nonzero().flatten()
        if len(chosen):
            hidden = hidden.index_add(0, chosen, self.expert(hidden[chosen]))
        return self.last(hidden.view(len(x), 2, -1).sum(dim=1))


MODELS = [Routed, Reversed, Again, ByToken]


def features(first, seed=0):
    x = tiny.features(len(first), 4, seed=seed)
    x[:, 0] = torch.where(torch.tensor(first), x[:, 0].abs() + 0.1, -x[:, 0].abs() - 0.1)
    return x


def by_hand(model, one, other):
    def gradients(batch):
        rows = []
        for i in range(len(batch)):
            row = batch.rows(i, i + 1)
            cost = objectives.margin(row.call(model), row).sum()
            found = torch.autograd.grad(
                cost, list(model.parameters()), allow_unused=True, materialize_grads=True
            )
            rows.append(torch.cat([each.flatten() for each in found]))
        return torch.stack(rows).double()

    return (gradients(one) @ gradients(other).T).numpy()


PATTERNS = {
    "none at first": [*[False] * 8, *[True, False] * 8],
    "all at first": [*[True] * 8, *[True, False] * 4, *[False] * 8],
    "some at first": [*[True, False] * 4, *[False] * 8, *[True] * 8],
    "a single one": [*[False] * 8, True, *[False] * 7, *[True] * 8],
    "never": [False] * ROWS,
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("make", MODELS)
def test_a_kernel_of_routed_layers_is_that_of_all_gradients(make, pattern):
    model = tiny.randomise(make()).eval()
    train = Batch(features(PATTERNS[pattern]), tiny.labels(ROWS))
    targets = Batch(features([True, False, True, True, False], seed=4), tiny.labels(5))
    influence = Influence(model, method=Gram(1.0, residual=False, directions=0))
    influence.fit([train.rows(i, i + 8) for i in range(0, ROWS, 8)])
    k, cross = by_hand(model, train, train), by_hand(model, targets, train)
    ridge = np.diag(k).mean() * np.eye(ROWS)
    expected = cross @ np.linalg.inv(k + ridge)
    for parts in ([(0, 5)], [(1, 2), (0, 5)]):
        scores = influence.estimate([targets.rows(*part) for part in parts]).scores
        np.testing.assert_allclose(scores[-5:], expected, rtol=1e-3, atol=1e-4)


def test_a_layer_that_first_runs_for_targets_says_that_it_has_no_rule():
    model = tiny.randomise(Routed()).eval()
    train = Batch(features([False] * ROWS), tiny.labels(ROWS))
    influence = Influence(model, method="gram").fit([train])
    with pytest.warns(UserWarning, match="no rule for 2 parameters .expert.weight, expert.bias."):
        influence.estimate([Batch(features([True, False, True]), tiny.labels(3))])
