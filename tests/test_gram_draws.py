"""Gram by landmarks with drawn labels: against its formula on dense matrices, and against all pairs."""

import numpy as np
import pytest
import torch
from scipy import stats

from test_gram import cut, problem
from test_gram_gradients import by_hand
from test_gram_landmarks import drawn
from test_gram_language import causal
from test_gram_stored import Failing, assert_same, everything, rows
from test_language_models import passages
from turnover import Gram, Influence, InputError, objectives
from turnover.influence.gram import coordinates as coordinates_module
from turnover.influence.gram import landmarks as landmarks_module
from turnover.influence.gram import stored as stored_module
from turnover.influence.gram.capture import Capture
from turnover.influence.gram.disk import Limits

RIDGE, ROWS, DRAWS = 0.7, 60, 2


def made(model, objective=objectives.cross_entropy, **options):
    return Influence(model, objective, Gram(RIDGE, samples=DRAWS, **options))


def of_drawn_labels(model, batch):
    """Gradients of drawn labels: float64 (rows, draws, parameters)."""
    capture = Capture(model, objectives.cross_entropy, residuals=False, samples=DRAWS)
    parts = capture.rows(batch, training=True).parts.values()
    found = torch.cat([part.explicit() for part in parts], dim=1)
    return found.view(len(batch), 1 + DRAWS, -1)[:, 1:].double().numpy()


def by_formula(own, held, others, places, *, exact):
    """Scores (targets, train), and of each instance on itself, through approximate inner products."""
    count, draws, _ = held.shape
    marks = np.concatenate([own[places], held[places].reshape(-1, own.shape[1])])
    values, vectors = np.linalg.eigh(marks @ marks.T)
    large = values > 1e-6 * values[-1]
    project = marks.T @ (vectors[:, large] / np.sqrt(values[large]))
    ridge = RIDGE * np.square(held[places]).sum(axis=2).mean()
    flat = held.reshape(count * draws, -1)
    b, h, t = own @ project, flat @ project, others @ project
    of_one = np.kron(np.eye(count), np.ones((draws, draws))) > 0
    of_own = np.kron(np.eye(count), np.ones((draws, 1))) > 0
    by_held = np.where(of_one, flat @ flat.T, h @ h.T)
    with_own = np.where(of_own, flat @ own.T, h @ b.T)
    solved = np.linalg.solve(by_held + draws * ridge * np.eye(len(flat)), with_own)
    to_own, to_held = (others @ own.T, others @ flat.T) if exact else (t @ b.T, t @ h.T)
    itself = np.square(own).sum(axis=1) - np.einsum("hn,hn->n", with_own, solved)
    return (to_own - to_held @ solved) / ridge, itself / ridge


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("landmarks", [5, 20, ROWS])
def test_scores_are_those_of_the_formula(landmarks, exact):
    model, train, targets = problem(ROWS)
    objective = objectives.cross_entropy
    own, others = by_hand(model, train, objective), by_hand(model, targets, objective)
    held = of_drawn_labels(model, train)
    wanted, itself = by_formula(own, held, others, drawn(ROWS, landmarks), exact=exact)
    influence = made(model, landmarks=landmarks, exact=exact).fit(cut(train, 7))
    scale = np.abs(wanted).max()
    found = influence.estimate(cut(targets, 2))
    np.testing.assert_allclose(found.scores, wanted, atol=3e-3 * scale)
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    total = influence.aggregate(cut(targets, 2), weights=weights)
    np.testing.assert_allclose(total.scores, weights.numpy() @ wanted, atol=1e-2 * scale)
    top = influence.estimate(cut(targets, 2), top=ROWS // 2)
    places = top.train_ids - 100
    np.testing.assert_array_equal(np.sort(places, axis=1), np.arange(ROWS)[None].repeat(5, axis=0))
    assert (np.diff(top.scores, axis=1) <= 0).all()
    if exact:
        ranked = np.take_along_axis(wanted, places, axis=1)
        np.testing.assert_allclose(top.scores, ranked, atol=3e-3 * scale)
    np.testing.assert_allclose(
        influence.self_influence().scores, itself, atol=3e-3 * np.abs(itself).max()
    )


class Single(landmarks_module.Features):
    """Vectors that are kept in single precision."""

    def __init__(self, *given):
        super().__init__(*given)
        self._values = self._values.astype(np.float32)


class Unrounded(coordinates_module.Rounded):
    """Vectors as they are."""

    @classmethod
    def of(cls, vectors):
        return cls(vectors, torch.ones(vectors.shape[:2]))


@pytest.mark.parametrize("exact", [False, True])
def test_with_all_as_landmarks_they_are_those_of_all_pairs(exact, monkeypatch):
    model, train, targets = problem(ROWS)
    every = made(model).fit(cut(train, 16))
    rounded = made(model, landmarks=ROWS, exact=exact).fit(cut(train, 16))
    monkeypatch.setattr(landmarks_module, "Features", Single)
    monkeypatch.setattr(coordinates_module, "Rounded", Unrounded)
    monkeypatch.setattr(coordinates_module, "_SMALLEST", 1e-8)
    whole = made(model, landmarks=ROWS, exact=exact).fit(cut(train, 16))
    for call in (
        lambda one: one.estimate([targets]),
        lambda one: one.aggregate([targets]),
        lambda one: one.self_influence(),
    ):
        wanted = call(every)
        scale = np.abs(wanted.scores).max()
        for one, tolerance in ((rounded, 3e-3), (whole, 1e-4)):
            found = call(one)
            np.testing.assert_allclose(found.scores, wanted.scores, atol=tolerance * scale)
            ratio = np.median(found.standard_error) / np.median(wanted.standard_error)
            assert 0.6 < ratio < 1.6


def correlations(one, two):
    return [stats.pearsonr(*pair).statistic for pair in zip(one, two, strict=True)]


def test_a_tenth_as_landmarks_keeps_the_order_of_all_pairs():
    model, train, targets = problem(240)
    every = made(model).fit(cut(train, 20))
    for exact, least in ((False, 0.96), (True, 0.98)):
        some = made(model, landmarks=24, exact=exact).fit(cut(train, 20))
        one, two = (each.estimate([targets]).scores for each in (every, some))
        assert min(correlations(one, two)) > least
        one, two = (each.self_influence().scores for each in (every, some))
        assert stats.pearsonr(one, two).statistic > 0.98


def test_language_models_keep_as_much_as_without_drawn_labels():
    model, texts, prompts = causal("llama"), passages(160), passages(6, seed=5)
    for exact, least in ((False, 0.3), (True, 0.75)):
        kept = []
        for samples in (0, DRAWS):
            scores = [
                Influence(model, objectives.completion, Gram(samples=samples, **more))
                .fit(cut(texts, 20))
                .estimate([prompts])
                .scores
                for more in ({}, {"landmarks": 16, "exact": exact})
            ]
            kept.append(np.mean(correlations(*scores)))
        assert kept[1] > max(least, kept[0] - 0.05)


def test_standard_errors_are_like_those_of_all_pairs():
    model, train, targets = problem(240)
    every = made(model).fit(cut(train, 60))
    some = made(model, landmarks=60).fit(cut(train, 60))
    for call in (lambda one: one.estimate([targets]), lambda one: one.self_influence()):
        one, two = (call(each).standard_error.ravel() for each in (every, some))
        assert 0.8 < two.mean() / one.mean() < 1.25
        assert stats.spearmanr(one, two).statistic > 0.5


@pytest.mark.parametrize("after", [0, 4, 8])
def test_an_interrupted_fit_continues_to_the_same_bits(tmp_path, after, monkeypatch):
    from turnover.influence.gram import kernel

    monkeypatch.setattr(stored_module, "_CHUNK", 2**9)
    monkeypatch.setattr(kernel, "_ROWS", 30)
    model, train, targets = problem(ROWS)
    batches, place = cut(train, 7), tmp_path / "fit"
    wanted = everything(made(model, landmarks=15).fit(batches), targets)
    with pytest.raises(KeyboardInterrupt):
        made(model, landmarks=15).fit(Failing(batches, after), out=place)
    assert rows(place) < ROWS
    again = made(model, landmarks=15).fit(batches, out=place)
    assert_same(everything(again, targets), wanted)
    read = made(model, landmarks=15).fit(batches, out=place)
    assert_same(everything(read, targets), wanted)
    exact = made(model, landmarks=15, exact=True).fit(batches, out=place)
    other = made(model, landmarks=15, exact=True).fit(batches)
    assert_same(everything(exact, targets), everything(other, targets))
    for samples in (0, 1):
        options = Gram(RIDGE, samples=samples, directions=0, landmarks=15)
        with pytest.raises(InputError, match="options"):
            Influence(model, objectives.cross_entropy, options).fit(batches, out=place)


def test_further_instances_are_added(tmp_path):
    model, train, targets = problem(ROWS)
    batches, place, other = cut(train, 10), tmp_path / "fit", tmp_path / "other"
    found = []
    for steps in ((3, 4, 6), (3, 6)):
        folder = (place, other)[len(found)]
        for step in steps:
            influence = made(model, landmarks=15).fit(batches[:step], out=folder)
        found.append(everything(influence, targets))
    for one, two in zip(*found, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5 * np.abs(two).max())


def test_auto_takes_landmarks_of_many_gradients():
    model, train, targets = problem(ROWS)
    influence = made(model, landmarks="auto", exact=True)
    wanted = made(model).fit([train]).estimate([targets])
    assert_same([influence.fit([train]).estimate([targets]).scores], [wanted.scores])
    influence._driver._limits = Limits(rows=3 * ROWS - 1)
    found = influence.fit([train]).estimate([targets]).scores
    other = made(model, landmarks=ROWS, exact=True).fit([train])
    assert_same([found], [other.estimate([targets]).scores])


def test_several_networks_are_averaged():
    (first, train, targets), (second, _, _) = problem(ROWS), problem(ROWS, seed=3)
    both = made([first, second], landmarks=20).fit(cut(train, 9))
    alone = [made(one, landmarks=20).fit(cut(train, 9)) for one in (first, second)]
    for call in (lambda one: one.estimate([targets]), lambda one: one.self_influence()):
        found, wanted = call(both).scores, np.mean([call(one).scores for one in alone], axis=0)
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
