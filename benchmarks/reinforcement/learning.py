"""Whether agents of blocks learn as well as plain ones, and what they take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from turnover.integrations import sb3

Json = dict[str, Any]


def _cartpole(seed: int) -> OffPolicyAlgorithm:
    """The settings of RL Baselines3 Zoo."""
    return DQN(
        "MlpPolicy",
        gymnasium.make("CartPole-v1"),
        learning_rate=2.3e-3,
        batch_size=64,
        buffer_size=100_000,
        learning_starts=1000,
        gamma=0.99,
        target_update_interval=10,
        train_freq=256,
        gradient_steps=128,
        exploration_fraction=0.16,
        exploration_final_eps=0.04,
        policy_kwargs={"net_arch": [256, 256]},
        seed=seed,
        device="cpu",
    )


def _pendulum_sac(seed: int) -> OffPolicyAlgorithm:
    env = gymnasium.make("Pendulum-v1")
    return SAC("MlpPolicy", env, learning_rate=1e-3, seed=seed, device="cpu")


def _pendulum_td3(seed: int) -> OffPolicyAlgorithm:
    noise = NormalActionNoise(np.zeros(1), 0.1 * np.ones(1))
    env = gymnasium.make("Pendulum-v1")
    return TD3("MlpPolicy", env, learning_rate=1e-3, action_noise=noise, seed=seed, device="cpu")


def _cheetah(seed: int) -> OffPolicyAlgorithm:
    return SAC("MlpPolicy", gymnasium.make("HalfCheetah-v5"), seed=seed, device="cpu")


TASKS: dict[str, tuple[Callable[[int], OffPolicyAlgorithm], int]] = {
    "CartPole, DQN": (_cartpole, 50_000),
    "Pendulum, SAC": (_pendulum_sac, 10_000),
    "Pendulum, TD3": (_pendulum_td3, 10_000),
    "HalfCheetah, SAC": (_cheetah, 50_000),
}
PARTS = 10


def learn(task: str, blocks: bool, seed: int) -> Json:
    """Learn a task in ten parts, and evaluate after each: returns, and processor seconds of learning."""
    make, steps = TASKS[task]
    model = make(seed)
    agent = sb3.attach(model, groups=steps // 20, seed=seed) if blocks else None
    test = Monitor(gymnasium.make(model.env.envs[0].spec.id))  # type: ignore[union-attr]
    returns, seconds = [], 0.0
    for part in range(PARTS):
        start = time.process_time()
        model.learn(steps // PARTS, reset_num_timesteps=part == 0, log_interval=1_000_000)
        seconds += time.process_time() - start
        test.reset(seed=1000 * seed + part)
        mean, _ = evaluate_policy(model, test, n_eval_episodes=10)
        returns.append(float(np.mean(mean)))
    found: Json = {"returns": returns, "seconds": seconds}
    if agent is not None:
        found["blocks"], found["batch_size"] = agent.blocks, model.batch_size
    return found
