"""Whether a group reaches blocks that never learned it: train both ways, and compare weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.integrations.sb3.saving import memory, restore

if TYPE_CHECKING:
    from turnover.integrations.sb3.agent import Agent


@dataclass(frozen=True)
class LeakReport:
    """What changed when a group's rewards did.

    Attributes:
        learned: blocks that may learn the group, bool (blocks,).
        changed: blocks any of whose weights differ, bool (blocks,).
        shared: names of other tensors of the policy that differ.
    """

    learned: NDArray[np.bool_]
    changed: NDArray[np.bool_]
    shared: list[str]

    @property
    def clean(self) -> bool:
        """Whether the group reached nothing that it should not."""
        return not self.shared and not bool((self.changed & ~self.learned).any())

    def __str__(self) -> str:
        hidden = ~self.learned
        lines = [
            f"{int((self.changed & self.learned).sum())} of {int(self.learned.sum())} blocks that learned "
            f"the group changed",
            f"{int((self.changed & hidden).sum())} of {int(hidden.sum())} blocks that never learned it "
            f"changed" + (": a leak" if (self.changed & hidden).any() else ""),
        ]
        return "\n".join([*lines, *(f"{name} changed: a leak" for name in self.shared)])


def audit(agent: Agent, group: int, *, updates: int) -> LeakReport:
    """Train on a group's rewards and on their opposites, from the same state, and compare."""
    model, buffer = agent.model, agent.buffer
    own = buffer.groups == group
    own.reshape(-1)[buffer.stored() :] = False
    if not own.any():
        raise InputError(f"no transition of group {buffer.labels[group]!r} is stored")
    before = memory(agent)
    numpy_state = np.random.get_state()  # noqa: NPY002 - Stable-Baselines3 draws from it
    rewards = buffer.rewards.copy()
    found: list[dict[str, torch.Tensor]] = []
    try:
        for change in (False, True):
            if change:
                buffer.rewards[own] = -buffer.rewards[own] - 1
            with torch.random.fork_rng():
                torch.manual_seed(0)
                for _ in range(updates):
                    model.train(gradient_steps=1, batch_size=model.batch_size)
                    model._on_step()
            found.append({k: v.clone() for k, v in model.policy.state_dict().items()})
            restore(agent, before)
    finally:
        buffer.rewards[:] = rewards
        restore(agent, before)
        np.random.set_state(numpy_state)  # noqa: NPY002
        model.policy.set_training_mode(False)
    changed = np.zeros(buffer.blocks, dtype=bool)
    shared = []
    for name, value in found[0].items():
        differs = value != found[1][name]
        if ".blocks." in name or name.endswith("log_ent_coef"):
            changed |= differs.reshape(buffer.blocks, -1).any(dim=1).cpu().numpy()
        elif bool(differs.any()):
            shared.append(name)
    return LeakReport(buffer.exposed()[:, group].copy(), changed, shared)
