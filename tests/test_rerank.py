"""Rerank: where linear and exact differ, what is said of the exact scores is true."""

import numpy as np
import pytest
import torch

import tiny
import turnover
from turnover import Batch, Influence, MaskSpec, objectives

IDS = torch.arange(400) * 31
TARGETS = 20


def narrow(keep=0.5, seed=0, width=24):
    """Narrow, with large weights: its exact scores are far from linear ones."""
    model = tiny.mlp(width)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return turnover.attach(model.eval(), "mlp", MaskSpec(keep, seed=seed))


def targets(rows=TARGETS, seed=0):
    return Batch(tiny.features(rows, seed=seed), tiny.labels(rows, seed))


def estimate(method, network, ids=IDS, batch=None, objective=objectives.cross_entropy, **options):
    top, ghosts = options.pop("top", None), options.pop("ghosts", 1000)
    make = Influence(network, objective, tiny.method(method, **options), ghosts=ghosts)
    return make.estimate([batch or targets()], ids, top=top)


@pytest.mark.parametrize("objective", [objectives.cross_entropy, objectives.margin])
@pytest.mark.parametrize("keep", [0.5, 0.3])
@pytest.mark.parametrize("count", [1, 2, 37, 60])
def test_with_candidates_enough_all_is_exact(count, keep, objective):
    network, ids = narrow(keep), IDS[:count]
    exact = estimate("exact", network, ids, objective=objective, ghosts=20)
    for candidates in (-(-count // 2), 500):
        result = estimate(
            "rerank", network, ids, objective=objective, ghosts=20, candidates=candidates
        )
        np.testing.assert_allclose(result.scores, exact.scores, rtol=1e-5, atol=1e-5)
        assert result.exact.all() and (result.recall == 1).all()


def test_candidates_are_exact_and_the_linear_extremes():
    network = narrow()
    exact, linear = (estimate(m, network).scores for m in ("exact", "linear"))
    result = estimate("rerank", network, candidates=30)
    assert (result.exact.sum(axis=1) == 60).all()
    at = result.exact
    np.testing.assert_allclose(result.scores[at], exact[at], rtol=1e-5, atol=1e-5)
    for row in range(TARGETS):
        order = np.argsort(linear[row])
        assert at[row, order[:30]].all() and at[row, order[-30:]].all()
    assert np.abs(result.scores[~at] - exact[~at]).max() > 0.1  # the methods do differ here
    few = estimate("rerank", network, candidates=30, top=10)
    for row in range(TARGETS):
        chosen = np.flatnonzero(at[row])
        order = chosen[np.argsort(-exact[row, chosen], kind="stable")]
        expected = IDS.numpy()[np.r_[order[:10], order[-10:]]]
        np.testing.assert_array_equal(few.train_ids[row], expected)


def true_recall(exact, candidates, wanted):
    order = np.argsort(exact, axis=1)
    ends = np.concatenate([order[:, :wanted], order[:, -wanted:]], axis=1)
    return np.take_along_axis(candidates, ends, axis=1).mean(axis=1)


@pytest.mark.parametrize("candidates", [10, 25, 60])
@pytest.mark.parametrize(
    ("objective", "keep"),
    [(objectives.cross_entropy, 0.5), (objectives.margin, 0.5), (objectives.margin, 0.3)],
)
def test_the_estimated_recall_is_the_true_one_on_average(objective, keep, candidates):
    estimated, true = [], []
    for seed in range(4):
        network = narrow(keep, seed, width=48)
        batch = targets(30, seed)
        exact = estimate("exact", network, IDS, batch, objective, ghosts=10)
        result = estimate("rerank", network, IDS, batch, objective, candidates=candidates)
        estimated.append(result.recall)
        true.append(true_recall(exact.scores, result.exact, 10))
    estimated, true = np.concatenate(estimated), np.concatenate(true)
    assert 0.2 < true.mean() < 0.97
    assert abs(estimated.mean() - true.mean()) < 0.07, (estimated.mean(), true.mean())
    assert np.corrcoef(estimated, true)[0, 1] > 0.6


@pytest.mark.parametrize("keep", [0.5, 0.3])
@pytest.mark.parametrize("objective", [objectives.cross_entropy, objectives.margin])
def test_its_noise_floor_is_that_of_exact_scores(objective, keep):
    ratios, shifts = [], []
    for seed in range(3):
        network, batch = narrow(keep, seed), targets(TARGETS, seed)
        exact = estimate("exact", network, IDS[:1], batch, objective)
        result = estimate("rerank", network, IDS[:1], batch, objective)
        ratios.append(result.noise_floor / exact.noise_floor)
        shifts.append((result.floor.mean - exact.floor.mean) / exact.floor.sd)
    assert abs(np.mean(ratios) - 1) < 0.04
    assert np.std(ratios) < 0.12
    assert abs(np.mean(shifts)) < 0.08


@pytest.mark.parametrize("networks", [1, 3])
@pytest.mark.parametrize("objective", [objectives.cross_entropy, objectives.margin])
def test_fresh_ghosts_are_false_positives_as_often_as_p_says(objective, networks):
    nets = [narrow(seed=seed, width=48) for seed in range(networks)]
    fresh = turnover.ghost_ids(600, start=1000)
    for candidates in (30, 300):
        result = estimate("rerank", nets, fresh, None, objective, candidates=candidates)
        rate = (result.p < 0.01).mean()
        assert 0.003 < rate < 0.022, (candidates, rate)
        assert (result.q < 0.05).mean() < 0.005


def test_what_is_no_candidate_is_on_the_scale_of_exact_scores():
    slopes, offsets = [], []
    for seed in range(3):
        network, batch = narrow(0.3, seed), targets(TARGETS, seed)
        exact = estimate("exact", network, batch=batch).scores
        result = estimate("rerank", network, batch=batch, candidates=20)
        linear = estimate("linear", network, batch=batch).scores
        for row in range(TARGETS):
            left = ~result.exact[row]
            slope = np.polyfit(result.scores[row, left], exact[row, left], 1)[0]
            slopes.append(slope)
            offsets.append((exact[row, left] - result.scores[row, left]).mean() / exact[row].std())
            raw = np.polyfit(linear[row, left], exact[row, left], 1)[0]
            assert abs(slope - 1) < abs(raw - 1) + 0.5
    assert abs(np.median(slopes) - 1) < 0.12
    assert abs(np.mean(offsets)) < 0.08


def test_a_target_that_no_mask_touches():
    network = narrow()
    with torch.no_grad():
        network.model[4].weight.zero_()
    result = estimate("rerank", network, candidates=5)
    assert (result.scores == 0).all() and (result.q == 1).all()
    assert np.isfinite(result.recall).all()


def test_few_ghosts_and_few_ids():
    result = estimate("rerank", narrow(), IDS[:3], ghosts=10, candidates=1)
    assert result.exact.sum(axis=1).tolist() == [2] * TARGETS
    assert np.isfinite(result.z).all() and np.isfinite(result.recall).all()
