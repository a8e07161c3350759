"""What the measures say of scores that are right, wrong, trivial or noise."""

import math
import time
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

from turnover import InputError, evaluation, objectives
from turnover.evaluation import (
    Recipe,
    Retraining,
    Subsets,
    draw_subsets,
    lds,
    leave_one_out,
    memorization,
    minus_cost,
    mislabel,
    removal_curve,
    retrain,
)

TARGETS, TRAIN, SUBSETS, CLASSES = 12, 80, 60, 4


@pytest.fixture
def drawn():
    return np.random.default_rng(0)


@pytest.fixture
def subsets():
    return draw_subsets(TRAIN, SUBSETS)


def truth_of(drawn, subsets, *, seeds=4, noise=1.0, labels=None, shift=0.0):
    """Scores, and outputs that are their sums over subsets, with noise and class effects."""
    scores = drawn.normal(size=(TARGETS, TRAIN))
    if labels is not None:
        scores += shift * (labels == np.arange(TARGETS)[:, None] % CLASSES)
    sums = subsets.keep @ scores.T  # (subsets, targets)
    outputs = sums[:, None] + noise * drawn.normal(size=(SUBSETS, seeds, TARGETS)) * sums.std()
    return scores, outputs


def test_lds_is_the_mean_of_spearmans_correlations(drawn, subsets):
    scores, outputs = truth_of(drawn, subsets)
    rough = scores + 2 * drawn.normal(size=scores.shape)
    labels = drawn.integers(0, CLASSES, TRAIN)
    result = lds(rough, subsets, outputs, labels=labels)
    expected = [
        spearmanr(subsets.keep @ row, outputs.mean(axis=1)[:, target])[0]
        for target, row in enumerate(rough)
    ]
    np.testing.assert_allclose(result.raw.per_target, expected)
    assert result.raw.mean == pytest.approx(np.mean(expected))
    assert result.raw.low < result.raw.mean < result.raw.high


def test_class_removed_lds_is_that_of_least_squares_residuals(drawn, subsets):
    labels = drawn.integers(0, CLASSES, TRAIN)
    scores, outputs = truth_of(drawn, subsets, labels=labels, shift=2.0)
    design = np.stack([subsets.keep[:, labels == c].sum(axis=1) for c in range(CLASSES)], axis=1)
    design = np.column_stack([np.ones(SUBSETS), design])

    def rest(values):
        return values - design @ np.linalg.lstsq(design, values, rcond=None)[0]

    predicted, truth = rest(subsets.keep @ scores.T), rest(outputs.mean(axis=1))
    expected = [spearmanr(predicted[:, t], truth[:, t])[0] for t in range(TARGETS)]
    result = lds(scores, subsets, outputs, labels=labels)
    np.testing.assert_allclose(result.class_removed.per_target, expected)


def test_same_class_scores_raw_and_nothing_with_class_counts_removed(drawn, subsets):
    labels = drawn.integers(0, CLASSES, TRAIN)
    _, outputs = truth_of(drawn, subsets, labels=labels, shift=4.0, noise=0.2)
    same = (labels == np.arange(TARGETS)[:, None] % CLASSES).astype(np.float32)
    result = lds(same, subsets, outputs, labels=labels)
    assert result.raw.mean > 0.4
    assert result.class_removed.mean == 0


@pytest.mark.parametrize(("seeds", "noise"), [(2, 0.5), (4, 1.0), (5, 2.0)])
def test_the_true_scores_reach_the_ceiling(drawn, seeds, noise):
    subsets = draw_subsets(TRAIN, SUBSETS)
    read, ceilings = [], []
    for _ in range(5):
        scores, outputs = truth_of(drawn, subsets, seeds=seeds, noise=noise)
        result = lds(scores, subsets, outputs, labels=drawn.integers(0, CLASSES, TRAIN))
        read.append([result.raw.mean, result.class_removed.mean])
        ceilings.append([result.raw.ceiling, result.class_removed.ceiling])
    np.testing.assert_allclose(np.mean(read, axis=0), np.mean(ceilings, axis=0), atol=0.04)


def test_one_seed_tells_no_ceiling(drawn, subsets):
    scores, outputs = truth_of(drawn, subsets, seeds=1)
    assert math.isnan(lds(scores, subsets, outputs, labels=np.arange(TRAIN) % 3).raw.ceiling)


def test_scores_of_noise_have_an_interval_around_nothing(drawn, subsets):
    _, outputs = truth_of(drawn, subsets)
    within = 0
    for _ in range(20):
        noise = drawn.normal(size=(TARGETS, TRAIN))
        raw = lds(noise, subsets, outputs, labels=np.arange(TRAIN) % 3).raw
        within += raw.low < 0 < raw.high
    assert within >= 16


def test_a_bootstrap_of_a_hundred_by_a_hundred_takes_seconds_at_most(drawn):
    subsets = draw_subsets(200, 100)
    scores, outputs = drawn.normal(size=(100, 200)), drawn.normal(size=(100, 3, 100))
    start = time.process_time()
    lds(scores, subsets, outputs, labels=np.arange(200) % 10)
    assert time.process_time() - start < 10


def test_lds_refuses_what_does_not_fit(drawn, subsets):
    scores, outputs = truth_of(drawn, subsets)
    labels = np.arange(TRAIN) % 3
    broken = scores.copy()
    broken[2, 3] = np.nan
    for arguments, message in (
        ((scores.T, subsets, outputs), "scores"),
        ((scores, subsets, outputs[:, 0]), "outputs"),
        ((scores, subsets, outputs[:-1]), "outputs"),
        ((broken, subsets, outputs), r"\[2, 3\]"),
        ((scores, Subsets(subsets.keep[:2]), outputs[:2]), "at least 3"),
    ):
        with pytest.raises(InputError, match=message):
            lds(*arguments, labels=labels)
    with pytest.raises(InputError, match="labels"):
        lds(scores, subsets, outputs, labels=labels[1:])


def test_minus_cost_is_the_log_odds_of_the_label(drawn):
    logits = drawn.normal(size=(2, 3, 5, CLASSES)).astype(np.float32)
    labels = torch.tensor([0, 3, 1, 2, 2])
    values = minus_cost(logits, labels)
    share = np.exp(logits) / np.exp(logits).sum(axis=3, keepdims=True)
    right = np.take_along_axis(share, labels.numpy()[None, None, :, None], axis=3)[..., 0]
    np.testing.assert_allclose(values, np.log(right / (1 - right)), rtol=1e-4, atol=1e-5)
    losses = minus_cost(logits, labels, objectives.cross_entropy)
    np.testing.assert_allclose(losses, np.log(right), rtol=1e-4, atol=1e-5)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30).filter(
        lambda rows: 0 < sum(wrong for _, wrong in rows) < len(rows)
    )
)
def test_mislabel_auc_counts_pairs(rows):
    scores = np.array([score for score, _ in rows], dtype=np.float32)
    wrong = np.array([flag for _, flag in rows])
    pairs = [
        (a > b) + 0.5 * (a == b) for a in scores[wrong].tolist() for b in scores[~wrong].tolist()
    ]
    result = mislabel(scores, wrong, at=[1, len(rows)])
    assert result.auc == pytest.approx(np.mean(pairs))
    top = wrong[scores == scores.max()]
    assert result.precision_at[1] == pytest.approx(top.mean())
    assert result.precision_at[len(rows)] == pytest.approx(wrong.mean())


def test_mislabel_looks_at_as_many_as_are_wrong():
    wrong = np.arange(200) < 20
    result = mislabel(-np.arange(200.0), wrong)
    assert result.auc == 1
    assert result.precision_at == {10: 1.0, 20: 1.0, 50: 0.4, 100: 0.2}
    with pytest.raises(InputError, match="0 of 3"):
        mislabel(np.ones(3), np.zeros(3, dtype=np.bool_))
    with pytest.raises(InputError, match=r"scores must be finite, and at \[1\]"):
        mislabel(np.array([0, np.nan]), np.array([True, False]))


def test_memorization_is_the_difference_of_shares_of_right_predictions(drawn):
    subsets = draw_subsets(10, 40)
    labels = drawn.integers(0, 3, 10)
    logits = drawn.normal(size=(40, 2, 10, 3)).astype(np.float32)
    # The first half is right wherever it was trained on; the rest at random.
    for instance in range(5):
        logits[subsets.keep[:, instance], :, instance, labels[instance]] += 100
    result = memorization(subsets, logits, labels, np.arange(10.0)[::-1])
    right = logits.argmax(axis=3) == labels
    for instance in range(10):
        inside = subsets.keep[:, instance]
        expected = right[inside][..., instance].mean() - right[~inside][..., instance].mean()
        assert result.values[instance] == pytest.approx(expected)
    expected = spearmanr(np.arange(10.0)[::-1], result.values)[0]
    assert result.correlation.mean == pytest.approx(expected)
    assert result.correlation.mean > 0.5


def test_memorization_refuses_an_instance_that_is_in_all_subsets(drawn):
    keep = draw_subsets(10, 40).keep.copy()
    keep[:, 7] = True
    logits = np.zeros((40, 1, 10, 3), dtype=np.float32)
    with pytest.raises(InputError, match="instance 7"):
        memorization(Subsets(keep), logits, np.zeros(10, dtype=np.int64), np.zeros(10))


def _linear(seed):
    with torch.random.fork_rng():
        layer = nn.Linear(4, 2)
    nn.init.normal_(layer.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer)


@pytest.fixture
def convex():
    """A logistic regression that is trained to the end, so that one instance's effect shows."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 4, generator=generator)
    y = (x[:, 0] + 0.5 * torch.randn(40, generator=generator) > 0).long()
    recipe = Recipe(epochs=60, learning_rate=0.3, batch_size=40, weight_decay=0.02)
    return x[:30], y[:30], x[30:], y[30:], recipe


def _influence(x, y, on, on_labels, recipe):
    """Influence functions on the margin: float64 (targets, train)."""
    weights = evaluation.train(_linear, x, y, recipe, [0]).states[0]
    w = (weights["0.weight"][1] - weights["0.weight"][0]).double()
    bias = (weights["0.bias"][1] - weights["0.bias"][0]).double()
    z, t = (torch.cat([v.double(), torch.ones(len(v), 1).double()], dim=1) for v in (x, on))
    p = torch.sigmoid(z @ torch.cat([w, bias[None]]))
    hessian = (z * (p * (1 - p))[:, None]).T @ z / len(x) + recipe.weight_decay / 2 * torch.eye(5)
    step = z * (y - p)[:, None] / len(x)
    return ((2 * on_labels - 1)[:, None] * (t @ torch.linalg.solve(hessian, step.T))).numpy()


def test_influence_functions_agree_with_leaving_one_out_of_a_convex_model(convex):
    x, y, on, on_labels, recipe = convex
    scores = _influence(x, y, on, on_labels, recipe)
    instances = [3, 1, 4, 15, 9, 2, 6, 5, 0, 8, 7, 29]
    retraining = Retraining(_linear, x, y, recipe, on, on_labels)
    result = leave_one_out(scores, retraining, instances, [5, 6])
    assert result.effects.shape == result.standard_error.shape == (10, 12)
    assert result.correlation.mean > 0.9
    assert result.correlation.ceiling > 0.9
    keep = np.ones((2, 30), dtype=np.bool_)
    keep[1, 4] = False
    logits = retrain(retraining, Subsets(keep), [5, 6])
    full, without = minus_cost(logits, on_labels).mean(axis=1)
    np.testing.assert_allclose(result.effects[:, 2], full - without, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("together", [False, True])
def test_removing_what_helps_costs_more_than_removing_at_random(convex, together):
    x, y, on, on_labels, recipe = convex
    scores = _influence(x, y, on, on_labels, recipe)
    retraining = Retraining(_linear, x, y, recipe, on, on_labels)
    run = partial(removal_curve, scores, retraining, [3, 6], [5, 6])
    helpful, harmful = run(together=together), run(side="harmful", together=together)
    assert (helpful.change > helpful.random).all()
    assert (harmful.change < harmful.random).all()
    assert helpful.change[1] > helpful.change[0] > 0
    assert helpful.counts == (3, 6) and helpful.standard_error.shape == (2,)


def test_removal_takes_from_each_target_what_helped_it(convex):
    x, y, on, on_labels, recipe = convex
    scores = _influence(x, y, on, on_labels, recipe)
    retraining = Retraining(_linear, x, y, recipe, on, on_labels)
    result = removal_curve(scores, retraining, [2], [5])
    changes = []
    for target, row in enumerate(scores):
        keep = np.ones((2, 30), dtype=np.bool_)
        keep[1, np.argsort(row)[-2:]] = False
        logits = retrain(retraining, Subsets(keep), [5])
        full, without = minus_cost(logits, on_labels)[:, 0, target]
        changes.append(full - without)
    assert result.change[0] == pytest.approx(np.mean(changes), rel=1e-3)
    assert np.isnan(result.standard_error).all()


def test_removal_and_leaving_out_refuse_what_cannot_be_done(convex):
    x, y, on, on_labels, recipe = convex
    scores = np.zeros((10, 30))
    retraining = Retraining(_linear, x, y, recipe, on, on_labels)
    remove = partial(removal_curve, scores, retraining)
    leave = partial(leave_one_out, scores, retraining)
    for call, message in (
        (lambda: remove([30], [1]), "counts"),
        (lambda: remove([3], [1], side="top"), "helpful, harmful"),
        (lambda: leave([1, 2, 2], [1]), "distinct"),
        (lambda: leave([1, 2, 30], [1]), "instances"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(InputError, match="scores"):
        removal_curve(scores.T, retraining, [2], [1])
    with pytest.raises(InputError, match="give target_labels"):
        removal_curve(scores, Retraining(_linear, x, y, recipe, on), [2], [1])
