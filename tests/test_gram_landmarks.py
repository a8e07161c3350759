"""Gram by landmarks: against its own formula on dense matrices, and against all pairs."""

import tempfile

import numpy as np
import pytest
import torch
from scipy import stats

from test_gram import cut, problem
from test_gram_gradients import build, by_hand
from test_gram_language import causal
from test_language_models import passages
from turnover import Batch, Gram, Influence, InputError, objectives
from turnover.influence.gram import features as features_module
from turnover.influence.gram.disk import Limits

RIDGE, ROWS = 0.7, 60


def drawn(rows, landmarks):
    """Positions of the landmarks: the first of a random order by seed 0."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return order[:landmarks].sort().values.numpy()


def by_formula(own, others, places, *, exact):
    """Scores (targets, train) on dense matrices: of gradients of targets and of the training set."""
    marks = own[places]
    values, vectors = np.linalg.eigh(marks @ marks.T)
    large = values > 1e-6 * values[-1]
    project = marks.T @ (vectors[:, large] / np.sqrt(values[large]))
    b, targets = own @ project, others @ project
    ridge = RIDGE * np.square(marks).sum(axis=1).mean()
    rest = np.square(own).sum(axis=1) - np.square(b).sum(axis=1)
    if not exact and len(places) < len(own):
        rest[places] = np.delete(rest, places).mean()
    v = 1 / (rest + ridge)
    missed = (others @ own.T - targets @ b.T) * v
    a = np.eye(len(b.T)) + (b.T * v) @ b
    if not exact:
        solved = targets @ np.linalg.solve(a, b.T)
        own_remainder = np.where(np.isin(np.arange(len(own)), places), 1 / ridge - v, 0)
        return solved * v, missed + solved * own_remainder
    return missed + (targets - missed @ b) @ np.linalg.solve(a, b.T * v), None


def test_landmarks_are_as_influential_as_others():
    """Without remainders, landmarks would score 1.4 times as high as they should beside others."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 2)
    shared = torch.randn((260, 20), generator=generator)
    inputs = shared @ torch.randn((20, 300), generator=generator) / 20**0.5
    inputs += 0.5 * torch.randn(inputs.shape, generator=generator)
    labels = torch.randint(0, 2, (260,), generator=generator)
    train = Batch(inputs[:200], labels[:200], torch.arange(200))
    targets = Batch(inputs[200:], labels[200:])
    inside = drawn(200, 50)

    def share(method):
        found = Influence(model, method=method).fit(cut(train, 40)).estimate([targets]).scores
        sizes = np.sqrt(np.square(found).mean(axis=0))
        return sizes[inside].mean() / np.delete(sizes, inside).mean()

    every = share(Gram())
    assert 0.9 < share(Gram(landmarks=50)) / every < 1.25


def plain(landmarks, **more):
    return Gram(RIDGE, False, directions=0, landmarks=landmarks, **more)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("landmarks", [5, 20, ROWS])
def test_scores_are_those_of_the_formula(landmarks, exact):
    model, train, targets = problem(ROWS)
    influence = Influence(model, method=plain(landmarks, exact=exact)).fit(cut(train, 7))
    own, others = by_hand(model, train), by_hand(model, targets)
    wanted, missed = by_formula(own, others, drawn(ROWS, landmarks), exact=exact)
    found = influence.estimate(cut(targets, 2))
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(found.scores, wanted, atol=3e-3 * scale)
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    total = influence.aggregate(cut(targets, 2), weights=weights)
    np.testing.assert_allclose(total.scores, weights.numpy() @ wanted, atol=1e-2 * scale)
    whole = wanted if exact else wanted + missed
    top = influence.estimate(cut(targets, 2), top=ROWS // 2)
    places = top.train_ids - 100
    np.testing.assert_allclose(
        top.scores, np.take_along_axis(whole, places, axis=1), atol=3e-3 * scale
    )
    np.testing.assert_array_equal(np.sort(places, axis=1), np.arange(ROWS)[None].repeat(5, axis=0))
    assert (np.diff(top.scores, axis=1) <= 0).all()


@pytest.mark.parametrize("objective", [objectives.margin, objectives.cross_entropy])
def test_with_all_as_landmarks_they_are_those_of_all_pairs(objective):
    model, train, targets = problem(ROWS)
    every = Influence(model, objective, "gram").fit(cut(train, 16))
    other = Influence(model, objective, Gram(landmarks=ROWS)).fit(cut(train, 16))
    for call in (
        lambda one: one.estimate([targets]),
        lambda one: one.aggregate([targets]),
        lambda one: one.self_influence(),
    ):
        wanted, found = call(every), call(other)
        np.testing.assert_allclose(
            found.scores, wanted.scores, atol=3e-3 * np.abs(wanted.scores).max()
        )
        ratio = np.median(found.standard_error) / np.median(wanted.standard_error)
        assert 0.6 < ratio < 1.6


@pytest.mark.parametrize("ridge", ["gcv", "evidence"])
def test_a_ridge_is_chosen_by_the_landmarks(ridge):
    model, train, targets = problem(ROWS)
    every = Influence(model, method=Gram(ridge, directions=0)).fit(cut(train, 16))
    other = Influence(model, method=Gram(ridge, directions=0, landmarks=ROWS)).fit(cut(train, 16))
    wanted, found = (one.estimate([targets]).scores for one in (every, other))
    np.testing.assert_allclose(found, wanted, atol=3e-3 * np.abs(wanted).max())
    some = Influence(model, method=Gram(ridge, directions=0, landmarks=30, exact=True))
    found = some.fit(cut(train, 16)).estimate([targets]).scores
    for one, two in zip(found, wanted, strict=True):
        assert stats.pearsonr(one, two).statistic > 0.9


def test_auto_takes_all_pairs_of_few_instances_and_landmarks_of_many():
    model, train, targets = problem(ROWS)
    wanted = Influence(model, method="gram").fit(cut(train, 16)).estimate([targets], top=4)
    influence = Influence(model, method=Gram(landmarks="auto", exact=True))
    found = influence.fit(cut(train, 16)).estimate([targets], top=4)
    np.testing.assert_array_equal(found.scores, wanted.scores)
    np.testing.assert_array_equal(found.standard_error, wanted.standard_error)
    influence._driver._limits = Limits(rows=2 * ROWS - 1)
    influence.fit(cut(train, 16))
    other = Influence(model, method=Gram(landmarks=ROWS, exact=True)).fit(cut(train, 16))
    for call in (
        lambda one: one.estimate([targets]),
        lambda one: one.aggregate([targets]),
        lambda one: one.self_influence(),
    ):
        np.testing.assert_array_equal(call(influence).scores, call(other).scores)


@pytest.mark.parametrize("name", ["convs of every kind", "bert"])
def test_few_landmarks_keep_the_order_of_all_pairs(name):
    model, batch = build(name)
    twice = batch.mapped(lambda values: torch.cat([values, values]))
    train = Batch(twice.inputs, twice.labels, torch.arange(2 * len(batch)))
    every = Influence(model, method="gram").fit(cut(train, 4)).estimate([batch])
    other = Influence(model, method=Gram(landmarks=len(train) - 2, exact=True))
    found = other.fit(cut(train, 4)).estimate([batch])
    for one, two in zip(found.scores, every.scores, strict=True):
        assert stats.pearsonr(one, two).statistic > 0.95


@pytest.mark.parametrize("memory", [0, 2**30])
def test_order_and_size_of_batches_and_where_vectors_are_kept_change_nothing(
    memory, monkeypatch, tmp_path
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(features_module, "_CHUNK", 2**12)
    model, train, targets = problem(ROWS)
    options = Gram(landmarks=20)
    wanted = Influence(model, method=options).fit(cut(train, 60))
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    mixed = Batch(train.inputs[order], train.labels[order], train.ids[order])
    other = Influence(model, method=options)
    other._driver._limits = Limits(memory=memory)
    # The landmarks are those at the same places of the order in which rows came.
    other.fit(cut(train, 7))
    other._driver._passes._train = cut(mixed, 11)
    for top in (None, 8):
        one, two = wanted.estimate([targets], top=top), other.estimate(cut(targets, 2), top=top)
        np.testing.assert_array_equal(one.train_ids, two.train_ids)
        np.testing.assert_allclose(one.scores, two.scores, atol=2e-3 * np.abs(one.scores).max())
        np.testing.assert_allclose(one.standard_error, two.standard_error, rtol=0.05, atol=1e-5)


def test_some_ids_are_columns_of_all():
    model, train, targets = problem(ROWS)
    influence = Influence(model, method=Gram(landmarks=20, exact=True)).fit(cut(train, 7))
    every, some = influence.estimate([targets]), [131, 102, 155]
    found = influence.estimate([targets], some)
    assert found.train_ids.tolist() == some
    np.testing.assert_allclose(
        found.scores, every.scores[:, [31, 2, 55]], atol=1e-6 * np.abs(every.scores).max()
    )
    np.testing.assert_allclose(
        found.standard_error, every.standard_error[:, [31, 2, 55]], rtol=1e-4
    )
    assert found.null == every.null
    np.testing.assert_array_equal(found.noise_floor, every.noise_floor)
    own = influence.self_influence([Batch(train.inputs[3:5], train.labels[3:5], train.ids[3:5])])
    np.testing.assert_array_equal(own.scores, influence.self_influence().scores[3:5])


def test_several_networks_are_averaged_and_their_spread_is_the_error():
    (first, train, targets), (second, _, _) = problem(ROWS), problem(ROWS, seed=3)
    options = Gram(landmarks=20)
    both = Influence([first, second], method=options).fit(cut(train, 9)).estimate([targets])
    alone = [
        Influence(one, method=options).fit(cut(train, 9)).estimate([targets]).scores
        for one in (first, second)
    ]
    scale = np.abs(both.scores).max()
    np.testing.assert_allclose(both.scores, np.mean(alone, axis=0), atol=1e-5 * scale)
    assert both.standard_error.shape == both.scores.shape
    assert (
        stats.spearmanr(both.standard_error.ravel(), np.abs(alone[0] - alone[1]).ravel()).statistic
        > 0.3
    )


def test_standard_errors_grow_with_what_another_training_set_changes():
    model, train, targets = problem(240)
    every = Influence(model, method="gram").fit(cut(train, 60)).estimate([targets])
    found = Influence(model, method=Gram(landmarks=120)).fit(cut(train, 60)).estimate([targets])
    ratio = found.standard_error.mean() / every.standard_error.mean()
    assert 0.6 < ratio < 1.4
    order = stats.spearmanr(found.standard_error.ravel(), every.standard_error.ravel())
    assert order.statistic > 0.5


def test_language_models_are_whitened_by_their_landmarks():
    model = causal("llama")
    train, targets = passages(24), passages(3, seed=5)
    every = Influence(model, objectives.completion, "gram").fit(cut(train, 8))
    marked = Influence(model, objectives.completion, Gram(landmarks=24, exact=True))
    wanted, found = (one.estimate([targets]).scores for one in (every, marked.fit(cut(train, 8))))
    np.testing.assert_allclose(found, wanted, atol=2e-2 * np.abs(wanted).max())


def test_what_cannot_be_done_is_refused():
    model, train, targets = problem(ROWS)
    with pytest.raises(InputError, match="can be gone through once: give a list"):
        Influence(model, method=Gram(landmarks=9)).fit(iter(cut(train, 7)))
    with pytest.raises(InputError, match="at least 8 training instances, got 5"):
        Influence(model, method=Gram(landmarks=9)).fit([train.rows(0, 5)])
    with pytest.raises(InputError, match="no training batches"):
        Influence(model, method=Gram(landmarks=9)).fit([])
    for options, said in (
        ({"landmarks": 1}, "landmarks"),
        ({"landmarks": 9, "samples": 1, "ridge": "gcv"}, "knows no drawn labels"),
        ({"landmarks": "some"}, '"auto" or None'),
        ({"exact": True}, "exact= is for landmarks="),
    ):
        with pytest.raises(InputError, match=said):
            Gram(**options)
    changing = [cut(train, 7)]
    batches = Changing(changing)
    influence = Influence(model, method=Gram(landmarks=9)).fit(batches)
    kept = influence.estimate([targets]).scores
    changing[0] = cut(train, 7)[:-1]
    with pytest.raises(InputError, match="other instances than when they were first"):
        influence.estimate([targets], top=3)
    with pytest.raises(InputError, match="twice"):
        influence.fit([train, train])
    np.testing.assert_array_equal(influence.estimate([targets]).scores, kept)


def test_batches_in_another_order_need_ids():
    model, train, targets = problem(ROWS)
    without = Batch(train.inputs, train.labels)
    for given, refused in ((train, False), (without, True)):
        batches = Changing([cut(given, 10)])
        influence = Influence(model, method=Gram(landmarks=9)).fit(batches)
        wanted = influence.estimate([targets], top=3)
        batches._batches[0] = cut(given, 10)[::-1]
        if refused:
            with pytest.raises(InputError, match="other instances than when they were first"):
                influence.estimate([targets], top=3)
        else:
            again = influence.estimate([targets], top=3)
            np.testing.assert_allclose(again.scores, wanted.scores, rtol=1e-4)
        batches._batches[0] = [*cut(given, 10)[:-1], cut(given, 10)[0]]
        with pytest.raises(InputError, match="other instances than when they were first"):
            influence.estimate([targets], top=ROWS)


def test_a_fit_that_fails_leaves_the_one_before():
    model, train, targets = problem(ROWS)
    influence = Influence(model, method=Gram(landmarks=9))
    influence._driver._limits = Limits(memory=0)
    wanted = influence.fit(cut(train, 10)).estimate([targets], top=4)
    inputs = train.inputs.clone()
    inputs[next(i for i in range(ROWS) if i not in drawn(ROWS, 9))] *= 1e25
    with pytest.raises(InputError, match=r"beyond float32|not finite|NaN"):
        influence.fit(cut(Batch(inputs, train.labels, train.ids), 10))
    again = influence.estimate([targets], top=4)
    np.testing.assert_array_equal(again.scores, wanted.scores)


class Changing:
    """Gives other batches once they are exchanged."""

    def __init__(self, batches):
        self._batches = batches

    def __iter__(self):
        return iter(self._batches[0])


def test_gradients_of_nothing_are_refused():
    model, train, _ = problem(ROWS)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    frozen = torch.nn.Sequential(model, torch.nn.Linear(3, 3))
    torch.nn.init.zeros_(frozen[1].weight)
    frozen[1].weight.requires_grad_(False)
    frozen[1].bias.requires_grad_(False)
    with pytest.raises(InputError, match="all gradients are 0"):
        Influence(frozen, method=Gram(landmarks=9)).fit(cut(train, 20))


def test_a_store_is_refused(tmp_path):
    model, train, targets = problem(ROWS)
    influence = Influence(model, method=Gram(landmarks=9)).fit(cut(train, 20))
    with pytest.raises(InputError, match="keeps its scores in memory"):
        influence.estimate([targets], out=tmp_path / "out.zarr")


def test_labels_that_are_certain_have_no_influence():
    model, train, targets = problem(ROWS)
    with torch.no_grad():
        model[-1].weight.mul_(1e4)
    found = Influence(model, method=Gram(landmarks=20)).fit(cut(train, 20)).estimate([targets])
    assert np.isfinite(found.scores).all() and np.isfinite(found.standard_error).all()
