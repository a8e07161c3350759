"""Save and continue an agent: weights, optimizers, experiences and groups, as safetensors and JSON."""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from turnover.errors import InputError
from turnover.integrations.sb3.buffer import ExperienceBuffer
from turnover.io.files import replace_folder, writing_to
from turnover.io.parsing import damage, read_json, write_json
from turnover.io.tensors import check_finite, opened, read_weights

if TYPE_CHECKING:
    from turnover.integrations.sb3.agent import Agent

_WEIGHTS, _DESCRIPTION = "agent.safetensors", "agent.json"
_COUNTERS = ("num_timesteps", "_n_updates", "_n_calls", "_episode_num", "exploration_rate")
_ARRAYS = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "groups")


def memory(agent: Agent) -> dict[str, Any]:
    """A copy of what training changes, experiences aside."""
    return {
        "policy": {name: one.clone() for name, one in agent.model.policy.state_dict().items()},
        "optimizers": [copy.deepcopy(one.state_dict()) for one in _optimizers(agent)],
        "counters": _counters(agent),
        "random": copy.deepcopy(agent.buffer.random.bit_generator.state),
        "idle": agent.buffer.idle.clone(),
    }


def restore(agent: Agent, before: dict[str, Any]) -> None:
    """Undo training since :func:`memory`."""
    agent.model.policy.load_state_dict(before["policy"])
    for optimizer, state in zip(_optimizers(agent), before["optimizers"], strict=True):
        optimizer.load_state_dict(copy.deepcopy(state))
    for name, value in before["counters"].items():
        setattr(agent.model, name, value)
    agent.buffer.random.bit_generator.state = copy.deepcopy(before["random"])
    agent.buffer.idle.copy_(before["idle"])


def save(agent: Agent, folder: Path) -> None:
    """Write an agent's folder: see ``Agent.save``."""
    from safetensors.torch import save_file

    if folder.exists() and not (folder / _DESCRIPTION).is_file():
        raise InputError(f"{folder} exists and is no saved agent: give another folder")
    buffer = agent.buffer
    tensors = {f"policy.{name}": one for name, one in agent.model.policy.state_dict().items()}
    tensors |= _optimizer_tensors(agent)
    size = buffer.size()
    for name in _ARRAYS:
        tensors[f"buffer.{name}"] = torch.from_numpy(getattr(buffer, name)[:size].copy())
    description = {
        **_settings(agent),
        "counters": _counters(agent),
        "labels": buffer.labels,
        "position": buffer.pos,
        "full": buffer.full,
        "added": buffer.added,
        "episodes": buffer._episodes.tolist(),
        "stretch": buffer._stretch,
        "random": buffer.random.bit_generator.state,
        "rates": [one.param_groups[0]["lr"] for one in _optimizers(agent)],
    }
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    with writing_to(folder):
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        try:
            stored = {name: one.detach().cpu().contiguous() for name, one in tensors.items()}
            save_file(stored, draft / _WEIGHTS)
            description["tensors"] = _digest(draft / _WEIGHTS)
            write_json(draft / _DESCRIPTION, description, sealed=True)
            replace_folder(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def load(agent: Agent, folder: Path) -> None:
    """Read an agent's folder: see ``Agent.load``. Everything is checked before anything changes."""
    path = folder / _DESCRIPTION
    found = read_json(path)
    for name, own in _settings(agent).items():
        if found.get(name) != own:
            raise InputError(
                f"{folder} holds an agent with {name} {found.get(name)!r}, and this one has {own!r}: make "
                f"and attach the model as the saved one was"
            )
    weights = folder / _WEIGHTS
    policy = {f"policy.{name}": one for name, one in agent.model.policy.state_dict().items()}
    read = read_weights(weights, policy, prefix="policy.")
    with damage(path):
        labels = [one if isinstance(one, str) else int(one) for one in found["labels"]]
        position, full, added = int(found["position"]), bool(found["full"]), int(found["added"])
        episodes = np.array(found["episodes"], dtype=np.int64)
        stretch, label = map(int, found["stretch"])
        counters = {name: found["counters"][name] for name in _counters(agent)}
        rates = [float(rate) for rate in found["rates"]]
        random = np.random.default_rng()
        random.bit_generator.state = found["random"]
        size = agent.buffer.buffer_size if full else position
        if found["tensors"] != _digest(weights):
            raise ValueError(f"{_WEIGHTS} is not the file that was saved with it")
        if len(set(labels)) < len(labels) or not 0 <= position < agent.buffer.buffer_size:
            raise ValueError("a group twice, or a position outside of the buffer")
    arrays = _read_arrays(weights, agent.buffer, size, len(labels))
    states = _read_optimizers(agent, weights, rates)
    agent.model.policy.load_state_dict({name[len("policy.") :]: one for name, one in read.items()})
    for optimizer, state in zip(_optimizers(agent), states, strict=True):
        optimizer.load_state_dict(state)
    for name, value in counters.items():
        setattr(agent.model, name, value)
    agent.buffer.restore(
        arrays,
        labels,
        position,
        full=full,
        added=added,
        episodes=episodes,
        stretch=(stretch, label),
    )
    agent.buffer.random = random


def _settings(agent: Agent) -> dict[str, Any]:
    """What a saved agent and the one that continues it have in common, as JSON values."""
    buffer = agent.buffer
    return {
        "algorithm": type(agent.model).__name__,
        "blocks": buffer.blocks,
        "spec": buffer.spec.to_dict(),
        "environments": buffer.n_envs,
        "buffer_size": buffer.buffer_size,
        "groups": buffer.grouping if isinstance(buffer.grouping, int | str) else "a function",
        "activation": type(agent.online[0].blocks.activation).__name__,
        "optimizer": type(_optimizers(agent)[0]).__mro__[1].__name__,
    }


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _counters(agent: Agent) -> dict[str, Any]:
    return {name: getattr(agent.model, name) for name in _COUNTERS if hasattr(agent.model, name)}


def _optimizers(agent: Agent) -> list[torch.optim.Optimizer]:
    policy: Any = agent.model.policy
    if hasattr(policy, "q_net"):
        return [policy.optimizer]
    return [policy.actor.optimizer, policy.critic.optimizer]


def _optimizer_tensors(agent: Agent) -> dict[str, Tensor]:
    found = {}
    for number, optimizer in enumerate(_optimizers(agent)):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    found[f"optimizer.{number}.{index}.{key}"] = value
    return found


def _read_optimizers(agent: Agent, path: Path, rates: list[float]) -> list[dict[str, Any]]:
    states = []
    with opened(path) as tensors:
        names = [name for name in tensors.keys() if name.startswith("optimizer.")]  # noqa: SIM118
        for number, optimizer in enumerate(_optimizers(agent)):
            state = optimizer.state_dict()
            shapes = [one.shape for group in optimizer.param_groups for one in group["params"]]
            state["state"] = {}
            for name in names:
                _, of, index, key = name.split(".", 3)
                if int(of) != number:
                    continue
                value = tensors.get_tensor(name)
                check_finite(path, name, value)
                if value.dim() and value.shape != shapes[int(index)]:
                    raise InputError(f"{path}: {name} is {tuple(value.shape)}: damaged")
                state["state"].setdefault(int(index), {})[key] = value
            for group in state["param_groups"]:
                group["lr"] = rates[number]
            states.append(state)
    return states


def _read_arrays(
    path: Path, buffer: ExperienceBuffer, size: int, groups: int
) -> dict[str, np.ndarray[Any, Any]]:
    arrays = {}
    with opened(path) as tensors:
        for name in _ARRAYS:
            own = getattr(buffer, name)
            value = tensors.get_tensor(f"buffer.{name}").numpy()
            if value.shape != (size, *own.shape[1:]) or value.dtype != own.dtype:
                raise InputError(
                    f"{path}: {name} is {value.dtype} {value.shape} where {own.dtype} "
                    f"{(size, *own.shape[1:])} is needed: damaged, or of other spaces"
                )
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise InputError(f"{path}: {name} holds NaN or infinite numbers")
            arrays[name] = value
    numbers = arrays["groups"]
    if size and not (numbers.min() >= 0 and numbers.max() < groups):
        raise InputError(f"{path}: a transition of a group that is not listed: damaged")
    return arrays
