"""A pendulum with five torques, and recordings of it by a controller of known quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

TORQUES = np.linspace(-2.0, 2.0, 5, dtype=np.float32)
STEPS = 200


class FiveTorques(gymnasium.ActionWrapper[Any, Any, Any]):
    """Gymnasium's pendulum with five torques as its actions."""

    def __init__(self) -> None:
        super().__init__(gymnasium.make("Pendulum-v1"))
        self.action_space = spaces.Discrete(len(TORQUES))

    def action(self, action: Any) -> NDArray[np.float32]:
        return TORQUES[int(action) : int(action) + 1]


@dataclass
class Recording:
    """An episode in the form of Minari's."""

    observations: NDArray[np.float32]
    actions: NDArray[np.int64]
    rewards: NDArray[np.float64]
    terminations: NDArray[np.bool_]
    truncations: NDArray[np.bool_]


def controller(observation: NDArray[np.float32], *, bad: bool = False) -> int:
    """Swing up by energy, then balance; a bad one does the opposite."""
    cosine, sine, speed = (float(one) for one in observation)
    angle = np.arctan2(sine, cosine)
    if cosine > 0.85:
        torque = -(10 * angle + 2 * speed)
    else:
        energy = speed**2 / 6 - 5 * (1 - cosine)
        torque = 2.0 if speed * energy <= 0 else -2.0
    if bad:
        torque = -torque
    return int(np.abs(TORQUES - np.clip(torque, -2, 2)).argmin())


def record(
    episodes: int, random: np.random.Generator, *, noise: float, bad: bool = False
) -> list[Recording]:
    """Episodes by the controller, of whose actions a share ``noise`` is random."""
    env = FiveTorques()
    found = []
    for _ in range(episodes):
        seen, _ = env.reset(seed=int(random.integers(2**31)))
        observations, actions, rewards = [seen], [], []
        for _ in range(STEPS):
            action = controller(seen, bad=bad)
            if random.random() < noise:
                action = int(random.integers(len(TORQUES)))
            seen, reward, *_ = env.step(action)
            observations.append(seen)
            actions.append(action)
            rewards.append(float(reward))
        ends = np.zeros(STEPS, dtype=bool)
        cut = ends.copy()
        cut[-1] = True
        found.append(
            Recording(
                np.stack(observations).astype(np.float32),
                np.array(actions),
                np.array(rewards),
                ends,
                cut,
            )
        )
    env.close()
    return found
