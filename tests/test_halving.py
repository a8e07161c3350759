"""Forwards that do not fit a device's memory are halved, noted, and begun with when a result goes on."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import tiny
import turnover
from turnover import Batch, Exact, Influence, InputError, Rerank
from turnover.influence import protocol
from turnover.influence.halving import Halving

IDS = torch.arange(300) * 7
CARD = {"most": 10**9, "forwards": 0}


class Small(nn.Module):
    """Fails as a card does that has memory for some rows alone."""

    def __init__(self, model, *, graph=False):
        super().__init__()
        self.model, self.graph = model, graph

    def forward(self, inputs):
        CARD["forwards"] += 1
        if len(inputs) > CARD["most"] and (torch.is_grad_enabled() or not self.graph):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.model(inputs)


@pytest.fixture(autouse=True)
def whole_card(monkeypatch):
    monkeypatch.setitem(CARD, "most", 10**9)
    monkeypatch.setattr(protocol, "_MOST_TARGETS", 32)


class Layered(nn.Module):
    """Rows that meet the small card behind the masks, where ids have become rows."""

    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Linear(6, 12), nn.ReLU()
        self.rest = Small(nn.Sequential(nn.Tanh(), nn.Linear(12, 3)))

    def forward(self, inputs):
        return self.rest(self.act(self.first(inputs)))


def influence(method):
    network = turnover.attach(tiny.randomise(Layered()).eval(), ["act"], turnover.MaskSpec(seed=1))
    return Influence(network, method=method, ghosts=64)


def targets(*sizes):
    return [Batch(tiny.features(n, seed=n), tiny.labels(n, n), torch.arange(n)) for n in sizes]


def warned(call):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = call()
    return result, [str(one.message) for one in seen if "out of memory" in str(one.message)]


@pytest.mark.parametrize("method", [Exact(block=64), Rerank(candidates=20, block=64)])
def test_scores_are_those_of_a_larger_card(method):
    plain = influence(method).estimate(targets(4, 3), IDS)
    CARD["most"] = 70
    found, said = warned(lambda: influence(method).estimate(targets(4, 3), IDS))
    assert said == ["the device ran out of memory: forwards now have 32 ids at most"]
    largest = np.abs(plain.scores).max()
    np.testing.assert_allclose(found.scores, plain.scores, atol=1e-6 * max(1.0, largest))


def test_a_stored_result_goes_on_with_the_halved_size(tmp_path, monkeypatch):
    CARD["most"] = 70
    method = Exact(block=64)
    monkeypatch.setattr(type(influence(method)._driver._estimator), "block_shape", (2, 100))
    one, said = warned(lambda: influence(method).estimate(targets(4, 3), IDS, out=tmp_path / "one"))
    assert len(said) == 1
    assert json.loads((tmp_path / "one" / "progress" / "halved").read_text()) == {"ids": 32}

    def until(targets):
        yield targets[0]
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="32 ids"), pytest.raises(KeyboardInterrupt):
        influence(method).estimate(until(targets(4, 3)), IDS, out=tmp_path / "two")
    CARD["most"] = 10**9  # the note alone says what is halved
    sizes = []
    split = torch.split
    monkeypatch.setattr(torch, "split", lambda t, n, **k: sizes.append(n) or split(t, n, **k))
    two, said = warned(lambda: influence(method).estimate(targets(4, 3), IDS, out=tmp_path / "two"))
    assert len(said) == 1
    assert 32 in sizes
    assert 64 not in sizes
    np.testing.assert_array_equal(two.load().scores, one.load().scores)


def test_mask_gradients_of_a_batch_are_taken_in_parts():
    def linear():
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), Small(nn.Linear(12, 3), graph=True))
        network = turnover.attach(tiny.randomise(model).eval(), ["1"], turnover.MaskSpec(seed=1))
        return Influence(network, ghosts=64).estimate(targets(20, 9), IDS)

    plain = linear()
    CARD["most"] = 6
    found, said = warned(linear)
    assert said[-1].endswith("5 rows of a batch at most")
    np.testing.assert_allclose(found.scores, plain.scores, atol=1e-6 * np.abs(plain.scores).max())


def test_gram_takes_batches_in_parts():
    def gram():
        model = nn.Sequential(Small(nn.Linear(6, 12), graph=True), nn.ReLU(), nn.Linear(12, 3))
        method = Influence(tiny.randomise(model).eval(), method="gram")
        return method.fit(targets(40)).estimate(targets(11))

    plain = gram()
    CARD["most"] = 10
    found, said = warned(gram)
    assert said == [
        "the device ran out of memory: forwards now have 20 rows of a batch at most",
        "the device ran out of memory: forwards now have 10 rows of a batch at most",
    ]
    np.testing.assert_allclose(found.scores, plain.scores, atol=1e-4 * np.abs(plain.scores).max())


def test_a_device_without_memory_for_one_row_is_said():
    halving = Halving()

    def never(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(InputError, match="out of memory with 1 of rows of a batch"),
    ):
        halving.by_rows(targets(4)[0], never)
