"""Environments and recordings for tests of agents."""

import types

import gymnasium
import numpy as np
from gymnasium import spaces


class Counting(gymnasium.Env):
    """Observations say which environment, episode and step they are; episodes have 7 steps."""

    made = 0

    def __init__(self, *, discrete=True, length=7):
        self.observation_space = spaces.Box(-1e6, 1e6, (3,), np.float32)
        self.action_space = spaces.Discrete(2) if discrete else spaces.Box(-1, 1, (2,), np.float32)
        self.length = length
        self.number = Counting.made
        self.episode = -1
        Counting.made += 1

    def _seen(self):
        return np.array([self.number, self.episode, self.step_number], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode += 1
        self.step_number = 0
        return self._seen(), {}

    def step(self, action):
        self.step_number += 1
        info = {"source": f"source {self.episode % 3}"}
        return self._seen(), float(np.sum(action)), False, self.step_number == self.length, info


class Reach(gymnasium.Env):
    """Move a point to zero in 12 steps; the return is minus the distances."""

    def __init__(self, *, discrete=True):
        self.observation_space = spaces.Box(-4, 4, (1,), np.float32)
        self.action_space = spaces.Discrete(2) if discrete else spaces.Box(-1, 1, (1,), np.float32)
        self.discrete = discrete

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.steps = float(self.np_random.uniform(-2, 2)), 0
        return np.array([self.at], np.float32), {}

    def step(self, action):
        move = (2 * int(action) - 1) if self.discrete else float(np.asarray(action).reshape(-1)[0])
        self.at = float(np.clip(self.at + 0.3 * move, -4, 4))
        self.steps += 1
        return np.array([self.at], np.float32), -abs(self.at), False, self.steps == 12, {}


def episode(env, random, *, flip=False):
    """An episode of random actions in the form of Minari's; ``flip`` negates its rewards."""
    seen, _ = env.reset(seed=int(random.integers(2**31)))
    observations, actions, rewards, ends, cuts = [seen], [], [], [], []
    while not (ends and (ends[-1] or cuts[-1])):
        if isinstance(env.action_space, spaces.Discrete):
            action = int(random.integers(env.action_space.n))
        else:
            action = random.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        seen, reward, end, cut, _ = env.step(action)
        for column, value in zip(
            (observations, actions, rewards, ends, cuts),
            (seen, action, -reward if flip else reward, end, cut),
            strict=True,
        ):
            column.append(value)
    return types.SimpleNamespace(
        observations=np.stack(observations),
        actions=np.array(actions),
        rewards=np.array(rewards),
        terminations=np.array(ends),
        truncations=np.array(cuts),
    )
