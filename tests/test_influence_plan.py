import time

import numpy as np
import pytest
import torch

import tiny
import turnover
from turnover import Batch, Influence, objectives
from turnover.influence import plan

IDS = torch.arange(400)


def build(width=64):
    torch.manual_seed(3)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, width),
        torch.nn.ReLU(),
        torch.nn.Linear(width, tiny.CLASSES),
    )
    network = turnover.attach(tiny.randomise(model).eval(), "mlp")
    inputs = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(24) % tiny.CLASSES
    batches = [
        Batch(x, y) for x, y in zip(torch.split(inputs, 6), torch.split(labels, 6), strict=True)
    ]
    return network, batches


@pytest.mark.parametrize("top", [None, 5])
def test_the_budget_decides_and_more_of_it_never_buys_a_rougher_method(top):
    network, batches = build()
    order = ["linear", "rerank", "exact"]
    methods = ("linear", turnover.Rerank(candidates=10), "exact")

    def auto(seconds):
        return Influence(network, method=turnover.Auto(seconds, methods), ghosts=50)

    costs = {c.method: c.seconds for c in auto(60.0).plan(batches, IDS, top=top).costs}
    chosen = []
    for seconds in (0.0, costs["rerank"] * 1.2, 1e9):
        plan = auto(seconds).plan(batches, IDS, top=top)
        chosen.append(order.index(plan.chosen))
        assert plan.chosen in str(plan) and plan.to_dict()["chosen"] == plan.chosen
    assert chosen == sorted(chosen)
    assert (order[chosen[0]], order[chosen[-1]]) == ("linear", "exact")


@pytest.mark.parametrize(("seconds", "method"), [(0.0, "linear"), (1e9, "exact")])
def test_auto_estimates_by_the_method_that_it_chose(seconds, method):
    network, batches = build()
    auto = Influence(network, method=turnover.Auto(seconds), ghosts=50)
    plain = Influence(network, method=method, ghosts=50)
    for estimate, expected in (
        (auto.estimate(batches, IDS), plain.estimate(batches, IDS)),
        (auto.aggregate(batches, IDS), plain.aggregate(batches, IDS)),
    ):
        assert estimate.method == method
        np.testing.assert_array_equal(estimate.scores, expected.scores)


def test_auto_goes_on_with_the_method_that_a_result_was_begun_with(tmp_path):
    network, batches = build()
    place = tmp_path / "scores.zarr"
    begun = Influence(network, method=turnover.Auto(1e9), ghosts=50).estimate(
        batches, IDS, out=place
    )
    again = Influence(network, method=turnover.Auto(0.0), ghosts=50).estimate(
        batches, IDS, out=place
    )
    assert begun.load().method == again.load().method == "exact"


def test_auto_stores_what_it_reranks(tmp_path, monkeypatch):
    network, batches = build()
    monkeypatch.setattr(plan, "_choose", lambda *_: ("rerank", "it fits"))
    rerank = turnover.Rerank(candidates=5)
    auto = Influence(network, method=turnover.Auto(methods=("linear", rerank, "exact")), ghosts=150)
    stored = auto.estimate(batches, IDS, out=tmp_path / "scores.zarr").load()
    expected = Influence(network, method=rerank, ghosts=150).estimate(batches, IDS)
    np.testing.assert_array_equal(stored.scores, expected.scores)
    np.testing.assert_array_equal(stored.noise_floor, expected.noise_floor)


def test_the_plan_foretells_noise_floors_and_counts_everything():
    network, batches = build()
    influence = Influence(network, ghosts=200)
    plan = influence.plan(batches, IDS)
    assert (plan.targets, plan.ids) == (24, 400)
    for one in plan.costs:
        real = Influence(network, method=one.method, ghosts=200).estimate(batches, IDS)
        assert one.noise_floor == pytest.approx(np.median(real.noise_floor), rel=0.35)


@pytest.mark.parametrize("method", ["linear", "exact"])
def test_the_plan_foretells_the_time(method):
    network, batches = build(512)
    ids = torch.arange(20_000 if method == "linear" else 2_000)
    influence = Influence(network, method=method)
    foretold, taken = [], []
    for _ in range(3):
        costs = influence.plan(batches, ids).costs
        foretold += [one.seconds for one in costs if one.method == method]
        start = time.perf_counter()
        influence.estimate(batches, ids)
        taken.append(time.perf_counter() - start)
    # Machines that run other things too are only so regular.
    assert min(taken) / 6 < max(foretold) and min(foretold) < 6 * max(taken)


def test_the_plan_writes_nothing_and_leaves_the_model_as_it_was(tmp_path):
    network, batches = build()
    network.model.train()
    before = {k: v.clone() for k, v in network.model.state_dict().items()}
    generator = torch.get_rng_state()
    Influence(network, objectives.cross_entropy).plan(batches, IDS, out=tmp_path / "s.zarr")
    assert not list(tmp_path.iterdir())
    assert network.model.training
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, before[k]) for k, v in network.model.state_dict().items())
    assert all(p.requires_grad for p in network.model.parameters())


def test_what_is_kept_of_each_target_is_in_the_memory():
    network, batches = build()
    influence = Influence(network)
    many = torch.arange(1_000_000)
    dense, top, stored = (
        {c.method: c.gib for c in plan.costs}["linear"]
        for plan in (
            influence.plan(batches, many),
            influence.plan(batches, many, top=10),
            influence.plan(batches, many, out="somewhere.zarr"),
        )
    )
    assert dense - stored == pytest.approx(24 * 1e6 * 4 / 2**30, rel=0.01)
    assert top == pytest.approx(stored, abs=0.01)
