"""Gram: scores against a plain solve, their errors, what it refuses."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import tiny
import turnover
from test_gram_gradients import build, by_hand
from turnover import Batch, Gram, Influence, InputError, objectives
from turnover.influence.gram import ridge
from turnover.results.calibration import StudentNull
from turnover.results.store import save


def problem(train=40, targets=5, seed=0, *, epochs=40):
    """A small network that was trained a little, its training set and targets."""
    torch.manual_seed(seed)
    model = tiny.mlp(width=12, bias=True)
    batch = Batch(tiny.features(train), tiny.labels(train), torch.arange(100, 100 + train))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(epochs):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch.inputs), batch.labels).backward()
        optimizer.step()
    return model, batch, Batch(tiny.features(targets, seed=9), tiny.labels(targets, seed=9))


def cut(batch, size):
    return [batch.rows(i, i + size) for i in range(0, len(batch), size)]


def test_scores_without_directions_are_those_of_a_plain_solve():
    model, train, targets = problem()
    for residual in (False, True, 0.5):
        influence = Influence(model, method=Gram(0.4, residual, directions=0))
        result = influence.fit(cut(train, 7)).estimate(cut(targets, 2))
        own, others = by_hand(model, train), by_hand(model, targets)
        k = own @ own.T
        system = k + 0.4 * np.diag(k).mean() * np.eye(len(k))
        loss = objectives.cross_entropy(model(train.inputs), train).detach().numpy()
        wrong = (1 - np.exp(-loss)) ** float(residual)
        expected = np.linalg.solve(system, own @ others.T).T * wrong
        np.testing.assert_allclose(result.scores, expected, atol=1e-5 * np.abs(expected).max())
        mean = influence.aggregate(cut(targets, 2))
        np.testing.assert_allclose(
            mean.scores, expected.mean(0), atol=2e-5 * np.abs(expected).max()
        )
        signs = np.resize([1.0, -2.0, 0.5], len(expected))
        weighted = influence.aggregate(cut(targets, 2), weights=signs)
        np.testing.assert_allclose(
            weighted.scores, signs @ expected, atol=2e-5 * np.abs(signs @ expected).max()
        )
        itself = influence.self_influence()
        leverage = np.diag(k @ np.linalg.inv(system)) * wrong
        np.testing.assert_allclose(itself.scores, leverage, atol=1e-5)


def squared(outputs, batch):
    return (outputs[:, 0] - batch.labels.float()).square()


def test_an_objective_of_ones_own_has_no_residual():
    model, train, targets = problem()
    scores = [
        Influence(model, squared, Gram(residual=residual)).fit([train])
        for residual in (None, False)
    ]
    one, other = (each.estimate([targets]).scores for each in scores)
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("features", ["gradients", "masks"])
def test_a_row_of_a_later_batch_that_is_not_finite_is_named(features):
    _, train, _ = problem()
    network = turnover.attach(tiny.mlp(12), "mlp")
    train.inputs[30] = float("nan")
    influence = Influence(network, method=Gram(features=features))
    with pytest.raises(InputError, match=r"NaN or infinite for rows \[2\]"):
        influence.fit(cut(train, 7))


def test_the_training_instance_that_is_the_target_is_on_top():
    model, train, _ = problem()
    for residual in (True, False):
        fitted = Influence(model, method=Gram(residual=residual)).fit([train])
        result = fitted.estimate([train.rows(3, 6)])
        if not residual:
            assert result.train_ids[result.scores.argmax(axis=1)].tolist() == [103, 104, 105]
        assert (result.scores[np.arange(3), np.arange(3, 6)] > 0).all()


def test_positive_is_helpful():
    """A step of training on the instances of high score lowers the target's cost the most."""
    model, train, targets = problem()
    target = targets.rows(0, 1)
    scores = Influence(model, method="gram").fit([train]).estimate([target]).scores[0]
    before = objectives.margin(model(target.inputs), target).item()
    changes = []
    for i in range(len(train)):
        row = train.rows(i, i + 1)
        loss = objectives.cross_entropy(model(row.inputs), row).sum()
        steps = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, step in zip(model.parameters(), steps, strict=True):
                parameter -= 0.01 * step
            changes.append(before - objectives.margin(model(target.inputs), target).item())
            for parameter, step in zip(model.parameters(), steps, strict=True):
                parameter += 0.01 * step
    assert stats.spearmanr(scores, changes).statistic > 0.5


def test_ids_are_rows_where_there_are_none():
    model, train, targets = problem()
    plain = [(part.inputs, part.labels) for part in cut(train, 9)]
    influence = Influence(model, method="gram").fit(plain)
    result = influence.estimate([targets])
    assert result.train_ids.tolist() == list(range(len(train)))
    named = Influence(model, method="gram").fit(cut(train, 9)).estimate([targets])
    np.testing.assert_array_equal(named.scores, result.scores)
    assert result.train_ids.dtype == np.int64
    assert result.considered == len(train) and result.method == "gram"


def test_some_of_the_ids_are_columns_of_all():
    model, train, targets = problem()
    influence = Influence(model, method="gram").fit(cut(train, 9))
    whole, some = influence.estimate([targets]), influence.estimate([targets], [120, 103, 139])
    columns = [20, 3, 39]
    for name in ("scores", "standard_error", "z", "p"):
        np.testing.assert_array_equal(getattr(some, name), getattr(whole, name)[:, columns])
    assert some.train_ids.tolist() == [120, 103, 139] and some.considered == 3
    own = influence.self_influence()
    some = influence.self_influence([train.rows(5, 8)])
    np.testing.assert_array_equal(some.scores, own.scores[5:8])
    assert some.train_ids.tolist() == [105, 106, 107]


def test_top_keeps_both_ends():
    model, train, targets = problem()
    influence = Influence(model, method="gram").fit([train])
    whole, top = influence.estimate([targets]), influence.estimate([targets], top=3)
    order = np.argsort(-whole.scores, axis=1, kind="stable")
    ends = np.concatenate([order[:, :3], order[:, -3:]], axis=1)
    np.testing.assert_array_equal(top.train_ids, whole.train_ids[ends])
    np.testing.assert_array_equal(top.scores, np.take_along_axis(whole.scores, ends, 1))
    np.testing.assert_array_equal(
        top.standard_error, np.take_along_axis(whole.standard_error, ends, 1)
    )
    assert (top.q >= np.take_along_axis(whole.q, ends, 1) - 1e-12).all()


def test_a_stored_result_keeps_its_errors_and_their_distribution(tmp_path):
    model, train, targets = problem()
    influence = Influence(model, method="gram").fit([train])
    for number, result in enumerate(
        (
            influence.estimate([targets]),
            influence.estimate([targets], top=3),
            influence.aggregate([targets]),
            influence.self_influence(),
        )
    ):
        save(tmp_path / f"{number}.zarr", result)
        tiny.assert_same(turnover.open_result(tmp_path / f"{number}.zarr").load(), result)


def test_planted_duplicates_and_wrong_copies_are_found():
    """Copies of a target are the most helpful, copies with another label the most harmful instances."""
    model, train, targets = problem(80, 6)
    train.inputs[:6] = targets.inputs
    train.labels[:6] = targets.labels
    train.inputs[6:12] = targets.inputs
    train.labels[6:12] = (targets.labels + 1) % tiny.CLASSES
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train.inputs), train.labels).backward()
        optimizer.step()
    scores = Influence(model, method="gram").fit([train]).estimate([targets]).scores
    rows = np.arange(6)
    helpful = (scores > scores[rows, rows][:, None]).sum(axis=1)
    harmful = (scores < scores[rows, rows + 6][:, None]).sum(axis=1)
    assert helpful.max() <= 2 and harmful.max() <= 2, "among the three of 80 at either end"


def test_blocks_and_repetition_change_nothing():
    model, train, targets = problem()
    results = [
        Influence(model, method="gram").fit(cut(train, size)).estimate(cut(targets, step))
        for size, step in ((40, 5), (7, 2), (7, 2))
    ]
    np.testing.assert_allclose(results[0].scores, results[1].scores, rtol=1e-4, atol=1e-6)
    tiny.assert_same(results[1], results[2])


def test_every_score_has_an_error():
    model, train, targets = problem()
    result = Influence(model, method="gram").fit([train]).estimate([targets])
    assert result.standard_error.shape == result.scores.shape
    assert (result.standard_error > 0).all()
    np.testing.assert_allclose(result.z, result.scores / result.standard_error, rtol=1e-5)
    expected = 2 * stats.t.sf(np.abs(result.z.astype(float)), result.null.freedom)
    np.testing.assert_allclose(result.p, expected, rtol=1e-4)
    rms = np.sqrt(np.mean(result.standard_error.astype(float) ** 2, axis=1))
    np.testing.assert_allclose(result.noise_floor, rms, rtol=1e-5)
    assert (result.q >= result.p - 1e-12).all()
    mean = Influence(model, method="gram").fit([train]).aggregate([targets])
    assert mean.scores.shape == mean.standard_error.shape == (len(train),)
    assert mean.noise_floor.shape == ()


@pytest.mark.parametrize("freedom", [1, 3, 6.5, 40])
def test_p_values_are_those_of_students_t(freedom):
    z = np.array([0.0, 1e-3, 0.5, -1.0, 2.0, 5.0, -30.0])
    expected = 2 * stats.t.sf(np.abs(z), freedom)
    np.testing.assert_allclose(StudentNull(freedom).p_values(z), expected, rtol=1e-9)


def test_several_networks_are_averaged():
    pairs = [problem(seed=seed) for seed in range(3)]
    models, train, targets = [one[0] for one in pairs], pairs[0][1], pairs[0][2]
    together = Influence(models, method="gram").fit([train]).estimate([targets])
    alone = [Influence(m, method="gram").fit([train]).estimate([targets]) for m in models]
    scores = np.stack([one.scores for one in alone])
    np.testing.assert_allclose(together.scores, scores.mean(axis=0), atol=1e-6)
    raw = scores.std(axis=0, ddof=1) / np.sqrt(3)
    assert stats.spearmanr(together.standard_error, raw, axis=None).statistic > 0.7
    assert together.network == "+".join(one.network for one in alone)


def test_a_turn_over_network_is_scored_whole():
    torch.manual_seed(0)
    model = tiny.mlp(width=32)
    network = turnover.attach(model, "mlp")
    train = Batch(tiny.features(30), tiny.labels(30), torch.arange(30))
    tiny.train(network, train.inputs, train.labels, train.ids, epochs=10)
    targets = Batch(tiny.features(4, seed=2), tiny.labels(4, seed=2))
    scores = Influence(network, method=Gram(residual=0)).fit([train]).estimate([targets]).scores
    with network.exposed(torch.arange(4)):
        influence = Influence(network, method=Gram(residual=0))
        bound = influence.fit([train]).estimate([targets]).scores
    np.testing.assert_array_equal(scores, bound)
    network.detach()
    plain = Influence(model, method=Gram(residual=False)).fit([train]).estimate([targets]).scores
    np.testing.assert_allclose(scores, plain, atol=1e-6)


def test_mask_features_are_inner_products_of_mask_derivatives():
    from turnover.influence.gradients import mask_gradients

    torch.manual_seed(0)
    network = turnover.attach(tiny.mlp(width=32).eval(), "mlp")
    train = Batch(tiny.features(30), tiny.labels(30), torch.arange(30))
    targets = Batch(tiny.features(4, seed=2), tiny.labels(4, seed=2))
    influence = Influence(network, method=Gram(features="masks", residual=0, directions=0))
    result = influence.fit([train]).estimate([targets])
    own, others = (
        mask_gradients(network, objectives.margin, batch).detach().double().numpy()
        for batch in (train, targets)
    )
    k = own @ own.T
    system = k + np.diag(k).mean() * np.eye(len(k))
    expected = np.linalg.solve(system, own @ others.T).T
    np.testing.assert_allclose(result.scores, expected, atol=1e-5 * np.abs(expected).max())


def test_the_model_is_left_as_it_was():
    model, batch = build("conv")
    model.train()
    model.classifier.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with torch.no_grad():
        influence = Influence(model, method="gram").fit([batch])
        influence.estimate([batch])
        influence.self_influence()
    assert torch.equal(state, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(weights[name], v) for name, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_ridge_is_what_the_data_asks_for():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 40, generator=generator, dtype=torch.float64)
    k = features @ features.T
    signal = features @ torch.randn(40, generator=generator, dtype=torch.float64)
    found = []
    for noise in (0.5, 2.0, 8.0):
        y = signal + noise * torch.randn(300, generator=generator, dtype=torch.float64)
        best = noise**2  # weights of variance 1
        for rule in (ridge.gcv, ridge.evidence):
            assert best / 4 < rule(k, y) < best * 4
        found.append(ridge.evidence(k, y))
    assert found == sorted(found)
    assert ridge.scaled(k, 0.5) == pytest.approx(0.5 * float(k.diagonal().mean()))


@pytest.mark.parametrize("rule", ["gcv", "evidence"])
def test_a_rule_for_the_ridge_can_be_asked_for(rule):
    model, train, targets = problem()
    result = Influence(model, method=Gram(ridge=rule)).fit([train]).estimate([targets])
    assert np.isfinite(result.scores).all() and np.ptp(result.scores) > 0


def mean_of_rows(outputs, batch):
    return objectives.margin(outputs, batch) - objectives.margin(outputs, batch).mean()


def detached(outputs, batch):
    return objectives.margin(outputs, batch).detach()


def test_wrong_input_is_refused_by_name():
    model, train, targets = problem()
    influence = Influence(model, method="gram")
    for call in (
        lambda: influence.estimate([targets]),
        lambda: influence.aggregate([targets]),
        influence.self_influence,
    ):
        with pytest.raises(InputError, match="call fit"):
            call()
    with pytest.raises(InputError, match="no training batches"):
        influence.fit([])
    with pytest.raises(InputError, match="1 of 2 training batches have no ids"):
        influence.fit([train, (train.inputs, train.labels)])
    with pytest.raises(InputError, match=r"given twice: \[100"):
        influence.fit([train, train])
    influence.fit([train])
    with pytest.raises(InputError, match=r"not among the fitted instances: \[7\]"):
        influence.estimate([targets], [101, 7])
    with pytest.raises(InputError, match="given twice"):
        influence.estimate([targets], [101, 101])
    with pytest.raises(InputError, match="no targets"):
        influence.estimate([])
    with pytest.raises(InputError, match="do not pass out="):
        influence.estimate([targets], out="somewhere")
    with pytest.raises(InputError, match="plan of gram tries"):
        influence.plan([targets], [101])
    with pytest.raises(InputError, match="masks of a turn-over network"):
        Influence(model, method=Gram(features="masks"))
    for options in (
        {"ridge": "best"},
        {"ridge": 0},
        {"resamples": 5},
        {"residual": -1},
        {"directions": -1},
    ):
        with pytest.raises(InputError, match=next(iter(options))):
            Gram(**options)
    with pytest.raises(InputError, match="give a number, or directions=0"):
        Gram(ridge="gcv", directions=1)
    with pytest.raises(InputError, match="those of class outputs"):
        Influence(model, lambda outputs, batch: outputs[:, 0], Gram(directions=1))
    with pytest.raises(InputError, match="features"):
        Gram(features="all")
    with pytest.raises(InputError, match="given twice"):
        Influence([model, model], method="gram")
    with pytest.raises(InputError, match="same masks and weights"):
        Influence([model, copy.deepcopy(model)], method="gram").fit([train])


def test_what_has_no_gradients_is_refused():
    model, train, _ = problem()
    with pytest.raises(InputError, match="rows of a batch mix"):
        Influence(model, mean_of_rows, "gram").fit([train])
    with pytest.raises(InputError, match="without detach"):
        Influence(model, detached, "gram").fit([train])
    model.requires_grad_(False)
    with pytest.raises(InputError, match="no parameter of the model is trained"):
        Influence(model, method="gram")
    mixing = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(InputError, match="'1' normalizes by the statistics of its batch"):
        Influence(mixing, method="gram")


def test_the_other_methods_have_nothing_to_fit_and_need_masks():
    model, train, targets = problem()
    with pytest.raises(InputError, match="needs the masks"):
        Influence(model, method="linear")
    network = turnover.attach(model, ["1"])
    with pytest.raises(InputError, match="nothing to fit"):
        Influence(network).fit([train])
    with pytest.raises(InputError, match="needs train_ids"):
        Influence(network).estimate([targets])
    with pytest.raises(InputError, match="needs train_batches"):
        Influence(network).self_influence()
