"""Action values of an agent's networks, and their temporal-difference errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import Tensor


@torch.no_grad()
def first_values(model: OffPolicyAlgorithm, observations: NDArray[Any]) -> NDArray[np.float64]:
    """The value that the open sub-networks expect of their own action: float64 (rows,)."""
    policy: Any = model.policy
    seen, _ = policy.obs_to_tensor(observations)
    if isinstance(model, DQN):
        values = policy.q_net(seen).amax(dim=1)
    else:
        actions = (
            policy.actor(seen, deterministic=True) if isinstance(model, SAC) else policy.actor(seen)
        )
        values = torch.cat(policy.critic(seen, actions), dim=1).amin(dim=1)
    found: NDArray[np.float64] = values.double().cpu().numpy()
    return found


@torch.no_grad()
def targets(model: OffPolicyAlgorithm, data: ReplayBufferSamples) -> Tensor:
    """What the open target networks bootstrap by the open policy, without noise or entropy: (rows,)."""
    policy: Any = model.policy
    if isinstance(model, DQN):
        after = policy.q_net_target(data.next_observations).amax(dim=1)
    elif isinstance(model, SAC):
        mean, _, _ = policy.actor.get_action_dist_params(data.next_observations)
        actions = torch.tanh(mean)
        after = torch.cat(policy.critic_target(data.next_observations, actions), dim=1).amin(dim=1)
    else:
        actions = policy.actor_target(data.next_observations)
        after = torch.cat(policy.critic_target(data.next_observations, actions), dim=1).amin(dim=1)
    going = 1 - data.dones.flatten()
    wanted: Tensor = data.rewards.flatten() + going * model.gamma * after
    return wanted


@torch.no_grad()
def values_of_blocks(model: OffPolicyAlgorithm, data: ReplayBufferSamples) -> Tensor:
    """Each block's values of stored actions, for each critic: (critics, rows, blocks)."""
    policy: Any = model.policy
    network = policy.q_net if isinstance(model, DQN) else policy.critic
    inputs = network.extract_features(data.observations, network.features_extractor)
    each: Tensor
    if isinstance(model, DQN):
        each = network.q_net.blocks.each(inputs)
        index = data.actions.long()[:, None, :].expand(-1, each.shape[1], -1)
        return each.gather(2, index).squeeze(2)[None]
    inputs = torch.cat([inputs, data.actions], dim=1)
    return torch.stack([one.blocks.each(inputs).squeeze(2) for one in network.q_networks])
