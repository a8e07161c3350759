"""Influence on the GPU is that of the CPU, within a stated share of each target's largest score."""

import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import tiny
import turnover
from problems import EVERY, IDS, ROWS, error, head, images, on_both, perceptron, texts
from turnover import Batch, Exact, Gram, Influence, MaskSpec, Rerank, objectives

FLOAT32 = 1e-5
GRAM = 1e-4
BFLOAT16 = 0.05
"""Of bfloat16 networks: a forward has 8 bits, of which a difference of two loses more."""
every_problem = pytest.mark.parametrize("make", EVERY)


@every_problem
@pytest.mark.parametrize("keep", [0.5, 0.3])
@pytest.mark.parametrize("method", ["exact", "linear"])
def test_scores(device, make, keep, method):
    def scores(network, batch):
        return Influence(network, method=method, ghosts=100).estimate([batch], IDS).scores

    here, there = (scores(*one) for one in on_both(make, device, keep=keep))
    assert error(there, here) < FLOAT32


@every_problem
def test_rerank(device, make):
    def result(network, batch):
        return Influence(network, method=Rerank(candidates=40), ghosts=100).estimate([batch], IDS)

    here, there = (result(*one) for one in on_both(make, device))
    # An id at the edge of the candidates may be one of them on one device alone.
    same = here.exact == there.exact
    assert same.mean() > 0.99
    assert error(np.where(same, there.scores, 0), np.where(same, here.scores, 0)) < FLOAT32


@every_problem
@pytest.mark.parametrize("method", ["exact", "linear"])
def test_aggregate_and_self_influence(device, make, method):
    def results(network, batch):
        influence = Influence(network, objectives.cross_entropy, method, ghosts=100)
        whole = influence.aggregate([batch], IDS).scores
        return whole, influence.self_influence([batch]).scores

    here, there = (results(*one) for one in on_both(make, device))
    for found, expected in zip(there, here, strict=True):
        assert error(found, expected) < FLOAT32


def test_significance(device):
    def q(network, batch):
        result = Influence(network, ghosts=1000).estimate([batch], IDS)
        return result.z, result.q

    here, there = (q(*one) for one in on_both(head, device))
    np.testing.assert_allclose(there[0], here[0], atol=1e-4)
    np.testing.assert_allclose(there[1], here[1], atol=1e-3)


def test_groups(device):
    """Ids of instances at one site, those of their groups at the other."""

    def found(network, batch):
        first, second = network.sites
        columns = {first: torch.arange(ROWS), second: torch.arange(ROWS) // 4}
        with torch.no_grad(), network.exposed(columns):
            trained = batch.call(network.model)
        with torch.no_grad(), network.without(2, sites=[second]):
            without = batch.call(network.model)
        influence = Influence(network, method="exact", ghosts=100, sites=[second])
        return trained.cpu(), without.cpu(), influence.estimate([batch], [0, 1, 2]).scores

    here, there = (found(*one) for one in on_both(perceptron, device))
    for one, other in zip(there, here, strict=True):
        assert error(one, other) < FLOAT32


@pytest.mark.parametrize("make", [perceptron, images, texts])
@pytest.mark.parametrize(
    "method", [Gram(), Gram(directions=0), Gram(ridge="gcv"), Gram(features="masks")], ids=str
)
def test_gram(device, make, method):
    def results(network, batch):
        influence = Influence(network, method=method).fit([batch])
        result = influence.estimate([batch])
        return result.scores, influence.aggregate([batch]).scores, result.standard_error

    here, there = (results(*one) for one in on_both(make, device))
    for found, expected in zip(there[:2], here[:2], strict=True):
        assert error(found, expected) < GRAM
    assert error(there[2], here[2]) < 1e-2


@pytest.mark.parametrize("make", [perceptron, images, head])
@pytest.mark.parametrize("method", ["exact", "linear"])
def test_scores_of_bfloat16_networks(device, make, method):
    """Against the same rounded weights in float32 on the CPU."""
    (rounded, targets), (network, batch) = on_both(make, device, dtype=torch.bfloat16)
    rounded.model.float()
    plain = Batch(targets.inputs.float(), targets.labels, targets.ids)
    here, there = (
        Influence(one, method=method, ghosts=100).estimate([rows], IDS).scores
        for one, rows in ((rounded, plain), (network, batch))
    )
    assert error(there, here) < BFLOAT16


@contextmanager
def little_memory(card, more):
    """Room for ``more`` bytes beside what is taken."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(card).total_memory
    share = (torch.cuda.memory_reserved(card) + more) / total
    torch.cuda.set_per_process_memory_fraction(share, card)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, card)


def halved(card, call):
    """The scores with little memory, and what the warnings say was halved last."""
    plain = call()
    with warnings.catch_warnings(record=True) as seen, little_memory(card, 2**28):
        warnings.simplefilter("always")
        found = call()
    said = [str(one.message) for one in seen if "ran out of memory" in str(one.message)]
    assert said, "nothing was halved"
    assert error(found, plain) < GRAM
    return said[-1]


def test_ids_are_halved_if_the_memory_of_the_card_is_short(card):
    model = tiny.randomise(tiny.mlp(4096)).eval().to(card)
    network = turnover.attach(model, "mlp", MaskSpec())
    batch, ids = Batch(tiny.features(2), tiny.labels(2)).to(card), torch.arange(40_000)

    def exact():
        influence = Influence(network, method=Exact(block=2**15), ghosts=100)
        return influence.estimate([batch], ids).scores

    assert "ids at most" in halved(card, exact)


class Wide(nn.Module):
    """Numbers of every row that take 3 MB, and are forgotten."""

    def forward(self, inputs):
        steps = torch.linspace(0.5, 1, 2**16, device=inputs.device)
        return (inputs[:, :, None] * steps).tanh().mean(dim=2)


def test_rows_are_halved_if_the_memory_of_the_card_is_short(card):
    model = nn.Sequential(nn.Linear(6, 12), Wide(), nn.Linear(12, 3))
    model = tiny.randomise(model).eval().to(card)
    batch = Batch(tiny.features(256), tiny.labels(256)).to(card)
    few = Batch(tiny.features(4, seed=1), tiny.labels(4)).to(card)

    def gram():
        return Influence(model, method=Gram(directions=0)).fit([batch]).estimate([few]).scores

    assert "rows of a batch at most" in halved(card, gram)
