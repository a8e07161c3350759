"""The benchmark of agents: its recordings, its judgments and its tables."""

import json

import numpy as np
import pytest

pytest.importorskip("stable_baselines3", reason="pip install 'turnover[rl]'")
from benchmarks.reinforcement import planted, run, table
from benchmarks.reinforcement.pendulum import FiveTorques, record


def test_the_controller_balances_and_its_opposite_does_not():
    good, bad = (
        np.mean(
            [one.rewards.sum() for one in record(5, np.random.default_rng(0), noise=0.0, bad=b)]
        )
        for b in (False, True)
    )
    assert good > -400 > -900 > bad


@pytest.mark.parametrize("kind", planted.KINDS)
def test_harm_is_planted_in_the_sources_that_are_named(kind):
    found, again = planted.planted(kind, 3), planted.planted(kind, 3)
    env = FiveTorques()
    for source, episodes in enumerate(found.sources):
        harmful = source in found.bad
        assert len(episodes) == (16 if harmful else 4)
        for one, other in zip(episodes, again.sources[source], strict=True):
            np.testing.assert_array_equal(one.observations, other.observations)
            assert (one.rewards.mean() > 0) == (harmful and kind == "rewards")
        first = episodes[0]
        env.reset(seed=0)
        cosine, sine, speed = first.observations[0]
        env.unwrapped.state = np.array([np.arctan2(sine, cosine), speed])
        action = 4 - first.actions[0] if harmful and kind == "actions" else first.actions[0]
        seen, *_ = env.step(action)
        np.testing.assert_allclose(seen, first.observations[1], atol=1e-5)


def test_auc_counts_pairs_and_half_of_the_ties():
    scores = np.zeros(planted.SOURCES)
    assert planted.auc(scores, [0, 1]) == 0.5
    scores[[0, 1]] = 1.0
    assert planted.auc(scores, [0, 1]) == 1.0
    scores[2] = 2.0
    assert planted.auc(scores, [0, 1]) == pytest.approx(0.9)


def test_committed_figures_are_those_of_the_page():
    results = json.loads(run.RESULTS.read_text())["results"]
    page = table.DOCS.read_text()
    assert table.planted_table(results).strip() in page
    assert table.learning_table(results).strip() in page
    assert set(results) <= set(run.jobs(run.PARTS, run.SEEDS))
