"""Recorded episodes, such as those of Minari's datasets, in a model's replay buffer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

from turnover.errors import InputError
from turnover.integrations.sb3.buffer import ExperienceBuffer, Label


class Episode(Protocol):
    """A recorded episode of n steps, as ``minari.EpisodeData``.

    Attributes:
        observations: (n + 1, ...), the last one after the last step.
        actions: (n, ...), as the environment takes them.
        rewards: (n,).
        terminations: (n,), whether a step ended the episode.
        truncations: (n,), whether a step was the last for another reason, such as a time limit.
    """

    observations: Any
    actions: Any
    rewards: Any
    terminations: Any
    truncations: Any


def add_episodes(
    model: OffPolicyAlgorithm,
    buffer: ExperienceBuffer,
    episodes: Iterable[Episode],
    label: Label | None,
) -> int:
    """Check, then add, episodes; returns the number of transitions."""
    if buffer.n_envs != 1:
        raise InputError(
            f"recorded episodes come one by one, and the model has {buffer.n_envs} environments: make "
            f"the model with one"
        )
    if not isinstance(episodes, Iterable):
        raise InputError(f"episodes must be several, such as a list, got {type(episodes).__name__}")
    checked = [_checked(model, one, number) for number, one in enumerate(episodes)]
    steps = sum(len(columns[1]) for columns in checked)
    room = buffer.buffer_size - buffer.size()
    if steps > room:
        raise InputError(
            f"{steps} recorded transitions, and the buffer has room for {room}: make the model with "
            f"buffer_size={buffer.size() + steps} or more"
        )
    before, buffer.label = buffer.label, label
    try:
        for columns in checked:
            _add(buffer, *columns)
    finally:
        buffer.label = before
    return steps


def _add(
    buffer: ExperienceBuffer,
    observations: NDArray[Any],
    actions: NDArray[Any],
    rewards: NDArray[Any],
    ends: NDArray[np.bool_],
    cut: NDArray[np.bool_],
) -> None:
    for step in range(len(actions)):
        now = slice(step, step + 1)
        last = step == len(actions) - 1
        done = np.array([ends[step] or cut[step] or last])
        truncated = bool(done[0] and not ends[step])
        buffer.add(
            observations[now],
            observations[step + 1 : step + 2],
            actions[now],
            rewards[now],
            done,
            [{"TimeLimit.truncated": truncated}],
        )


def _as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _checked(
    model: OffPolicyAlgorithm, episode: Episode, number: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_]]:
    where = f"episode {number}"
    columns = {}
    for name in ("observations", "actions", "rewards", "terminations", "truncations"):
        try:
            columns[name] = np.asarray(getattr(episode, name))
        except (AttributeError, ValueError) as error:
            raise InputError(f"{where} has no array {name!r}, as Minari's have: {error}") from error
        if columns[name].dtype.kind not in "biuf":
            raise InputError(f"{where}: {name} must be numbers, got {columns[name].dtype}")
    if columns["rewards"].ndim != 1:
        raise InputError(f"{where}: rewards must be (steps,), got {columns['rewards'].shape}")
    columns["rewards"] = _as_float32(columns["rewards"])
    steps = len(columns["rewards"])
    space, actions = model.observation_space, columns["actions"]
    shape = (steps + 1, *(space.shape or ()))
    if columns["observations"].shape != shape:
        raise InputError(
            f"{where}: observations of {steps} steps must be {shape}, got "
            f"{columns['observations'].shape}"
        )
    wanted = (steps, *(model.action_space.shape or ()))
    if actions.shape != wanted:
        raise InputError(f"{where}: actions must be {wanted}, got {actions.shape}")
    for name in ("terminations", "truncations"):
        if columns[name].shape != (steps,):
            raise InputError(f"{where}: {name} must be {(steps,)}, got {columns[name].shape}")
    for name in ("observations", "actions", "rewards"):
        if not np.isfinite(columns[name]).all():
            raise InputError(f"{where}: {name} holds NaN or infinite numbers")
    if isinstance(model.action_space, spaces.Box):
        low, high = model.action_space.low, model.action_space.high
        if bool((actions < low - 1e-5).any() or (actions > high + 1e-5).any()):
            raise InputError(f"{where}: actions outside of the model's action space")
        actions = model.policy.scale_action(actions)
    for name, one in (("observations", space), ("actions", model.action_space)):
        if isinstance(one, spaces.Discrete) and not np.isin(columns[name], np.arange(one.n)).all():
            raise InputError(f"{where}: {name} must be whole numbers below {one.n}")
    return (
        columns["observations"],
        actions,
        columns["rewards"],
        columns["terminations"].astype(bool),
        columns["truncations"].astype(bool),
    )
