"""Agents of Stable-Baselines3 that learn under masks of their groups of experiences."""

import copy
import functools

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiences import Counting, Reach, episode
from turnover import InputError, MaskSpec

pytest.importorskip("stable_baselines3", reason="pip install 'turnover[rl]'")
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from stable_baselines3.dqn import MlpPolicy

from turnover.integrations import sb3

ALGORITHMS = [DQN, SAC, TD3]
SMALL = {"learning_starts": 10, "buffer_size": 1000, "batch_size": 8, "device": "cpu"}


def make(algorithm, env=None, seed=0, **settings):
    env = env or Reach(discrete=algorithm is DQN)
    more = {**SMALL, "policy_kwargs": {"net_arch": [8, 8]}, **settings}
    if algorithm is DQN:
        more = {"train_freq": 1, "target_update_interval": 3, **more}
    return algorithm("MlpPolicy", env, seed=seed, **more)


def offline(algorithm, *, flip=None, groups=4, updates=15, change=None, **settings):
    """An agent trained on recorded groups, of which one may have negated rewards."""
    model = make(algorithm)
    agent = sb3.attach(model, blocks=12, seed=5, **settings)
    random = np.random.default_rng(0)
    for group in range(groups):
        recorded = [episode(Reach(discrete=algorithm is DQN), random) for _ in range(3)]
        for one in recorded:
            one.rewards = -one.rewards - 1 if group == flip else one.rewards
        agent.add(recorded, label=group)
    if change is not None:
        change(agent)
    torch.manual_seed(1)
    agent.learn_offline(updates, progress=False)
    return agent


def weights(agent):
    """All weights of each block, (blocks, weights), online and target."""
    state = agent.model.policy.state_dict()
    return torch.cat([value.reshape(agent.blocks, -1) for value in state.values()], dim=1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_group_leaves_the_blocks_that_never_learned_it_bit_identical(algorithm):
    one, other = offline(algorithm), offline(algorithm, flip=2)
    learned = torch.from_numpy(one.learned([2])[0])
    assert 0 < learned.sum() < 12
    same = (weights(one) == weights(other)).all(dim=1)
    assert torch.equal(same, ~learned)
    before = weights(offline(algorithm, updates=1))
    assert (before != weights(one)).any(dim=1).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_targets_that_blocks_share_leak_and_the_audit_says_so(algorithm):
    def share(agent):
        for network in agent.targets:
            network._kept = torch.ones(agent.blocks)

    one, other = (offline(algorithm, flip=flip, change=share) for flip in (None, 2))
    learned = torch.from_numpy(one.learned([2])[0])
    assert (weights(one) != weights(other)).any(dim=1)[~learned].all()
    report = one.audit(2, updates=5)
    assert not report.clean and "a leak" in str(report)
    clean = offline(algorithm).audit(2, updates=5)
    assert clean.clean and "a leak" not in str(clean)
    assert np.array_equal(clean.changed, clean.learned)


def test_an_audit_leaves_the_agent_as_it_was():
    agent, twin = offline(SAC), offline(SAC)
    rewards = agent.buffer.rewards.copy()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    torch.manual_seed(3)
    agent.audit(1)
    assert torch.equal(torch.random.get_rng_state(), torch.manual_seed(3).get_state())
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert torch.equal(weights(agent), weights(twin)) and np.array_equal(
        agent.buffer.rewards, rewards
    )
    for one in (agent, twin):
        torch.manual_seed(4)
        one.learn_offline(5, progress=False)
    assert torch.equal(weights(agent), weights(twin))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("environments", [1, 3])
def test_groups_follow_transitions(algorithm, environments):
    Counting.made = 0
    envs = DummyVecEnv([lambda: Counting(discrete=algorithm is DQN)] * environments)
    model = make(algorithm, envs, buffer_size=90)
    agent = sb3.attach(model, groups="episode", blocks=6)
    model.learn(150)
    buffer = agent.buffer
    # Every group is one episode of one environment, and every episode one group, around the ring.
    found = {}
    for step in range(buffer.size()):
        for env in range(environments):
            number, count, _ = buffer.observations[step, env]
            found.setdefault((number, count), set()).add(int(buffer.groups[step, env]))
    assert all(len(groups) == 1 for groups in found.values())
    assert len({min(groups) for groups in found.values()}) == len(found)
    stored = np.bincount(buffer.groups[: buffer.size()].ravel(), minlength=len(agent.labels))
    assert np.array_equal(buffer.counts(), stored) and buffer.full
    assert len(agent.labels) >= 150 // 7


@pytest.mark.parametrize("environments", [1, 3])
def test_groups_of_so_many_transitions(environments):
    envs = DummyVecEnv([Counting] * environments)
    model = make(DQN, envs)
    agent = sb3.attach(model, groups=30, blocks=6)
    model.learn(120)
    assert agent.labels == [0, 1, 2, 3] and agent.buffer.counts().tolist() == [30] * 4


def test_groups_by_a_label_of_the_step():
    model = make(DQN, Counting())
    agent = sb3.attach(model, groups=lambda info: info["source"], blocks=6)
    model.learn(42)
    assert agent.labels == ["source 0", "source 1", "source 2"]
    assert agent.buffer.counts().tolist() == [14, 14, 14]
    again = sb3.attach(make(DQN), groups=lambda info: info["source"], blocks=6)
    assert np.array_equal(agent.learned(), again.learned(agent.labels))


def test_a_label_that_is_no_name_is_refused():
    model = make(DQN, Counting())
    sb3.attach(model, groups=lambda info: 1.5)
    with pytest.raises(InputError, match=r"int or a str.*1\.5"):
        model.learn(5)


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    keep=st.sampled_from([0.1, 0.5, 0.8]),
    seed=st.integers(0, 50),
)
def test_blocks_sample_only_what_they_may_learn(sizes, keep, seed):
    agent = sb3.attach(make(DQN), blocks=5, keep=keep, seed=seed)
    random = np.random.default_rng(seed)
    for group, size in enumerate(sizes):
        for _ in range(size):
            agent.add([episode(Reach(), random)], label=group)
    learned, batch = agent.learned(), 40
    drawn = agent.buffer._positions(batch)
    idle = agent.buffer.idle.numpy()
    assert np.array_equal(idle, ~learned.any(axis=0))
    groups = agent.buffer.groups.ravel()[drawn]
    for block in np.flatnonzero(~idle):
        assert learned[groups[block], block].all()


def test_a_block_samples_its_transitions_evenly():
    agent = sb3.attach(make(DQN), blocks=4, keep=0.5, seed=1)
    random = np.random.default_rng(0)
    for group in range(6):
        agent.add([episode(Reach(), random)], label=group)
    drawn = agent.buffer._positions(20_000)
    learned = agent.learned()
    for block in range(4):
        counts = np.bincount(drawn[block], minlength=72).reshape(6, 12)
        mine = learned[:, block]
        assert not counts[~mine].any()
        expected = 20_000 / (12 * mine.sum())
        assert np.abs(counts[mine] - expected).max() < 6 * expected**0.5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_block_that_may_learn_nothing_stays_as_it_is(algorithm):
    agent = offline(algorithm, groups=1, updates=1)
    before = weights(agent)
    learned = torch.from_numpy(agent.learned()[0])
    assert 0 < learned.sum() < 12
    agent.learn_offline(10, progress=False)
    # Targets that follow weights which stand still move by a rounding error.
    changed = ((weights(agent) - before).abs() > 1e-6).any(dim=1)
    assert torch.equal(changed, learned)


def test_gradients_are_those_of_a_block_trained_alone():
    blocks = sb3.attach(make(DQN), blocks=3).online[0].blocks
    inputs = torch.randn(3 * 8, 1)
    blocks.apart(inputs).square().mean().backward()
    both = [parameter.grad.clone() for parameter in blocks.parameters()]
    optimizer = torch.optim.SGD(blocks.parameters(), lr=0.0)
    from turnover.integrations.sb3.networks import ByBlock

    ByBlock(3, max_norm=1e-3)(optimizer)
    clipped = [parameter.grad for parameter in blocks.parameters()]
    for block in range(3):
        blocks.zero_grad()
        own = blocks.apart(inputs)[8 * block : 8 * block + 8]
        own.square().mean().backward()
        alone = [parameter.grad[block].clone() for parameter in blocks.parameters()]
        for mine, shared in zip(alone, both, strict=True):
            torch.testing.assert_close(mine, 3 * shared[block])
        total = torch.stack([one.norm() for one in alone]).norm()
        for mine, found in zip(alone, clipped, strict=True):
            torch.testing.assert_close(
                mine * (1e-3 / (total + 1e-6)), found[block], atol=1e-9, rtol=1e-4
            )


def test_every_block_of_sac_tunes_its_own_entropy():
    agent = offline(SAC, updates=1)
    actor = agent.model.policy.actor
    data = agent.buffer.sample(8)
    actor.train()
    torch.manual_seed(0)
    _, weighted = actor.action_log_prob(data.observations)
    log_prob = weighted.detach() / actor.log_ent_coef.detach().exp().repeat_interleave(8)
    gradient = torch.autograd.grad(weighted.mean(), actor.log_ent_coef)[0]
    target = agent.model.target_entropy
    wanted = -(log_prob + target).reshape(12, 8).sum(dim=1) / 96
    torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-4)
    assert agent.model.ent_coef_tensor.item() == 1
    assert any("entropy" in change for change in agent.changes)


def test_a_fixed_entropy_coefficient_stays():
    model = make(SAC, ent_coef=0.3)
    sb3.attach(model, blocks=4)
    model.learn(30)
    assert float(model.ent_coef_tensor) == pytest.approx(0.3)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_targets_follow_their_own_blocks(algorithm):
    agent = offline(algorithm)
    online = agent.online if algorithm is not SAC else agent.online[:2]
    assert len(agent.targets) == len(online)
    if algorithm is DQN:
        agent.learn_offline(3 - agent.model._n_calls % 3, progress=False)
        pairs = zip(online[0].parameters(), agent.targets[0].parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    for one, other in zip(online, agent.targets, strict=True):
        assert [p.shape for p in one.parameters()] == [p.shape for p in other.parameters()]


def test_without_acts_by_the_blocks_that_never_learned_the_groups():
    agent = offline(TD3, keep=0.5)
    blocks, seen = agent.online[-1].blocks, torch.randn(5, 1)
    learned = agent.learned()
    for groups in ([0], [1, 3]):
        kept = ~learned[groups].any(axis=0)
        wanted = torch.tanh(blocks.each(seen)[:, kept].mean(dim=1))
        with agent.without(groups):
            found, _ = agent.model.predict(seen.numpy(), deterministic=True)
        np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-5)
    with agent.without(0):
        one = agent.model.predict(seen.numpy(), deterministic=True)[0]
    with agent.without([0]):
        np.testing.assert_array_equal(one, agent.model.predict(seen.numpy(), deterministic=True)[0])


def test_learning_without_a_group_samples_none_of_it():
    agent = offline(DQN, keep=0.5)
    drawn = []
    sample = agent.buffer.sample
    agent.buffer.sample = lambda *args, **more: (
        drawn.append(agent.buffer._positions(20)) or sample(*args, **more)
    )
    with agent.without(2):
        agent.model.learn(40)
    groups = agent.buffer.groups.ravel()[np.concatenate(drawn)]
    active = ~agent.buffer.idle.numpy()
    assert len(drawn) and not (groups.reshape(len(drawn), 12, -1)[:, active] == 2).any()
    agent.buffer.sample = sample
    assert agent.buffer.without == frozenset()


def test_groups_that_all_blocks_learned_or_nobody_knows_are_refused():
    agent = offline(DQN)
    with pytest.raises(InputError, match="every one of 12 blocks"), agent.without([0, 1, 2, 3]):
        pass
    with pytest.raises(InputError, match="no group 'x'; groups: 0, 1, 2, 3"), agent.without("x"):
        pass
    with pytest.raises(InputError, match="at least one"), agent.keeping(torch.zeros(12)):
        pass


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_save_and_load_continue_bit_by_bit(algorithm, tmp_path):
    agent = offline(algorithm)
    agent.save(tmp_path / "agent")
    agent.save(tmp_path / "agent")
    again = sb3.attach(make(algorithm, seed=9), blocks=12, seed=5)
    again.load(tmp_path / "agent")
    assert again.labels == agent.labels and again.model.num_timesteps == agent.model.num_timesteps
    for one in (agent, again):
        torch.manual_seed(2)
        one.learn_offline(7, progress=False)
    assert torch.equal(weights(agent), weights(again))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_other_settings_and_damaged_folders_are_refused_and_nothing_changes(tmp_path):
    agent = offline(DQN)
    agent.save(tmp_path / "agent")
    for settings_, word in (
        ({"blocks": 10}, "blocks 12"),
        ({"seed": 6}, "spec"),
        ({"keep": 0.5}, "spec"),
        ({"groups": 20}, "groups"),
        ({"widths": [4, 4]}, "other"),
        ({"activation_fn": torch.nn.Tanh}, "activation 'ReLU'"),
        ({"optimizer_class": torch.optim.SGD}, "optimizer 'Adam'"),
    ):
        given = {"net_arch": [8, 8]}
        given |= {name: settings_.pop(name) for name in [*settings_] if "_" in name}
        model = make(DQN, policy_kwargs=given)
        other = sb3.attach(model, **{"blocks": 12, "seed": 5, **settings_})
        before = weights(other).clone()
        with pytest.raises(InputError, match=word if word != "other" else "is .* needed"):
            other.load(tmp_path / "agent")
        assert torch.equal(weights(other), before) and not other.labels
    whole = (tmp_path / "agent" / "agent.safetensors").read_bytes()
    changed = whole.replace(b"exp_avg_sq", b"exp_avg_sQ")
    (tmp_path / "agent" / "agent.safetensors").write_bytes(changed)
    fresh = sb3.attach(make(DQN), blocks=12, seed=5)
    with pytest.raises(InputError, match="not the file that was saved"):
        fresh.load(tmp_path / "agent")
    (tmp_path / "agent" / "agent.safetensors").write_bytes(whole[:-50])
    fresh = sb3.attach(make(DQN), blocks=12, seed=5)
    with pytest.raises(InputError, match="damaged"):
        fresh.load(tmp_path / "agent")
    (tmp_path / "agent" / "agent.json").write_text("{}")
    with pytest.raises(InputError):
        fresh.load(tmp_path / "agent")
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="no saved agent"):
        agent.save(tmp_path / "other")


def test_what_would_mix_groups_is_refused_by_name():
    late = make(DQN)
    late.learn(20)
    for model, words in (
        (PPO("MlpPolicy", Reach()), "on-policy"),
        (late, "before learn"),
        (make(SAC, use_sde=True), "use_sde"),
        (make(DQN, n_steps=3), "n_steps=3"),
        (
            make(
                DQN,
                optimize_memory_usage=True,
                replay_buffer_kwargs={"handle_timeout_termination": False},
            ),
            "optimize_memory_usage",
        ),
    ):
        with pytest.raises(InputError, match=words):
            sb3.attach(model)
    with pytest.raises(InputError, match="blocks must be"):
        sb3.attach(make(DQN), blocks=1)
    with pytest.raises(InputError, match="number of transitions"):
        sb3.attach(make(DQN), groups="day")

    class Deeper(MlpPolicy):
        pass

    with pytest.raises(InputError, match="Deeper"):
        sb3.attach(DQN(Deeper, Reach(), buffer_size=10))
    attached = make(DQN)
    sb3.attach(attached)
    with pytest.raises(InputError, match="attached already"):
        sb3.attach(attached)


def test_normalizers_are_named_as_a_leak():
    model = make(DQN, VecNormalize(DummyVecEnv([Reach])))
    agent = sb3.attach(model, groups=12, blocks=12, keep=0.5)
    assert "VecNormalize" in repr(agent)
    model.learn(60)
    found = agent.influence(Reach, episodes=2, ghosts=20, progress=False)
    assert np.isfinite(found.whole)


def test_recorded_episodes_that_do_not_fit_are_refused_and_none_is_added():
    agent = sb3.attach(make(SAC, buffer_size=30), blocks=4)
    random = np.random.default_rng(0)
    good = episode(Reach(discrete=False), random)

    def broken(**changes):
        other = copy.copy(good)
        for name, value in changes.items():
            setattr(other, name, value)
        return other

    for bad, words in (
        (broken(observations=good.observations[:-1]), "observations of 12 steps"),
        (broken(actions=good.actions[:, 0]), "actions must be"),
        (broken(actions=good.actions + 5), "outside"),
        (broken(rewards=good.rewards * np.nan), "NaN"),
        (broken(terminations=good.terminations[:-1]), "terminations"),
        (broken(rewards=good.rewards[:, None]), "rewards must be"),
        (broken(rewards=good.rewards * 1e39), "infinite"),
        (broken(actions=good.actions.astype(str)), "actions must be numbers"),
        (object(), "no array"),
    ):
        with pytest.raises(InputError, match=words):
            agent.add([good, bad])
    for wrong in (good, 3):
        with pytest.raises(InputError, match="episodes must be several"):
            agent.add(wrong)
    chooser, choice = sb3.attach(make(DQN), blocks=4), episode(Reach(), random)
    for action in (2, -1, 0.5):
        choice.actions = np.full(12, action)
        with pytest.raises(InputError, match="whole numbers below 2"):
            chooser.add([choice])
    with pytest.raises(InputError, match=r"36 recorded transitions.*buffer_size=36"):
        agent.add([good] * 3)
    with pytest.raises(InputError, match="empty"):
        agent.learn_offline(1)
    assert agent.buffer.stored() == 0 and agent.add([good], label="a") == 12


def test_recorded_actions_are_scaled_and_time_limits_do_not_end_the_future():
    agent = sb3.attach(make(SAC), blocks=4)
    random = np.random.default_rng(0)
    good = episode(Reach(discrete=False), random)
    agent.add([good], label="a")
    data = agent.buffer.at(np.arange(12))
    np.testing.assert_allclose(data.actions.numpy(), good.actions, atol=1e-6)
    assert not data.dones.any()
    good.terminations = good.truncations
    agent.add([good], label="b")
    assert agent.buffer.at(np.arange(24)).dones.ravel().tolist() == [0.0] * 23 + [1.0]


def test_minari_datasets_are_recordings(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    minari = pytest.importorskip("minari", reason="pip install 'minari[hdf5]'")
    from minari.data_collector import EpisodeBuffer

    random = np.random.default_rng(0)
    recorded = [EpisodeBuffer(id=number, **vars(episode(Reach(), random))) for number in range(3)]
    dataset = minari.create_dataset_from_buffers("test/reach-v0", recorded, env=Reach())
    agent = sb3.attach(make(DQN), blocks=6)
    assert (
        agent.add(minari.load_dataset("test/reach-v0").iterate_episodes(), label="recorded") == 36
    )
    assert agent.buffer.counts().tolist() == [36] and len(dataset) == 3


def test_masks_are_those_of_the_spec():
    agent = offline(DQN)
    spec = MaskSpec(keep=0.8, seed=5, balanced=False)
    wanted = spec.exposed(torch.arange(4), "each_output", 12).numpy()
    assert np.array_equal(agent.learned(), wanted)
    assert np.array_equal(agent.buffer.exposed(), wanted.T)


def test_numbered_groups_keep_clear_of_labels_of_recordings():
    random = np.random.default_rng(0)
    for groups, label, wanted in (("episode", 1, [1, 2, 3, 4]), (20, 0, [0, 1, 2])):
        agent = sb3.attach(make(DQN, buffer_size=200), groups=groups, blocks=6)
        agent.add([episode(Reach(), random)], label=label)
        agent.model.learn(36)
        assert agent.labels == wanted and agent.buffer.counts()[0] == 12


def test_numbered_groups_go_on_after_loading(tmp_path):
    agent = sb3.attach(make(DQN), groups=20, blocks=6)
    agent.add([episode(Reach(), np.random.default_rng(0))], label=0)
    agent.model.learn(16)
    agent.save(tmp_path / "agent")
    again = sb3.attach(make(DQN), groups=20, blocks=6)
    again.load(tmp_path / "agent")
    for one in (agent, again):
        one.model.learn(8, reset_num_timesteps=False)
        assert one.labels == [0, 1, 2]
    assert np.array_equal(agent.buffer.counts(), again.buffer.counts())


def test_an_episode_that_a_new_learn_cuts_off_is_a_group_of_its_own():
    agent = sb3.attach(make(DQN), groups="episode", blocks=6)
    for _ in range(2):
        agent.model.learn(8)
    assert agent.labels == [0, 1] and agent.buffer.counts().tolist() == [8, 8]


def test_labels_are_whole_numbers_or_texts():
    recorded = [episode(Reach(), np.random.default_rng(0))]
    agent = sb3.attach(make(DQN), blocks=6)
    for label in (1.5, True, -3, 2**63, ("a",), np.float32(1)):
        with pytest.raises(InputError, match="a label must be"):
            agent.add(recorded, label=label)
    assert not agent.labels and not agent.buffer.stored()
    agent.add(recorded, label=np.int64(5))
    with pytest.raises(InputError, match="several"):
        agent.learned("robot")
    assert type(agent.labels[0]) is int and (agent.learned() == agent.learned([5])).all()
    with pytest.raises(InputError, match=r"no group 1\.5"), agent.without(1.5):
        pass


def test_contexts_without_groups_add_up():
    agent = offline(DQN, keep=0.3)
    seen = torch.randn(5, 1)
    with agent.without([0, np.int64(3)]):
        wanted = agent.online[0](seen)
    with agent.without(0):
        with agent.without(np.int64(3)):
            assert torch.equal(agent.online[0](seen), wanted)
        assert not torch.equal(agent.online[0](seen), wanted)


def test_training_offline_does_not_silence_what_is_learned_later(capsys):
    agent = sb3.attach(make(DQN, verbose=1), blocks=6)
    agent.add([episode(Reach(), np.random.default_rng(0))], label="a")
    agent.learn_offline(2, progress=False)
    agent.model.learn(30, log_interval=1)
    assert "total_timesteps" in capsys.readouterr().out


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, functools.partial(torch.optim.SGD)])
def test_optimizers_of_the_user_keep_groups_apart(algorithm, kind):
    policy = {
        "net_arch": [8],
        "optimizer_class": kind,
        "optimizer_kwargs": {"weight_decay": 0.5},
    }
    agent = sb3.attach(make(algorithm, policy_kwargs=policy), blocks=8, keep=0.5, groups=12)
    agent.model.learn(60)
    assert agent.audit(1).clean
    if algorithm is SAC:
        decays = [group["weight_decay"] for group in agent.model.actor.optimizer.param_groups]
        assert decays == [0.5, 0.0]


def test_optimizers_and_activations_that_blocks_would_share_are_refused():
    for policy, words in (
        ({"optimizer_class": torch.optim.Adafactor}, "Adafactor mixes"),
        ({"activation_fn": torch.nn.PReLU}, "PReLU has weights"),
    ):
        with pytest.raises(InputError, match=words):
            sb3.attach(make(DQN, policy_kwargs=policy))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_deep_copy_learns_as_its_original(algorithm):
    kind = {"optimizer_class": torch.optim.SGD, "net_arch": [8]}
    agent = sb3.attach(make(algorithm, policy_kwargs=kind, learning_rate=0.1), blocks=12, seed=5)
    agent.add([episode(Reach(discrete=algorithm is DQN), np.random.default_rng(0))], label=0)
    twin = copy.deepcopy(agent)
    for one in (agent, twin):
        torch.manual_seed(4)
        one.learn_offline(5, progress=False)
    assert torch.equal(weights(agent), weights(twin))


@pytest.mark.parametrize("algorithm", [SAC, TD3])
def test_actions_may_have_several_dimensions(algorithm):
    env = Counting(discrete=False)
    env.action_space = gymnasium.spaces.Box(-1, 1, (2, 3), np.float32)
    agent = sb3.attach(make(algorithm, env), groups=10, blocks=6)
    agent.model.learn(30)
    assert agent.model.predict(np.zeros(3, np.float32))[0].shape == (2, 3)


def test_a_block_that_diverged_does_not_reach_agents_without_it():
    agent = offline(DQN)
    with torch.no_grad():
        agent.online[0].blocks.weights[0][3] = torch.nan
    kept = np.arange(12) != 3
    with agent.keeping(kept):
        assert agent.online[0](torch.randn(5, 1)).isfinite().all()
    with agent.keeping(~kept):
        assert agent.online[0](torch.randn(5, 1)).isnan().all()


def test_a_replaced_replay_buffer_is_noticed(tmp_path):
    agent = offline(DQN)
    agent.model.save_replay_buffer(tmp_path / "buffer")
    agent.model.load_replay_buffer(tmp_path / "buffer")
    with pytest.raises(InputError, match="was replaced"):
        agent.learn_offline(1)


def test_settings_that_are_no_numbers_are_refused():
    for settings_, words in (
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "8"}, "batch_size"),
        ({"widths": 16}, "widths"),
    ):
        with pytest.raises(InputError, match=words):
            sb3.attach(make(DQN), **settings_)
    assert sb3.attach(make(DQN), groups=np.int64(5)).buffer.grouping == 5
    with pytest.raises(InputError, match="updates"):
        offline(DQN).audit(0, updates=0)
