"""A replay buffer whose transitions know their groups, and which gives each block what it may learn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from turnover.dropout.masks import MaskSpec
from turnover.errors import InputError, check_whole, needing
from turnover.ids import string_ids

with needing("turnover.integrations.sb3", "turnover[rl]"):
    from stable_baselines3.common.buffers import ReplayBuffer
    from stable_baselines3.common.type_aliases import ReplayBufferSamples
    from stable_baselines3.common.vec_env import VecNormalize

Label = int | str
"""The name of a group: a whole number, or a text such as the name of a data source."""
Grouping = int | str | Callable[[dict[str, Any]], Label]

SITE = "each_output"
"""The site of :class:`turnover.Blocks`, whose masks all networks of an agent share."""
_ROUNDS = 16
"""Draws of a position before the positions that a block may learn are listed."""


class ExperienceBuffer(ReplayBuffer):
    """Stable-Baselines3's replay buffer, with the group of every transition.

    :func:`attach` makes it; users read ``labels``, ``counts()`` and ``groups``.

    Attributes:
        groups: int32 (buffer_size, n_envs), the position in ``labels`` of each transition's group.
        labels: names of the groups, in the order in which they came.
        spec: the masks: group to blocks.
        blocks: number of blocks.
        idle: bool (blocks,), blocks that may learn no stored transition; their gradients are zero.
        without: positions in ``labels`` of groups that are not sampled.
    """

    def __init__(
        self, *args: Any, grouping: Grouping, spec: MaskSpec, blocks: int, **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        if not (grouping == "episode" or callable(grouping)):
            check_whole("groups: the number of transitions of a group", grouping, 1)
            grouping = int(grouping)
        self.grouping = grouping
        self.spec = spec
        self.blocks = blocks
        self.groups = np.zeros((self.buffer_size, self.n_envs), dtype=np.int32)
        self.labels: list[Label] = []
        self.idle = torch.zeros(blocks, dtype=torch.bool, device=self.device)
        self.without: frozenset[int] = frozenset()
        self.random = np.random.default_rng(spec.seed)
        self.added = 0
        self.label: Label | None = None
        self._episodes = np.full(self.n_envs, -1)
        self._stretch = (-1, -1)
        self._numbers: dict[Label, int] = {}
        self._exposed = np.zeros((blocks, 0), dtype=bool)
        self._counts = np.zeros(0, dtype=np.int64)

    def exposed(self) -> NDArray[np.bool_]:
        """Which blocks may learn which groups: bool (blocks, groups)."""
        return self._exposed

    def counts(self) -> NDArray[np.int64]:
        """Number of stored transitions of each group, int64 (groups,)."""
        return self._counts

    def number(self, label: Label) -> int:
        """The position of a group in ``labels``; a new label becomes a group."""
        found = self._numbers.get(label)
        if found is None:
            found = self._numbers[label] = len(self.labels)
            self.labels.append(label)
            column = blocks_of(self.spec, [label], self.blocks)
            self._exposed = np.concatenate([self._exposed, column.T], axis=1)
            self._counts = np.append(self._counts, 0)
        return found

    def add(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        action: NDArray[Any],
        reward: NDArray[Any],
        done: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """Add one transition of each environment, as Stable-Baselines3's buffer does."""
        if self.grouping == "episode" and self.size():
            # learn() may begin anew in the middle of an episode, which then has no end.
            last = self.next_observations[self.pos - 1].reshape(self.n_envs, -1)
            began = (last != np.asarray(obs).reshape(self.n_envs, -1)).any(axis=1)
            self._episodes[began] = -1
        groups = [self.number(self._label(env, info)) for env, info in enumerate(infos)]
        if self.full:
            np.subtract.at(self._counts, self.groups[self.pos], 1)
        np.add.at(self._counts, groups, 1)
        self.groups[self.pos] = groups
        if self.label is None:
            self.added += self.n_envs
        self._episodes[np.asarray(done, dtype=bool)] = -1
        super().add(obs, next_obs, action, reward, done, infos)

    def _label(self, env: int, info: dict[str, Any]) -> Label:
        if self.label is not None:
            return self.label
        if isinstance(self.grouping, int):
            stretch = self.added // self.grouping
            if stretch != self._stretch[0]:
                self._stretch = (stretch, self._unused(stretch))
            return self._stretch[1]
        if self.grouping == "episode":
            if self._episodes[env] < 0:
                self._episodes[env] = self._unused(len(self.labels))
            return int(self._episodes[env])
        assert callable(self.grouping)
        return checked_label(self.grouping(info), "groups: the function must return")

    def _unused(self, first: int) -> int:
        """A number that is no label yet: recorded episodes may have taken some."""
        while first in self._numbers:
            first += 1
        return first

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """As many transitions for each block, of groups that it may learn, the first block's first.

        Args:
            batch_size: transitions of one block.
            env: normalizes observations and rewards.

        Returns:
            Stable-Baselines3's samples of ``blocks * batch_size`` rows.
        """
        positions = self._positions(batch_size).reshape(-1)
        return self.at(positions, env)

    def at(self, positions: NDArray[Any], env: VecNormalize | None = None) -> ReplayBufferSamples:
        """Stored transitions by position ``step * n_envs + environment``."""
        steps, envs = np.divmod(positions, self.n_envs)
        ended = self.dones[steps, envs] * (1 - self.timeouts[steps, envs])
        rewards = self.rewards[steps, envs].reshape(-1, 1)
        columns = (
            self._normalize_obs(self.observations[steps, envs], env),
            self.actions[steps, envs],
            self._normalize_obs(self.next_observations[steps, envs], env),
            ended.reshape(-1, 1),
            self._normalize_reward(rewards, env),
        )
        return ReplayBufferSamples(*(self.to_torch(np.asarray(column)) for column in columns))

    def stored(self) -> int:
        """Number of stored transitions."""
        return int(self.size()) * self.n_envs

    def restore(
        self,
        arrays: Mapping[str, NDArray[Any]],
        labels: Sequence[Label],
        position: int,
        *,
        full: bool,
        added: int,
        episodes: NDArray[np.int64],
        stretch: tuple[int, int],
    ) -> None:
        """Continue from stored transitions, (steps, n_envs, ...) by name, and their groups."""
        for name, values in arrays.items():
            getattr(self, name)[: len(values)] = values
        self.labels, self._numbers = list(labels), {one: at for at, one in enumerate(labels)}
        self._exposed = blocks_of(self.spec, labels, self.blocks).T
        self.pos, self.full, self.added = position, full, added
        self._episodes, self._stretch = episodes, stretch
        self._counts = np.bincount(self.groups[: self.size()].reshape(-1), minlength=len(labels))

    def _positions(self, each: int) -> NDArray[np.int64]:
        """Positions drawn for each block: int64 (blocks, each)."""
        learns = self._exposed & (self._counts > 0)
        learns[:, list(self.without)] = False
        idle = ~learns.any(axis=1)
        self.idle.copy_(torch.from_numpy(idle))
        stored, groups = self.stored(), self.groups.reshape(-1)
        positions = self.random.integers(0, stored, (self.blocks, each))
        for _ in range(_ROUNDS):
            wrong = ~np.take_along_axis(learns, groups[positions], axis=1)
            wrong[idle] = False
            count = int(wrong.sum())
            if not count:
                return positions
            positions[wrong] = self.random.integers(0, stored, count)
        for block in np.flatnonzero(wrong.any(axis=1)):
            own = np.flatnonzero(learns[block][groups[:stored]])
            positions[block] = own[self.random.integers(0, len(own), each)]
        return positions


def checked_label(label: object, what: str = "a label must be") -> Label:
    """A label as Python's int or str; what cannot name a group is refused."""
    if isinstance(label, str):
        return str(label)
    if isinstance(label, bool) or not isinstance(label, int | np.integer):
        raise InputError(f"{what} an int or a str, got {label!r}")
    if not 0 <= label < 2**63:
        raise InputError(f"{what} a number in [0, 2**63), got {label}: negative ones are ghosts")
    return int(label)


def ids_of(labels: Sequence[Label]) -> torch.Tensor:
    """Instance ids of groups, int64: whole numbers as they are, texts by their hash."""
    return torch.tensor(
        [int(string_ids([one])[0]) if isinstance(one, str) else one for one in labels],
        dtype=torch.int64,
    )


def blocks_of(spec: MaskSpec, labels: Iterable[Label], blocks: int) -> NDArray[np.bool_]:
    """The blocks that learn each group (or ghost, a negative number): bool (groups, blocks)."""
    return spec.exposed(ids_of(list(labels)), SITE, blocks).numpy()
