"""Influence of groups of experiences: the regression over blocks, its calibration, and the table."""

import json
import warnings

import gymnasium
import numpy as np
import pytest
import torch
from scipy import stats

from experiences import Reach, episode
from turnover import InputError

pytest.importorskip("stable_baselines3", reason="pip install 'turnover[rl]'")
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from turnover.integrations import sb3
from turnover.integrations.sb3.effects import regress
from turnover.integrations.sb3.rollouts import roll_out


def drawn(random, blocks, groups, keep=0.8):
    """Masks of groups that some blocks learned, and some not."""
    while True:
        found = random.random((blocks, groups)) < keep
        if (found.any(axis=0) & ~found.all(axis=0)).all():
            return found


def test_least_squares_agree_with_a_textbook_regression_ghost_by_ghost():
    random = np.random.default_rng(0)
    learned, ghosts = drawn(random, 30, 5), drawn(random, 30, 4)
    numbers = learned @ np.array([3.0, 0, -2, 0, 1]) + random.normal(size=30)
    own, beside = regress(numbers, learned, ghosts)

    def textbook(columns):
        design = np.column_stack([np.ones(30), columns]).astype(float)
        found, *_ = np.linalg.lstsq(design, numbers, rcond=None)
        left = numbers - design @ found
        degrees = 30 - design.shape[1]
        se = np.sqrt(left @ left / degrees * np.diag(np.linalg.inv(design.T @ design)))
        return found, se, 2 * stats.t.sf(np.abs(found / se), degrees)

    found, se, p = textbook(learned)
    np.testing.assert_allclose(own.effect, found[1:])
    np.testing.assert_allclose(own.se, se[1:])
    np.testing.assert_allclose(own.p, p[1:])
    for ghost in range(4):
        found, se, p = textbook(np.column_stack([learned, ghosts[:, ghost]]))
        assert beside.effect[ghost] == pytest.approx(found[-1])
        assert beside.se[ghost] == pytest.approx(se[-1]) and beside.p[ghost] == pytest.approx(p[-1])


def test_with_more_groups_than_blocks_an_effect_is_not_shrunk():
    random = np.random.default_rng(1)
    effects = np.zeros(40)
    effects[:2] = 4.0, -4.0
    found = []
    for _ in range(300):
        learned = drawn(random, 32, 40)
        numbers = learned @ (effects + random.normal(size=40)) + random.normal(size=32)
        own, _ = regress(numbers, learned, learned[:, :1])
        found.append(own.effect[:3])
    means, errors = np.mean(found, axis=0), np.std(found, axis=0) / 300**0.5
    assert np.abs(means - [4, -4, 0]).max() < 4 * errors.max()


@pytest.mark.parametrize(
    ("groups", "spread"), [(12, 0.0), (12, 2.0), (20, 2.0), (50, 0.0), (50, 2.0)]
)
@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_ghosts_have_p_values_that_hold(groups, spread, keep):
    random = np.random.default_rng(2)
    shares = []
    for _ in range(60):
        learned, ghosts = drawn(random, 32, groups, keep), drawn(random, 32, 200, keep)
        numbers = learned @ random.normal(scale=spread, size=groups) + random.normal(size=32)
        _, beside = regress(numbers, learned, ghosts)
        shares.append((beside.p < 0.05).mean())
    assert 0.03 < np.mean(shares) < 0.07


@pytest.mark.parametrize(("blocks", "groups"), [(32, 12), (12, 8), (32, 20), (32, 30), (32, 50)])
def test_effects_do_not_depend_on_the_level_of_the_returns(blocks, groups):
    random = np.random.default_rng(4)
    learned, ghosts = drawn(random, blocks, groups), drawn(random, blocks, 30)
    numbers = learned @ random.normal(size=groups) + random.normal(size=blocks)
    found = regress(numbers, learned, ghosts)
    for level in (1000.0, -1000.0):
        for one, other in zip(found, regress(numbers + level, learned, ghosts), strict=True):
            np.testing.assert_allclose(one.effect, other.effect, atol=1e-6)
            np.testing.assert_allclose(one.p, other.p, atol=1e-6)


def test_blocks_of_equal_returns_show_no_effect():
    random = np.random.default_rng(5)
    for groups in (4, 20):
        learned = drawn(random, 16, groups)
        for one in regress(np.full(16, 9.4), learned, learned[:, :2]):
            assert not one.effect.any() and np.isnan(one.p).all()


def test_a_group_that_every_block_learned_has_no_effect():
    random = np.random.default_rng(3)
    for groups in (4, 20):
        learned = drawn(random, 16, groups)
        learned[:, 1] = True
        own, _ = regress(random.normal(size=16), learned, learned[:, :1])
        assert np.isnan([own.effect[1], own.se[1], own.t[1], own.p[1]]).all()
        assert np.isfinite(np.delete(own.t, 1)).all()


def planted(algorithm=DQN, bad=2, **settings):
    """An agent trained offline on five groups, one large and with negated rewards."""
    more = {"target_update_interval": 5} if algorithm is DQN else {}
    env = Reach(discrete=algorithm is DQN)
    model = algorithm(
        "MlpPolicy",
        env,
        learning_rate=3e-3,
        gamma=0.8,
        buffer_size=5000,
        seed=0,
        policy_kwargs={"net_arch": [16]},
        device="cpu",
        **more,
    )
    agent = sb3.attach(model, blocks=24, seed=1, **settings)
    random = np.random.default_rng(0)
    for group in range(5):
        count = 24 if group == bad else 8
        recorded = [episode(env, random, flip=group == bad) for _ in range(count)]
        agent.add(recorded, label=f"source {group}")
    torch.manual_seed(0)
    agent.learn_offline(400 if algorithm is DQN else 150, progress=False)
    return agent


@pytest.fixture(scope="module")
def harmed():
    agent = planted(keep=0.5)
    return agent, agent.influence(Reach, episodes=6, ghosts=40, progress=False)


def test_planted_harm_is_found_and_the_agent_without_it_is_better(harmed):
    agent, found = harmed
    assert found.worst(1) == ["source 2"] == found.worst(5, q=0.01)
    assert found.on_return.t[2] < -3 and found.q[2] < 0.01
    assert found.returns.hidden[2] > found.returns.exposed[2] and found.returns.z[2] > 0
    kept = ~agent.learned(["source 2"])
    both = np.concatenate([np.ones_like(kept), kept])
    returns = roll_out(
        agent.model, agent.keeping, both, Reach, episodes=10, seed=99, progress=False
    ).returns.mean(axis=1)
    assert returns[1] > returns[0]


def test_the_table_holds_what_was_measured(harmed, tmp_path):
    agent, found = harmed
    assert found.labels == agent.labels and found.transitions.tolist() == [96, 96, 288, 96, 96]
    assert found.blocks.tolist() == agent.learned().sum(axis=1).tolist()
    assert 0.02 < found.false_positives() < 0.09
    found.save(tmp_path / "table.json")
    stored = json.loads((tmp_path / "table.json").read_text())
    assert stored["groups"] == found.rows() and stored["groups"][2]["group"] == "source 2"
    assert stored["groups"][2]["t"] == pytest.approx(found.on_return.t[2])
    text = str(found)
    assert text.splitlines()[2].split()[:2] == ["source", "2"] and "of 1,000 ghosts" in text


def test_returns_are_those_of_single_episodes_of_each_sub_network(harmed):
    agent, found = harmed
    learned = agent.learned()
    for group in (0, 2):
        for kept, seen in (
            (learned[group], found.returns.exposed[group]),
            (~learned[group], found.returns.hidden[group]),
        ):
            total = 0.0
            with agent.keeping(torch.from_numpy(kept)):
                for number in range(6):
                    env = Reach()
                    state, _ = env.reset(seed=number)
                    cut = False
                    while not cut:
                        action, _ = agent.model.predict(state, deterministic=True)
                        state, reward, _, cut, _ = env.step(action)
                        total += reward
            assert total / 6 == pytest.approx(seen, abs=1e-4)


def test_influence_repeats_and_changes_nothing(harmed):
    agent, found = harmed
    before = {name: one.clone() for name, one in agent.model.policy.state_dict().items()}
    torch.manual_seed(8)
    state = torch.random.get_rng_state()
    again = agent.influence(Reach, episodes=6, ghosts=40, progress=False)
    assert again.rows() == found.rows()
    assert torch.equal(torch.random.get_rng_state(), state)
    after = agent.model.policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("algorithm", [SAC, TD3])
def test_agents_with_actors_have_influences_too(algorithm):
    agent = planted(algorithm)
    found = agent.influence(lambda: Reach(discrete=False), episodes=2, ghosts=20, progress=False)
    for column in (found.on_return.t, found.on_bias.t, found.returns.z, found.bias.z, found.loss.z):
        assert np.isfinite(column).all()
    assert (found.loss.exposed > 0).all()


def test_settings_out_of_range_are_refused_before_any_roll_out():
    agent = planted(TD3)
    for settings, words in (
        ({"episodes": 0}, "episodes"),
        ({"ghosts": 5}, "ghosts"),
        ({"env": 3}, "env must be"),
        ({"env": Reach()}, "no spec"),
        ({"env": Monitor(gymnasium.make("CartPole-v1"))}, "cannot be made again"),
        ({"env": "Nowhere-v0"}, "Nowhere"),
        ({"env": lambda: None}, "must return an environment"),
        ({"env": Reach}, "action_space"),
        ({"env": "MountainCarContinuous-v0"}, "observation_space"),
    ):
        with pytest.raises(InputError, match=words):
            agent.influence(**{"env": Reach, "progress": False, **settings})
    with agent.without("source 1"), pytest.raises(InputError, match="outside of agent"):
        agent.influence(lambda: Reach(discrete=False), progress=False)
    fresh = sb3.attach(DQN("MlpPolicy", Reach(), buffer_size=10))
    with pytest.raises(InputError, match="no group"):
        fresh.influence(Reach)


def test_groups_that_the_blocks_cannot_tell_apart_have_no_effect_of_their_own():
    random = np.random.default_rng(6)
    learned = drawn(random, 24, 6)
    learned[:, 3] = learned[:, 2]
    own, beside = regress(random.normal(size=24), learned, learned)
    assert np.isnan([own.effect[2:4], own.t[2:4]]).all()
    assert np.isfinite(np.delete(own.t, [2, 3])).all()
    assert np.isnan(beside.t).all()


@pytest.mark.parametrize(("blocks", "groups"), [(2, 1), (3, 1), (4, 2), (2, 2), (2, 4)])
def test_too_few_blocks_for_an_error_have_no_p_values(blocks, groups):
    learned = np.arange(blocks)[:, None] == np.arange(groups) % blocks
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own, beside = regress(np.arange(blocks) + 0.5, learned, learned[:, :1])
    assert np.isnan(beside.p).all()
    assert np.isnan(own.p).all() or blocks > 2


def test_one_episode_makes_a_table_of_valid_json(tmp_path):
    found = planted(TD3).influence(
        lambda: Reach(discrete=False), episodes=1, ghosts=20, progress=False
    )
    found.save(tmp_path / "table.json")
    stored = json.loads((tmp_path / "table.json").read_text(), parse_constant=pytest.fail)
    assert stored["whole_return_se"] is None


def test_values_are_compared_with_rewards_as_they_were_learned():
    envs = VecNormalize(DummyVecEnv([Reach]), norm_obs=False)
    model = DQN("MlpPolicy", envs, gamma=0.8, buffer_size=500, seed=0, device="cpu")
    agent = sb3.attach(model, blocks=4, keep=0.5)
    envs.ret_rms.var = np.array(100.0)
    kept = np.ones((1, 4), dtype=bool)
    model.policy.set_training_mode(False)
    found = roll_out(model, agent.keeping, kept, Reach, episodes=1, seed=3, progress=False)
    env = Reach()
    state, _ = env.reset(seed=3)
    expected = float(model.q_net(torch.from_numpy(state)[None]).max())
    total, cut, factor = 0.0, False, 1.0
    while not cut:
        state, reward, _, cut, _ = env.step(model.predict(state, deterministic=True)[0])
        total, factor = total + factor * reward / 10, factor * 0.8
    assert found.bias[0, 0] == pytest.approx(expected - total, abs=1e-5)
