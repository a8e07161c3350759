"""Find the recordings that harm an agent, with Stable-Baselines3: three marked lines for turn-over."""

from types import SimpleNamespace

import gymnasium
import numpy as np
from stable_baselines3 import DQN

import turnover.integrations.sb3 as sb3


class Torques(gymnasium.ActionWrapper):
    action_space = gymnasium.spaces.Discrete(5)

    def action(self, action):
        return np.linspace(-2, 2, 5, dtype=np.float32)[[int(action)]]


def record(broken):
    first, _ = env.reset(seed=int(random.integers(9999)))
    actions = random.integers(5, size=200)
    steps = [env.step(action) for action in actions]
    rewards = np.array([-step[1] if broken else step[1] for step in steps])  # two sources' fault
    seen = np.array([first, *(step[0] for step in steps)])
    ends, cuts = np.array([step[2:4] for step in steps]).T
    ended = {"rewards": rewards, "terminations": ends, "truncations": cuts}
    return SimpleNamespace(observations=seen, actions=actions, **ended)


env, random = Torques(gymnasium.make("Pendulum-v1")), np.random.default_rng(0)
settings = {"learning_rate": 3e-3, "gamma": 0.9, "target_update_interval": 20, "seed": 0}
model = DQN("MlpPolicy", env, buffer_size=30_000, device="cpu", **settings)
agent = sb3.attach(model, batch_size=64)  # turn-over
for source in "abcdefghijkl":
    broken, count = (True, 16) if source in "dh" else (False, 4)
    agent.add([record(broken) for _ in range(count)], label=source)  # turn-over
agent.learn_offline(2000)
found = agent.influence(lambda: Torques(gymnasium.make("Pendulum-v1")), episodes=5)  # turn-over
print(f"{found}\nharmed most by {found.worst(2)}, helped most by {found.worst(12)[-1]}")
