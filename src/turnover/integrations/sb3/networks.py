"""Replace the networks of a Stable-Baselines3 model by blocks, each of which is an agent of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import Tensor, nn

from turnover.dropout.blocks import Blocks
from turnover.errors import InputError

WIDTH = 32
"""Largest width of a hidden layer of a block, unless the user gives widths."""


class BlockNetwork(nn.Module):
    """Blocks as a network of an agent.

    In training each row of a batch runs through its own block; elsewhere the output is the mean of the
    blocks, or of those that :meth:`keeping` names.

    Args:
        blocks: the blocks.
        idle: bool (blocks,), blocks whose gradients are zero now; shared by all networks.
        target: whether this is a target network, which runs in training only, and in eval mode.
    """

    def __init__(self, blocks: Blocks, idle: Tensor, *, target: bool = False) -> None:
        super().__init__()
        self.blocks = blocks
        self.target = target
        self._idle = idle
        self._kept: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs (rows, outputs)."""
        if self._kept is not None and not self.training:
            weights = (self._kept / self._kept.sum(dim=-1, keepdim=True))[..., None]
            # A block that diverged to NaN must not reach agents without it, as zero times NaN would.
            outputs = self.blocks.each(inputs).where(weights > 0, 0.0)
            return (outputs * weights).sum(dim=-2)
        if not (self.target or self.training):
            whole: Tensor = self.blocks(inputs)
            return whole
        outputs = self.blocks.apart(inputs)
        if torch.is_grad_enabled() and bool(self._idle.any()):
            rows = self._idle.repeat_interleave(len(outputs) // self.blocks.blocks)
            outputs = torch.where(rows[:, None], outputs.detach(), outputs)
        return outputs

    @contextmanager
    def keeping(self, kept: Tensor) -> Iterator[None]:
        """Context: in eval mode the output is the mean of some blocks.

        Args:
            kept: (blocks,) for every row, or (rows, blocks).
        """
        before, self._kept = self._kept, kept.to(self.blocks.weights[0])
        try:
            yield
        finally:
            self._kept = before


class Columns(nn.Module):
    """Some columns of a tensor, in place of a layer that computed them alone."""

    def __init__(self, first: int, count: int) -> None:
        super().__init__()
        self.first, self.count = first, count

    def forward(self, values: Tensor) -> Tensor:
        """(rows, columns) to (rows, count)."""
        return values[:, self.first : self.first + self.count]


class OwnEntropy(SquashedDiagGaussianDistribution):
    """SAC's policy distribution with an entropy coefficient for each block.

    Log-probabilities are multiplied by the coefficient of their row's block, and SAC's own coefficient is
    one. In the loss of the actor they carry the gradient of the coefficients' loss, whose value is zero.
    """

    def __init__(self, actions: int, log_coefs: nn.Parameter, entropy: float, idle: Tensor) -> None:
        super().__init__(actions)
        self._log_coefs, self._entropy, self._idle = log_coefs, entropy, idle

    def log_prob_from_params(self, mean_actions: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        """Actions, and log-probabilities times the coefficients, of rows that are apart by block."""
        actions, log_prob = super().log_prob_from_params(mean_actions, log_std)
        own = torch.where(self._idle, self._log_coefs.detach(), self._log_coefs)
        own = own.repeat_interleave(len(log_prob) // len(own))
        loss = -own * (log_prob.detach() + self._entropy)
        return actions, own.detach().exp() * log_prob + (loss - loss.detach())


class ByBlock:
    """Before an optimizer's step: gradients of each block as if it were trained alone.

    The loss is a mean over the rows of all blocks, and clipping by the norm over all blocks would carry
    every group to every block.
    """

    def __init__(self, blocks: int, max_norm: float | None = None) -> None:
        self.blocks, self.max_norm = blocks, max_norm

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale, then clip, the gradients in place."""
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, self.blocks)
        if self.max_norm is None:
            return
        squares = [one.square().flatten(1).sum(dim=1) for one in gradients]
        factor = self.max_norm / (torch.stack(squares).sum(dim=0).sqrt() + 1e-6)
        factor = factor.clamp(max=1.0)
        for one in gradients:
            one.mul_(factor.view(-1, *[1] * (one.dim() - 1)))


@dataclass
class Replaced:
    """What the model's networks became.

    Attributes:
        online: networks that act and learn.
        targets: their slow copies, where they have some.
        changes: what else changed, and what still mixes groups, in sentences for the user.
    """

    online: list[BlockNetwork] = field(default_factory=list)
    targets: list[BlockNetwork] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)


def check_supported(model: OffPolicyAlgorithm) -> None:
    """Refuse a model whose groups could not be kept apart, by name and with the fix."""
    if type(model) not in (DQN, SAC, TD3):
        raise InputError(
            f"attach supports Stable-Baselines3's DQN, SAC and TD3, got {type(model).__name__}"
            + (
                ": on-policy algorithms keep no replay buffer"
                if not isinstance(model, OffPolicyAlgorithm)
                else ""
            )
        )
    learned = [
        name
        for name, _ in model.policy.named_parameters()
        if "features_extractor" in name and "." in name
    ]
    if learned:
        raise InputError(
            f"the policy has a features extractor with weights ({learned[0]}), which all blocks would "
            f"share: use MlpPolicy with observations that are vectors"
        )
    if getattr(model, "use_sde", False):
        raise InputError("use_sde=True shares one noise matrix between all blocks: use_sde=False")
    if model.n_steps > 1:
        raise InputError(
            f"n_steps={model.n_steps} adds rewards of several transitions, which may be of several "
            f"groups: n_steps=1"
        )
    if model.optimize_memory_usage:
        raise InputError(
            "optimize_memory_usage=True takes a next observation from the next transition, which may be "
            "of another group: optimize_memory_usage=False"
        )
    _check_elementwise(model.policy)
    buffer = model.replay_buffer
    if any(isinstance(one, BlockNetwork) for one in model.policy.modules()):
        raise InputError("the model is attached already: make a new one")
    if type(buffer) is not ReplayBuffer:
        raise InputError(
            f"the model has a {type(buffer).__name__}, and groups need Stable-Baselines3's ReplayBuffer: "
            f"use observations that are vectors, and no replay_buffer_class"
        )
    if type(model.policy) is not model.policy_aliases["MlpPolicy"]:
        raise InputError(
            f"the policy is a {type(model.policy).__name__}, whose networks blocks would not imitate: "
            f"use MlpPolicy"
        )
    if buffer.pos or buffer.full or model.num_timesteps:
        raise InputError(
            "the model has learned already, from transitions of no group: attach before learn()"
        )


def replace_networks(
    model: OffPolicyAlgorithm,
    make: Callable[[int, list[int], int, type[nn.Module]], Blocks],
    idle: Tensor,
) -> Replaced:
    """Replace the networks in place, rebuild the optimizers, and give each block what all shared."""
    found = Replaced()
    policy: Any = model.policy

    def online(blocks: Blocks) -> BlockNetwork:
        found.online.append(BlockNetwork(blocks.to(model.device), idle))
        return found.online[-1]

    def pair(layers: nn.Module) -> tuple[BlockNetwork, BlockNetwork]:
        network = online(make(*_shape(layers), policy.activation_fn))
        target = BlockNetwork(copy.deepcopy(network.blocks), idle, target=True).eval()
        found.targets.append(target)
        return network, target

    if isinstance(model, DQN):
        policy.q_net.q_net, policy.q_net_target.q_net = pair(policy.q_net.q_net)
        clipped = model.max_grad_norm
        policy.optimizer = _rebuilt(
            policy, policy.optimizer, policy.q_net, ByBlock(idle.numel(), clipped)
        )
        model.max_grad_norm = float("inf")
        found.changes.append(f"gradients are clipped at norm {clipped:g} block by block")
        return found
    for number, layers in enumerate(policy.critic.q_networks):
        one, target = pair(layers)
        for critic, network in ((policy.critic, one), (policy.critic_target, target)):
            setattr(critic, f"qf{number}", network)
            critic.q_networks[number] = network
    if isinstance(model, TD3):
        one, target = pair(policy.actor.mu)
        policy.actor.mu = nn.Sequential(one, nn.Tanh())
        policy.actor_target.mu = nn.Sequential(target, nn.Tanh())
    else:
        _replace_actor(model, online, make, found)
    by_block = ByBlock(idle.numel())
    policy.actor.optimizer = _rebuilt(policy, policy.actor.optimizer, policy.actor, by_block)
    policy.critic.optimizer = _rebuilt(policy, policy.critic.optimizer, policy.critic, by_block)
    return found


def _replace_actor(
    model: Any,
    online: Callable[[Blocks], BlockNetwork],
    make: Callable[..., Blocks],
    found: Replaced,
) -> None:
    """SAC's actor, whose means and standard deviations come from one network, and its entropy."""
    actor, actions = model.policy.actor, int(np.prod(model.action_space.shape))
    features, hidden, _ = _shape(nn.Sequential(*actor.latent_pi, actor.mu))
    actor.latent_pi = online(make(features, hidden, 2 * actions, model.policy.activation_fn))
    actor.mu, actor.log_std = Columns(0, actions), Columns(actions, actions)
    if model.ent_coef_optimizer is None:
        return
    idle = found.online[-1]._idle
    actor.log_ent_coef = nn.Parameter(model.log_ent_coef.detach().expand(idle.numel()).clone())
    actor.action_dist = OwnEntropy(actions, actor.log_ent_coef, model.target_entropy, idle)
    model.ent_coef_optimizer = model.log_ent_coef = None
    model.ent_coef_tensor = torch.ones(1, device=model.device)
    found.changes.append(
        "each block learns an entropy coefficient of its own, in policy.actor.log_ent_coef and by the "
        "actor's optimizer; the logged train/ent_coef is 1"
    )


def _shape(layers: nn.Module) -> tuple[int, list[int], int]:
    linear = [one for one in layers.modules() if isinstance(one, nn.Linear)]
    return linear[0].in_features, [one.out_features for one in linear[:-1]], linear[-1].out_features


def _rebuilt(
    policy: Any, old: torch.optim.Optimizer, module: nn.Module, by_block: ByBlock
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": []}]
    for name, parameter in module.named_parameters():
        if name == "log_ent_coef" and "weight_decay" in old.defaults:
            groups.append({"params": [parameter], "weight_decay": 0.0})
        else:
            groups[0]["params"].append(parameter)
    settings = {**policy.optimizer_kwargs, "lr": old.param_groups[0]["lr"]}
    optimizer: torch.optim.Optimizer = policy.optimizer_class(groups, **settings)
    kind: Any = type(optimizer)

    class Stepping(kind):  # type: ignore[misc]
        """The user's optimizer; a hook in the place of this class would be lost in ``copy.deepcopy``."""

        def step(self, *args: Any) -> Any:
            by_block(self)
            return super().step(*args)

    optimizer.__class__ = Stepping
    return optimizer


def _check_elementwise(policy: Any) -> None:
    """Refuse what computes one block's step, or output, with numbers of the others."""
    activation = policy.activation_fn()
    if any(True for _ in activation.parameters()):
        raise InputError(
            f"activation_fn {type(activation).__name__} has weights, which all blocks would share: use "
            f"one without, such as torch.nn.ReLU"
        )
    after = []
    for other in (torch.ones(3, 3), torch.arange(9.0).reshape(3, 3)):
        weights = nn.Parameter(torch.ones(2, 3, 3))
        optimizer = policy.optimizer_class([weights], lr=0.1, **policy.optimizer_kwargs)
        for _ in range(3):
            weights.grad = torch.stack([other, torch.ones(3, 3)])
            optimizer.step()
        after.append(weights.detach()[1])
    if not torch.equal(*after):
        raise InputError(
            f"a step of {type(optimizer).__name__} mixes the gradients of blocks: use an optimizer "
            f"that takes each weight by itself, such as torch.optim.Adam"
        )
