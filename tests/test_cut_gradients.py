"""Models whose forward cuts off the gradient of a site: right by the linear method, or refused."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tiny
import turnover
from turnover import BindingError, InputError

IDS = torch.arange(30)


class Cut(nn.Module):
    """Runs a block in a way of its own."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
        self.block = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.head = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3, bias=False))
        self.way = way

    def forward(self, x):
        h = self.stem(x)
        if self.way == "no_grad":
            with torch.no_grad():
                h = self.block(h)
        elif self.way == "detach":
            h = self.block(h).detach()
        elif self.way == "inference":
            with torch.inference_mode():
                h = self.block(h)
            h = h.clone()
        elif self.way == "twice":
            h = self.block(h) + self.block(2 * h).detach()
        elif self.way in (True, False):
            h = checkpoint(self.block, h, use_reentrant=self.way)
        else:
            h = self.block(h)
        return self.head(h)


def scores(network, method, sites=None):
    influence = turnover.Influence(network, method=method, ghosts=20, sites=sites)
    return influence.estimate([(tiny.features(5), tiny.labels(5))], IDS).scores


@pytest.mark.parametrize("way", ["no_grad", "detach", "inference", "twice", True])
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_a_site_whose_gradient_is_cut_off_is_refused_by_name(way):
    network = turnover.attach(Cut(way).eval(), ["block.1", "head.1"])
    for method in ("linear", "rerank"):
        with pytest.raises(BindingError, match=r"'block.1'.*exact") as error:
            scores(network, method)
    assert "use_reentrant=False" in str(error.value)
    assert np.isfinite(scores(network, "exact")).all()
    masks = turnover.Influence(network, method=turnover.Gram(features="masks"))
    with pytest.raises(BindingError, match=r"'block.1'"):
        masks.fit([(tiny.features(9), tiny.labels(9), torch.arange(9))])
    # The site that has its gradient is right by itself.
    alone = scores(network, "linear", ["head.1"])
    assert np.corrcoef(alone.ravel(), scores(network, "exact", ["head.1"]).ravel())[0, 1] > 0.9


def test_only_a_later_batch_may_be_cut_off():
    class Later(Cut):
        def forward(self, x):
            self.way = "detach" if bool((x > 50).any()) else None
            return super().forward(x)

    network = turnover.attach(Later(None).eval(), ["block.1", "head.1"])
    batches = [(tiny.features(3), tiny.labels(3)), (tiny.features(3) + 100, tiny.labels(3))]
    influence = turnover.Influence(network, ghosts=20)
    influence.estimate(batches[:1], IDS)
    with pytest.raises(BindingError, match=r"'block.1'"):
        influence.estimate(batches, IDS)


@pytest.mark.parametrize("sites", [["stem.1", "block.1", "head.1"], ["stem.1", "head.1"]])
def test_a_reentrant_checkpoint_above_a_site_is_refused_with_the_fix(sites):
    network = turnover.attach(Cut(True).eval(), sites)
    with pytest.raises(InputError, match="use_reentrant=False"):
        scores(network, "linear")
    assert np.isfinite(scores(network, "exact")).all()


def test_a_model_whose_only_site_is_cut_off_is_refused():
    for way in ("no_grad", "detach"):
        network = turnover.attach(Cut(way).eval(), "block.1")
        with pytest.raises(InputError, match=r"exact.*no_grad"):
            scores(network, "linear")


def test_a_checkpoint_of_the_other_kind_is_as_none():
    expected, found = (
        scores(turnover.attach(Cut(way).eval(), ["block.1", "head.1"]), "linear")
        for way in (None, False)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


class Heads(nn.Module):
    """Two heads of one body, of which an objective looks at one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.GELU())
        self.first, self.second = (
            nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3, bias=False))
            for _ in range(2)
        )
        self.runs = 0

    def forward(self, x):
        self.runs += 1
        h = self.body(x)
        return self.first(h), self.second(h)


def test_a_head_that_the_objective_does_not_look_at_has_no_influence():
    model = Heads().eval()
    network = turnover.attach(model, "mlp")
    both, alone = scores(network, "linear"), scores(network, "linear", ["body.1", "first.1"])
    np.testing.assert_allclose(both, alone, atol=1e-6)
    assert not scores(network, "exact", ["second.1"]).any()


def test_what_no_gradient_means_is_looked_up_once():
    network = turnover.attach(Heads().eval(), "mlp")
    batches = [(tiny.features(3, seed=seed), tiny.labels(3)) for seed in range(6)]
    influence = turnover.Influence(network, ghosts=20)
    influence.estimate(batches, IDS)
    first, network.model.runs = network.model.runs, 0
    influence.estimate(batches, IDS)
    assert network.model.runs == 6 < first


def test_a_module_that_runs_twice_has_the_sum_of_both_derivatives():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
            self.act, self.last = nn.Tanh(), nn.Linear(8, 3, bias=False)

        def forward(self, x):
            return self.last(self.act(self.second(self.act(self.first(x)))))

    model, x, y = Twice().eval(), tiny.features(4), tiny.labels(4)
    network = turnover.attach(model, "act")
    masks = torch.ones(4, 8, requires_grad=True)
    hidden = torch.tanh(model.second(torch.tanh(model.first(x)) * masks)) * masks
    values = turnover.objectives.margin(model.last(hidden), turnover.Batch(x, y))
    by_mask = torch.autograd.grad(values.sum(), masks)[0]
    signs = 2 - 4 * network.spec.exposed(IDS, "act", 8).float()
    np.testing.assert_allclose(scores_of(network, x, y), (by_mask @ signs.T).numpy(), atol=1e-5)


def scores_of(network, x, y):
    return turnover.Influence(network, ghosts=20).estimate([(x, y)], IDS).scores


def test_gradients_of_parameters_within_a_reentrant_checkpoint_are_refused_by_gram():
    batch = (tiny.features(9), tiny.labels(9), torch.arange(9))
    plain = turnover.Influence(Cut(False).eval(), method="gram").fit([batch])
    assert np.isfinite(plain.self_influence().scores).all()
    with pytest.raises(InputError, match="use_reentrant=False"):
        turnover.Influence(Cut(True).eval(), method="gram").fit([batch])

    class Frozen(Cut):
        """As PEFT does it: the stem is frozen, and what it gives still requires a gradient."""

        def forward(self, x):
            h = self.stem(x).requires_grad_(True)
            return self.head(checkpoint(self.block, h, use_reentrant=True))

    model = Frozen(None).eval()
    model.stem.requires_grad_(False)
    with pytest.raises(InputError, match="use_reentrant=False"):
        turnover.Influence(model, method="gram").fit([batch])


def test_the_audit_does_not_call_clean_what_it_cannot_see():
    class Frozen(Cut):
        def forward(self, x):
            h = self.stem(x).requires_grad_(True)
            return self.head(checkpoint(self.block, h, use_reentrant=self.way))

    for way in (True, False):
        model = Frozen(way)
        model.stem.requires_grad_(False)
        network = turnover.attach(model, "head.1")
        if way:
            with pytest.raises(InputError, match=r"audit.*use_reentrant=False"):
                network.audit(tiny.features(8))
        else:
            leaking = {p.name for p in network.audit(tiny.features(8)).parameters if p.leaking}
            assert "block.0.weight" in leaking
    with pytest.raises(InputError, match=r"audit.*use_reentrant=False"):
        turnover.attach(Cut(True), ["block.1", "head.1"]).audit(tiny.features(8))


def test_a_frozen_block_in_a_reentrant_checkpoint_does_not_hinder_the_audit():
    class Frozen(Cut):
        def forward(self, x):
            h = self.stem(x).requires_grad_(True)
            return self.head(checkpoint(self.block, h, use_reentrant=True))

    model = Frozen(None)
    model.stem.requires_grad_(False)
    model.block.requires_grad_(False)
    assert turnover.attach(model, "head.1").audit(tiny.features(8)).clean
