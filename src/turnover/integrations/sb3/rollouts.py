"""Roll out many sub-networks of an agent at once, each row of a batch in an environment of its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import Tensor
from tqdm import tqdm

from turnover.errors import InputError
from turnover.integrations.sb3.values import first_values

_MOST = 256
"""Environments that run at once."""

Environment = str | gymnasium.Env[Any, Any] | Callable[[], gymnasium.Env[Any, Any]]


class Rollouts(NamedTuple):
    """Episodes of several policies.

    Attributes:
        returns: sums of rewards, float64 (policies, episodes).
        bias: value that the network expects of its first action, minus the discounted rewards that
            came, normalized if the network learned them so: float64 (policies, episodes).
    """

    returns: NDArray[np.float64]
    bias: NDArray[np.float64]


def maker(env: Environment) -> Callable[[], gymnasium.Env[Any, Any]]:
    """A function that makes equal environments."""
    if isinstance(env, str):
        try:
            gymnasium.spec(env)
        except gymnasium.error.Error as error:
            raise InputError(f"env {env!r}: {error}") from error
        return lambda: gymnasium.make(env)
    if isinstance(env, gymnasium.Env):
        spec = env.spec
        if spec is None:
            raise InputError(
                "this environment has no spec to make others from: pass a function that makes one"
            )
        try:
            gymnasium.make(spec).close()
        except ValueError as error:
            raise InputError(
                f"this environment cannot be made again: pass a function that makes one ({error})"
            ) from error
        return lambda: gymnasium.make(spec)
    if not callable(env):
        raise InputError(
            f"env must be an environment's id, an environment, or a function that makes one, got {env!r}"
        )
    return env


def roll_out(
    model: OffPolicyAlgorithm,
    keeping: Callable[[Tensor], Any],
    kept: NDArray[np.bool_],
    env: Environment,
    *,
    episodes: int,
    seed: int,
    progress: bool,
) -> Rollouts:
    """Run episodes of sub-networks, which act without noise; episode e has the same seed for all.

    Args:
        model: the model.
        keeping: context in which each row runs in its own blocks.
        kept: the blocks of each policy, bool (policies, blocks).
        env: what makes the environments.
        episodes: of each policy.
        seed: of the first episode.
        progress: whether to show a bar that counts steps.
    """
    make = maker(env)
    policies = len(kept)
    rows = np.repeat(np.arange(policies), episodes)
    numbers = np.tile(np.arange(episodes), policies)
    returns, bias = np.zeros(len(rows)), np.zeros(len(rows))
    made: list[gymnasium.Env[Any, Any]] = []
    with tqdm(desc="roll out", unit=" steps", disable=not progress) as bar, ExitStack() as stack:
        for first in range(0, len(rows), _MOST):
            part = slice(first, first + _MOST)
            wanted = torch.from_numpy(kept[rows[part]])
            while len(made) < len(wanted):
                made.append(make())
                _check_like(model, made[-1])
                stack.callback(made[-1].close)
            seeds = [seed + int(number) for number in numbers[part]]
            returns[part], bias[part] = _episodes(
                model, keeping, wanted, made[: len(wanted)], seeds, bar
            )
    return Rollouts(returns.reshape(policies, episodes), bias.reshape(policies, episodes))


def _episodes(
    model: OffPolicyAlgorithm,
    keeping: Callable[[Tensor], Any],
    kept: Tensor,
    envs: list[gymnasium.Env[Any, Any]],
    seeds: list[int],
    bar: Any,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One episode in each environment: returns, and the bias of the first values."""
    observations = np.stack(
        [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    )
    running = np.arange(len(envs))
    returns, discounted = np.zeros(len(envs)), np.zeros(len(envs))
    factor = 1.0
    expected: NDArray[np.float64] | None = None
    while len(running):
        shown = _normalized(model, observations)
        with keeping(kept[running]):
            if expected is None:
                expected = first_values(model, shown)
            actions, _ = model.predict(shown, deterministic=True)
        stepped = [envs[row].step(action) for row, action in zip(running, actions, strict=True)]
        rewards = np.array([float(step[1]) for step in stepped])
        returns[running] += rewards
        discounted[running] += factor * _as_learned(model, rewards)
        factor *= model.gamma
        bar.update(len(running))
        going = np.array([not (step[2] or step[3]) for step in stepped])
        observations = np.stack([step[0] for step in stepped])[going]
        running = running[going]
    assert expected is not None
    return returns, expected - discounted


def _normalized(model: OffPolicyAlgorithm, observations: NDArray[Any]) -> NDArray[Any]:
    normalizer = model.get_vec_normalize_env()
    if normalizer is None:
        return observations
    shown = normalizer.normalize_obs(observations)
    assert isinstance(shown, np.ndarray)
    return shown


def _as_learned(model: OffPolicyAlgorithm, rewards: NDArray[np.float64]) -> NDArray[np.float64]:
    normalizer = model.get_vec_normalize_env()
    return rewards if normalizer is None else normalizer.normalize_reward(rewards)


def _check_like(model: OffPolicyAlgorithm, env: gymnasium.Env[Any, Any]) -> None:
    if not isinstance(env, gymnasium.Env):
        raise InputError(f"env's function must return an environment, got {env!r}")
    for name in ("observation_space", "action_space"):
        own, wanted = getattr(env, name), getattr(model, name)
        # Images may have their channels last, which Stable-Baselines3 turns around.
        same = sorted(own.shape or ()) == sorted(wanted.shape or ())
        if (
            type(own) is not type(wanted)
            or not same
            or getattr(own, "n", 0) != getattr(wanted, "n", 0)
        ):
            raise InputError(f"env has the {name} {own}, and the model {wanted}")
