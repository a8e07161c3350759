"""The plan of a fit by gram, against the fit and the scores themselves."""

import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import tiny
import turnover
from test_gram import cut, problem
from test_gram_language import causal
from test_language_models import passages
from turnover import Batch, Gram, Influence, InputError, objectives
from turnover.influence.gram import kernel
from turnover.influence.gram.capture import Capture
from turnover.influence.gram.disk import Limits

ROWS = 60
ALL, SOME, EXACT = range(3)


def wide(instances, targets):
    """A network and random rows, of which some work takes long enough to be timed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    features = torch.randn(instances + targets, 64)
    labels = torch.randint(10, (instances + targets,))
    rows = Batch(features, labels, torch.arange(instances + targets))
    return model, rows.rows(0, instances), rows.rows(instances, instances + targets)


def test_seconds_are_those_of_the_fit_and_the_scores():
    model, train, targets = wide(1200, 200)
    train, targets = cut(train, 100), cut(targets, 100)
    influence = Influence(model, method=Gram(landmarks=200))
    methods = Gram(), Gram(landmarks=200), Gram(landmarks=200, exact=True)
    for _ in range(4):  # the machine may do other work meanwhile
        plan = influence.plan(targets, train_batches=train)
        wrong = []
        for method, cost in zip(methods, plan.costs, strict=True):
            other = Influence(model, method=method)
            start = time.perf_counter()
            other.fit(train)
            fitted = time.perf_counter()
            other.estimate(targets)
            total = time.perf_counter() - start
            pairs = (cost.fit_seconds, fitted - start), (cost.seconds, total)
            wrong += [one for one in pairs if not 1 / 3 < one[0] / one[1] < 3]
        if not wrong:
            return
    pytest.fail(f"planned and taken: {wrong}")


@pytest.mark.parametrize("samples", [0, 2])
def test_work_is_counted(monkeypatch, samples):
    monkeypatch.setattr(kernel, "_ROWS", 7)  # several blocks of targets
    model, train, targets = problem(ROWS, 20)
    train, targets = cut(train, 9), cut(targets, 4)
    seen, rows = [], Capture.rows

    def counted(self, batch, *, training=False):
        if training:
            seen.append(len(batch))
        return rows(self, batch, training=training)

    for more in ({}, {"landmarks": 15}, {"landmarks": 15, "exact": True}):
        method = Gram(samples=samples, **more)
        influence = Influence(model, objectives.cross_entropy, method)
        plan = influence.plan(targets, train_batches=train)
        assert (plan.targets, plan.instances) == (20, ROWS)
        assert plan.gradients == (3 if samples else 2)
        (cost,) = (cost for cost in plan.costs if cost.chosen)
        with monkeypatch.context() as patched:
            patched.setattr(Capture, "rows", counted)
            influence.fit(train)
            assert sum(seen) == cost.work["fit gradients"]
            seen.clear()
            influence.estimate(targets)
            assert sum(seen) == cost.work["estimate gradients"]
            seen.clear()


def test_products_are_counted():
    model, train, targets = problem(ROWS, 20)
    plan = Influence(model, method=Gram(landmarks=15)).plan([targets], train_batches=[train])
    each, marks = 2 * ROWS, 2 * 15
    every, some, exact = (cost.work for cost in plan.costs)
    assert every["fit products"] == each * (each + 1) // 2
    assert every["estimate products"] == 20 * each
    assert some["fit products"] == marks * (marks + 1) // 2 + each * marks + each * 2
    assert some["estimate products"] == 20 * marks
    assert exact["fit products"] == some["fit products"]
    assert exact["estimate products"] == 20 * (marks + each)
    some = Influence(model, method=Gram(landmarks=15)).plan([targets], train_batches=[train], top=1)
    # Of each target four candidates for each end, if no two targets share one.
    assert some.costs[SOME].work["estimate gradients"] == ROWS


def test_bytes_are_those_of_the_store(tmp_path):
    model, train, targets = wide(1500, 10)
    influence = Influence(model, method=Gram(landmarks=100))
    plan = influence.plan([targets], train_batches=cut(train, 100))
    influence.fit(cut(train, 100), out=tmp_path / "fit")
    size = sum(path.stat().st_size for path in (tmp_path / "fit").rglob("*") if path.is_file())
    for cost in plan.costs[SOME:]:
        assert 0.7 < size / cost.store < 1.1
    assert plan.costs[ALL].store == 0


class Long(Dataset):
    """Many rows, of which few may be read."""

    def __init__(self, rows, most):
        self.rows, self.left = rows, most

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        self.left -= 1
        assert self.left >= 0
        return torch.randn(64, generator=torch.Generator().manual_seed(index)), index % 10


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.filterwarnings("ignore:turnover. drop_last")
def test_a_long_loader_is_not_read(drop_last):
    model, _, targets = wide(8, 50)
    loader = DataLoader(Long(10_000_005, 8 * 64), 64, drop_last=drop_last)
    start = time.perf_counter()
    plan = Influence(model, method=Gram(landmarks="auto")).plan([targets], train_batches=loader)
    assert time.perf_counter() - start < 60
    assert plan.instances == (10_000_000 if drop_last else 10_000_005)
    assert [cost.chosen for cost in plan.costs] == [False, True, False]
    every, some, exact = plan.costs
    assert every.seconds > 100 * some.seconds
    assert every.disk > 4 * plan.instances**2 > some.disk > some.store / 2 > 2**30
    assert some.seconds < exact.seconds


def test_rows_of_other_iterables_are_counted():
    model, train, targets = problem(ROWS)

    class Batches:
        def __iter__(self):
            return iter(cut(train, 7))

    plan = Influence(model, method="gram").plan([targets], train_batches=Batches())
    assert plan.instances == ROWS
    assert [cost.way for cost in plan.costs] == [
        "all pairs",
        "landmarks=60",
        "landmarks=60, exact=True",
    ]
    assert [cost.chosen for cost in plan.costs] == [True, False, False]


def test_it_is_the_same_before_and_after_the_fit_and_changes_nothing():
    model, train, targets = problem(ROWS)
    influence = Influence(model, method=Gram(landmarks=20, exact=True))
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    before = influence.plan([targets], train_batches=[train])
    wanted = influence.fit([train]).estimate([targets])
    after = influence.plan([targets], train_batches=[train])
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(influence.estimate([targets]).scores, wanted.scores)
    assert [one.work for one in before.costs] == [one.work for one in after.costs]
    assert [one.chosen for one in after.costs] == [False, False, True]


@pytest.mark.parametrize("memory", [0, 2**30])
def test_what_does_not_fit_in_memory_is_on_disk(memory):
    model, train, targets = problem(ROWS)
    influence = Influence(model, method=Gram(landmarks=20))
    influence._driver._limits = Limits(memory=memory, rows=ROWS if memory == 0 else 20_000)
    plan = influence.plan([targets], train_batches=[train])
    for cost in plan.costs:
        assert (cost.disk > 0) == (memory == 0)


def test_networks_objectives_and_features_of_all_kinds_are_planned():
    model, train, targets = problem(ROWS)
    two = Influence([model, problem(ROWS, seed=3)[0]], method=Gram(landmarks=20))
    one = Influence(model, method=Gram(landmarks=20))
    costs = [which.plan([targets], train_batches=[train]).costs for which in (one, two)]
    assert costs[1][SOME].store == pytest.approx(2 * costs[0][SOME].store, rel=0.05)
    language = causal("llama")
    for method in (Gram(), Gram(samples=2), Gram(ridge="gcv")):
        influence = Influence(language, objectives.completion, method)
        plan = influence.plan([passages(3, seed=5)], train_batches=cut(passages(24), 8), top=2)
        assert all(cost.seconds > 0 for cost in plan.costs)
    network = turnover.attach(tiny.mlp(), "mlp")
    masks = Influence(network, method=Gram(features="masks"))
    assert masks.plan([targets], train_batches=[train]).instances == ROWS


def test_it_is_a_table():
    model, train, targets = problem(ROWS)
    plan = Influence(model, method=Gram(landmarks=20)).plan([targets], train_batches=[train])
    said = str(plan)
    assert "5 targets x 60 instances, 2 gradients each, estimated" in said
    assert [line.endswith("<-") for line in said.splitlines()[2:]] == [False, True, False]
    assert plan.to_dict()["costs"][SOME]["way"] == "landmarks=20"


def test_what_cannot_be_planned_is_refused():
    model, train, targets = problem(ROWS)
    gram = Influence(model, method="gram")
    with pytest.raises(InputError, match=r"train_batches=train_batches"):
        gram.plan([targets])
    with pytest.raises(InputError, match=r"train_batches=train_batches"):
        gram.fit([train]).plan([targets], [101])
    with pytest.raises(InputError, match="train_ids or train_batches"):
        gram.plan([targets], [101], train_batches=[train])
    with pytest.raises(InputError, match="give a list or a data loader"):
        gram.plan([targets], train_batches=iter([train]))
    with pytest.raises(InputError, match="no training batches"):
        gram.plan([targets], train_batches=[])
    with pytest.raises(InputError, match="no targets"):
        gram.plan([], train_batches=[train])
    with pytest.raises(InputError, match="do not pass out="):
        gram.plan([targets], train_batches=[train], out="somewhere")
    with pytest.raises(InputError, match="top"):
        gram.plan([targets], train_batches=[train], top=0)
    network = turnover.attach(tiny.mlp(), "mlp")
    with pytest.raises(InputError, match="method='gram' alone: give 'linear' train_ids"):
        Influence(network).plan([targets], train_batches=[train])
