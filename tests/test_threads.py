"""One network in several threads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tiny
import turnover
from turnover import BindingError, InputError, MaskSpec

IDS = torch.arange(60)


def in_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


def scored(network, method, **options):
    estimator = turnover.Influence(network, method=tiny.method(method, **options), ghosts=20)
    batch = turnover.Batch(tiny.features(4), tiny.labels(4), IDS[:4])
    if method == "gram":
        estimator.fit([turnover.Batch(tiny.features(9), tiny.labels(9), torch.arange(9))])
        return estimator.estimate([batch]).scores
    return estimator.estimate([batch], IDS).scores


@pytest.mark.parametrize("method", ["linear", "exact", "rerank", "gram"])
def test_threads_that_score_with_one_network_get_what_one_thread_gets(method):
    network = turnover.attach(tiny.mlp(32).eval(), "mlp")
    options = {"block": 3, "candidates": 5}
    expected = scored(network, method, **options)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: scored(network, method, **options), range(6)))
    for one in found:
        np.testing.assert_allclose(one, expected, atol=1e-5)


def test_threads_may_share_one_estimator_and_two_networks_one_model():
    model = tiny.mlp(32).eval()
    networks = [turnover.attach(model, "1"), turnover.attach(model, "3", MaskSpec(seed=2))]
    influences = [turnover.Influence(one, method=turnover.Exact(3), ghosts=20) for one in networks]
    targets = [(tiny.features(3), tiny.labels(3))]
    expected = [one.estimate(targets, IDS).scores for one in influences]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda k: influences[k % 2].estimate(targets, IDS).scores, range(8)))
    for number, one in enumerate(found):
        np.testing.assert_allclose(one, expected[number % 2], atol=1e-5)


def test_threads_that_name_networks_in_other_orders_do_not_wait_for_each_other():
    networks = [turnover.attach(tiny.mlp(), "mlp", MaskSpec(seed=seed)) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(scored, networks[::order], "linear") for order in (1, -1) for _ in range(8)
        ]
        found = [run.result(timeout=60) for run in runs]
    for one in found:
        np.testing.assert_allclose(one, found[0], atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "exact", "gram"])
def test_a_forward_in_another_thread_is_that_of_the_whole_network_while_one_scores(method):
    model = nn.Sequential(tiny.mlp(32)[:4], nn.Sequential(nn.Tanh(), nn.Linear(32, 3))).eval()
    network = turnover.attach(model, "0.3")
    one = tiny.features(1)
    with torch.no_grad():
        expected = model(one)
    stop, wrong, runs = threading.Event(), [], []

    def predict():
        while not stop.is_set():
            with torch.no_grad():
                found = model(one)
            runs.append(1)
            if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-6):
                wrong.append(found)

    alone = scored(network, method)
    with ThreadPoolExecutor(1) as pool:
        loop = pool.submit(predict)
        try:
            for _ in range(8):
                np.testing.assert_allclose(scored(network, method), alone, atol=1e-5)
        finally:
            stop.set()
        loop.result(timeout=60)
    assert runs and not wrong


def test_hidden_predictions_and_audits_of_threads_are_those_of_one():
    model = tiny.mlp(bias=True)
    network = turnover.attach(model, "mlp")
    batches = [(tiny.features(8), tiny.labels(8), IDS[:8])]
    expected = turnover.hidden_predictions(network, batches).probabilities
    leaks = network.audit(batches[0]).leaking_share

    def work(number):
        if number % 2:
            return turnover.hidden_predictions(network, batches).probabilities
        return network.audit(batches[0]).leaking_share

    with ThreadPoolExecutor(3) as pool:
        for number, one in enumerate(pool.map(work, range(9))):
            np.testing.assert_array_equal(one, expected if number % 2 else leaks)
    assert model.training


def test_the_ids_of_a_context_are_bound_in_its_thread_alone():
    model, x = tiny.mlp().eval(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    whole = model(x)
    with network.exposed([1, 2, 3, 4]):
        mine = model(x)
        assert torch.equal(in_thread(lambda: model(x)), whole)

        def theirs():
            with network.hidden([5, 6, 7, 8]):
                return model(x)

        other = in_thread(theirs)
        assert torch.equal(model(x), mine)
    assert torch.equal(in_thread(theirs), other) and not torch.equal(other, mine)


def test_training_in_a_thread_without_a_context_of_its_own_is_refused():
    model = tiny.mlp()
    network = turnover.attach(model, "mlp")
    with network.exposed([1, 2, 3, 4]), pytest.raises(BindingError, match="thread that runs"):
        in_thread(lambda: model(tiny.features(4)))


def test_one_context_may_be_entered_in_two_threads():
    model, x = tiny.mlp().eval(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    context, entered, go = network.exposed([1, 2, 3, 4]), threading.Event(), threading.Event()
    with network.exposed([1, 2, 3, 4]):
        expected = model(x)

    def other():
        with context:
            entered.set()
            assert go.wait(30)
            return model(x)

    with ThreadPoolExecutor(1) as pool:
        with context:
            later = pool.submit(other)
            assert entered.wait(30)
        assert not torch.equal(model(x), expected)
        go.set()
        assert torch.equal(later.result(timeout=30), expected)


def test_a_context_that_is_left_in_another_thread_is_refused():
    context = turnover.attach(tiny.mlp(), "mlp").exposed([1])
    context.__enter__()
    with pytest.raises(BindingError, match="left in another"):
        in_thread(lambda: context.__exit__(None, None, None))


class Checkpointed(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.body, self.reentrant = nn.Linear(6, 8), tiny.mlp(features=8), reentrant

    def forward(self, x):
        h = self.first(x)
        if self.reentrant is None:
            return self.body(h)
        return checkpoint(self.body, h, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_threads_that_train_side_by_side_learn_what_one_after_the_other_learns(reentrant):
    # Gradients of threads add up in the same tensors: their sum over all steps is compared.
    def all_steps(network, firsts, barrier):
        def run(first):
            for step in range(5):
                with network.exposed(first + torch.arange(4) + 4 * step):
                    barrier.wait(30)
                    loss = network.model(tiny.features(4, seed=step)).square().sum()
                barrier.wait(30)
                loss.backward()

        with ThreadPoolExecutor(len(firsts)) as pool:
            list(pool.map(run, firsts))
        return [p.grad.clone() for p in network.model.parameters()]

    plain = turnover.attach(Checkpointed(), "body.[13]")
    for first in (0, 1000):
        all_steps(plain, [first], threading.Barrier(1))
    expected = [p.grad for p in plain.model.parameters()]
    network = turnover.attach(Checkpointed(reentrant), "body.[13]")
    found = all_steps(network, [0, 1000], threading.Barrier(2))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_that_another_thread_repeats_has_the_ids_of_its_forward():
    def gradient(reentrant, run):
        model = Checkpointed(reentrant)
        network = turnover.attach(model, "body.[13]")
        with network.exposed([1, 2, 3, 4]):
            loss = model(tiny.features(4)).square().sum()
        run(loss.backward)
        return model.first.weight.grad

    expected = gradient(None, lambda backward: backward())
    for reentrant in (True, False):
        torch.testing.assert_close(gradient(reentrant, in_thread), expected)


def test_a_checkpoint_that_may_be_of_either_of_two_threads_is_refused():
    model = Checkpointed(False)
    network = turnover.attach(model, "body.[13]")

    def forward(first):
        with network.exposed(torch.arange(first, first + 4)):
            return model(tiny.features(4)).square().sum()

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        loss = one.submit(forward, 0).result(30)
        other.submit(forward, 10).result(30)
        with pytest.raises(BindingError, match="two threads"):
            in_thread(loss.backward)


def test_training_while_another_thread_scores_is_refused():
    model, x = tiny.mlp(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    found = []

    def objective(outputs, batch):
        def step():
            with (
                pytest.raises(BindingError, match="another thread scores"),
                network.exposed(range(4)),
            ):
                model(x)
            with torch.no_grad(), network.without(3):
                found.append(model(x))

        in_thread(step)
        return turnover.objectives.margin(outputs, batch)

    turnover.Influence(network, objective, ghosts=20).estimate([(x, tiny.labels(4))], IDS)
    assert found and model.training


def test_a_forward_under_the_random_weights_of_an_audit_is_refused():
    class Calling(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.call = tiny.mlp(), None

        def forward(self, x):
            if self.call:
                self.call()
            return self.body(x)

    model, x = Calling(), tiny.features(4)
    network = turnover.attach(model, "mlp")

    def call():
        model.call = None
        with pytest.raises(BindingError, match="audits"):
            in_thread(lambda: model(x))

    model.call = call
    assert network.audit(x).clean
    assert model.call is None
    assert model.eval()(x).shape == (4, 3)


def replica_of(module):
    copied = module._replicate_for_data_parallel()
    copied._parameters = module._parameters
    for name, child in module.named_children():
        copied._modules[name] = replica_of(child)
    return copied


def test_replicas_of_data_parallel_are_right_or_refused_by_name():
    model, x = tiny.mlp().eval(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    replica = replica_of(model)
    with network.without(3):
        without = model(x)
        assert torch.equal(in_thread(lambda: replica(x)), without)
    with network.exposed([1, 2, 3, 4]), pytest.raises(BindingError, match="DataParallel"):
        in_thread(lambda: replica(x[:2]))
    model.train()
    with network.mean():
        assert torch.equal(in_thread(lambda: replica(x)), model(x))
    with pytest.raises(BindingError, match="without ids"):
        in_thread(lambda: replica(x))


def test_a_compiled_model_runs_under_the_context_of_the_thread_that_calls_it():
    model, x = tiny.mlp().eval(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    whole = compiled(x)
    with network.exposed([1, 2, 3, 4]):
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(in_thread(lambda: compiled(x)), whole)


def test_a_child_process_does_not_wait_for_threads_of_its_parent():
    import os

    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    network = turnover.attach(tiny.mlp(), "mlp")
    inside, leave = threading.Event(), threading.Event()

    def objective(outputs, batch):
        inside.set()
        assert leave.wait(30)
        return turnover.objectives.margin(outputs, batch)

    targets = [(tiny.features(2), tiny.labels(2))]
    with ThreadPoolExecutor(1) as pool:
        scoring = pool.submit(
            lambda: turnover.Influence(network, objective, ghosts=20).estimate(targets, IDS)
        )
        assert inside.wait(30)
        child = os.fork()
        if not child:
            from turnover.dropout.modules import exclusive

            with exclusive(network.model):
                os._exit(7)
        leave.set()
        scoring.result(timeout=30)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_an_objective_may_score_with_the_network_itself():
    network = turnover.attach(tiny.mlp(), "mlp")
    inner = turnover.Influence(network, ghosts=20)
    targets = [(tiny.features(2), tiny.labels(2))]

    def objective(outputs, batch):
        inner.estimate(targets, IDS)
        return turnover.objectives.margin(outputs, batch)

    nested = turnover.Influence(network, objective, ghosts=20).estimate(targets, IDS)
    np.testing.assert_allclose(nested.scores, inner.estimate(targets, IDS).scores, atol=1e-6)
    assert all(p.requires_grad for p in network.model.parameters())
    with pytest.raises(InputError, match="no targets"):
        inner.estimate([], IDS)
