"""Gram: the directions along which training instances hold the network, and solves in them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import linalg
from torch import nn

import tiny
import turnover
from test_gram import cut
from turnover import Batch, Gram, Influence, objectives
from turnover.influence.gram.directions import directions

CLASSES = 5


def problem(train=40, targets=6, classes=CLASSES):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, classes))
    x = tiny.features(train + targets)
    y = (x[:, 0] * 2 + x[:, 1]).argsort().argsort() % classes
    batch = Batch(x[:train], y[:train], torch.arange(100, 100 + train))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs), batch.labels).backward()
        optimizer.step()
    return model, batch, Batch(x[train:], y[train:])


def jacobians(model, batch):
    """Gradients of all logits: (rows, classes, parameters)."""
    rows = []
    for i in range(len(batch)):
        logits = model(batch.inputs[i : i + 1])[0]
        found = [
            torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in logits
        ]
        rows.append(torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in found]))
    return torch.stack(rows).double().numpy()


def margins(model, batch):
    """Gradients of the margin by the logits: (rows, classes)."""
    logits = model(batch.inputs).detach().requires_grad_()
    values = objectives.margin(logits, batch)
    return torch.autograd.grad(values.sum(), logits)[0].double().numpy()


@given(st.integers(2, 7), st.integers(1, 7), st.integers(0, 1000), st.floats(0.1, 6.0))
def test_directions_make_the_margin_and_the_root_of_the_curvature(classes, count, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(4, classes, generator=generator)
    labels = torch.randint(classes, (4,), generator=generator)
    found, weights = directions(logits, labels, count)
    kept = min(count, classes - 1)
    assert found.shape == (4, classes, kept) and weights.shape == (4, kept)
    leaf = logits.clone().requires_grad_()
    margin = objectives.margin(leaf, Batch(leaf, labels)).sum()
    wanted = torch.autograd.grad(margin, leaf)[0]
    made = (found @ weights[:, :, None])[:, :, 0]
    torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-4)
    p = logits.double().softmax(dim=1)
    curvature = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).numpy()
    for row, values in zip(curvature, found.double().numpy(), strict=True):
        root = np.real(linalg.sqrtm(row + 1e-14 * np.eye(classes)))
        basis = np.linalg.qr(values)[0]
        inside = basis @ basis.T @ root @ basis @ basis.T
        np.testing.assert_allclose(values @ values.T, inside, atol=2e-4)
        if kept == classes - 1:
            np.testing.assert_allclose(values @ values.T, root, atol=2e-4)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_scores_are_those_of_a_solve_along_the_directions(count):
    model, train, targets = problem()
    influence = Influence(model, method=Gram(0.4, directions=count))
    result = influence.fit(cut(train, 7)).estimate(cut(targets, 2))
    own, others = jacobians(model, train), jacobians(model, targets)
    found = directions(model(train.inputs), train.labels, count)
    values, weights = (one.detach().double().numpy() for one in found)
    rows = np.einsum("icp,icd->idp", own, values)
    flat = rows.reshape(-1, rows.shape[2])
    pulled = np.einsum("tcp,tc->tp", others, margins(model, targets))
    k = flat @ flat.T
    ridge = 0.4 * np.trace(k) / len(train)
    inverse = np.linalg.inv(k + ridge * np.eye(len(k)))
    solved = (pulled @ flat.T @ inverse).reshape(len(targets), *weights.shape)
    loss = objectives.cross_entropy(model(train.inputs), train).detach().double().numpy()
    wrong = 1 - np.exp(-loss)
    expected = (solved * weights).sum(axis=2) * wrong**0.5
    scale = np.abs(expected).max()
    np.testing.assert_allclose(result.scores, expected, atol=1e-4 * scale)
    mean = influence.aggregate(cut(targets, 4))
    np.testing.assert_allclose(mean.scores, expected.mean(axis=0), atol=1e-4 * scale)
    hat = (k @ inverse).reshape(len(train), weights.shape[1], len(train), weights.shape[1])
    leverage = np.einsum("nd,ndne,ne->n", weights, hat, weights) * wrong**0.5
    itself = influence.self_influence()
    np.testing.assert_allclose(itself.scores, leverage, rtol=1e-3, atol=1e-4)


def test_all_directions_are_the_generalised_gauss_newton_matrix_of_the_rooted_curvature():
    """Nothing is lost by the subspace once it is the whole space: the solve over parameters agrees."""
    model, train, targets = problem()
    influence = Influence(model, method=Gram(directions=CLASSES - 1, residual=0))
    scores = influence.fit([train]).estimate([targets]).scores
    own, others = jacobians(model, train), jacobians(model, targets)
    p = model(train.inputs).detach().double().softmax(dim=1)
    curvature = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).numpy()
    roots = np.stack([np.real(linalg.sqrtm(one + 1e-14 * np.eye(CLASSES))) for one in curvature])
    matrix = np.einsum("icp,icd,idq->pq", own, roots, own)
    ridge = np.trace(matrix) / len(train)
    pulled = np.einsum("tcp,tc->tp", others, margins(model, targets))
    steps = np.einsum("icp,ic->ip", own, margins(model, train))
    expected = pulled @ np.linalg.solve(matrix + ridge * np.eye(len(matrix)), steps.T)
    np.testing.assert_allclose(scores, expected, atol=2e-4 * np.abs(expected).max())


def test_the_loss_of_a_target_ranks_as_its_margin_does():
    model, train, targets = problem()
    margin, loss = (
        Influence(model, objective, "gram").fit([train])
        for objective in (objectives.margin, objectives.cross_entropy)
    )
    one, other = margin.estimate([targets]).scores, loss.estimate([targets]).scores
    cost = objectives.cross_entropy(model(targets.inputs), targets).detach().numpy()
    scaled = one * (1 - np.exp(-cost))[:, None]
    np.testing.assert_allclose(other, scaled, atol=1e-5 * np.abs(scaled).max())
    cost = objectives.cross_entropy(model(train.inputs), train).detach().numpy()
    own = margin.self_influence().scores * (1 - np.exp(-cost))
    np.testing.assert_allclose(loss.self_influence().scores, own, rtol=1e-4, atol=1e-6)


def test_two_classes_have_one_direction():
    model, train, targets = problem(classes=2)
    one, two = (
        Influence(model, method=Gram(directions=count)).fit([train]).estimate([targets])
        for count in (1, 2)
    )
    tiny.assert_same(one, two)


def test_a_part_without_a_rule_has_directions_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, CLASSES)
            self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 8))

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)) * self.gain)

    torch.manual_seed(0)
    model = Scaled()
    _, train, targets = problem()
    with pytest.warns(UserWarning, match="gain"):
        scores = Influence(model, method="gram").fit([train]).estimate([targets]).scores
    found = directions(model(train.inputs), train.labels, 2)
    values, weights = (one.detach().double().numpy() for one in found)
    flat = np.einsum("icp,icd->idp", jacobians(model, train), values).reshape(2 * len(train), -1)
    pulled = np.einsum("tcp,tc->tp", jacobians(model, targets), margins(model, targets))
    k = flat @ flat.T
    inverse = np.linalg.inv(k + np.trace(k) / len(train) * np.eye(len(k)))
    solved = (pulled @ flat.T @ inverse).reshape(len(targets), -1, 2)
    loss = objectives.cross_entropy(model(train.inputs), train).detach().double().numpy()
    expected = (solved * weights).sum(axis=2) * (1 - np.exp(-loss)) ** 0.5
    np.testing.assert_allclose(scores, expected, atol=1e-4 * np.abs(expected).max())


def test_mask_features_have_directions_too():
    torch.manual_seed(0)
    network = turnover.attach(tiny.mlp(width=32).eval(), "mlp")
    train = Batch(tiny.features(30), tiny.labels(30), torch.arange(30))
    plain, directed = (
        Influence(network, method=Gram(features="masks", directions=count))
        .fit(cut(train, size))
        .estimate([train])
        .scores
        for count, size in ((0, 30), (2, 7))
    )
    again = Influence(network, method=Gram(features="masks")).fit([train]).estimate([train])
    np.testing.assert_allclose(again.scores, directed, atol=1e-5 * np.abs(directed).max())
    assert np.abs(plain - directed).max() > 1e-3 * np.abs(directed).max()
