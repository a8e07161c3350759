"""Turn-over dropout for agents of Stable-Baselines3: groups of experiences, and the agent without them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.logger import configure
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import Tensor, nn
from tqdm import tqdm

from turnover.dropout.blocks import Activation, Blocks
from turnover.dropout.masks import MaskSpec
from turnover.errors import InputError, check_whole
from turnover.integrations.sb3.audit import LeakReport, audit
from turnover.integrations.sb3.buffer import (
    ExperienceBuffer,
    Grouping,
    Label,
    blocks_of,
    checked_label,
)
from turnover.integrations.sb3.influence import ExperienceInfluence, influence
from turnover.integrations.sb3.networks import (
    WIDTH,
    BlockNetwork,
    check_supported,
    replace_networks,
)
from turnover.integrations.sb3.recordings import Episode, add_episodes
from turnover.integrations.sb3.rollouts import Environment
from turnover.integrations.sb3.saving import load, save


class Agent:
    """A Stable-Baselines3 model whose networks are blocks, each of which learned some groups.

    Made by :func:`attach`. ``model.learn``, ``model.predict`` and callbacks work as before.

    Attributes:
        model: the user's model.
        online: the networks that act and learn.
        targets: their slow copies.
        changes: what :func:`attach` changed in the model, and what still mixes groups.
    """

    def __init__(self, model: OffPolicyAlgorithm, buffer: ExperienceBuffer) -> None:
        self.model = model
        self._buffer = buffer
        self.online: list[BlockNetwork] = []
        self.targets: list[BlockNetwork] = []
        self.changes: list[str] = []

    @property
    def buffer(self) -> ExperienceBuffer:
        """The model's replay buffer, with the groups: :class:`ExperienceBuffer`."""
        if self.model.replay_buffer is not self._buffer:
            raise InputError(
                "the model's replay buffer was replaced: agent.save and agent.load keep its groups"
            )
        return self._buffer

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.buffer.blocks

    @property
    def labels(self) -> list[Label]:
        """Names of the groups, in the order in which they came."""
        return list(self.buffer.labels)

    def learned(self, labels: Sequence[Label] | None = None) -> NDArray[np.bool_]:
        """Which blocks may learn which groups: bool (groups, blocks); ghosts are negative numbers."""
        if isinstance(labels, str):
            raise InputError(f"labels must be several, such as [{labels!r}]")
        wanted = self.labels if labels is None else labels
        return blocks_of(self.buffer.spec, wanted, self.blocks)

    @contextmanager
    def keeping(self, kept: Tensor) -> Iterator[None]:
        """Context: the agent is the mean of some blocks, outside of training.

        Args:
            kept: bool (blocks,), or (rows, blocks) for batches of as many rows.

        Raises:
            InputError: another shape, or a row without blocks.
        """
        kept = torch.as_tensor(kept)
        if kept.shape[-1:] != (self.blocks,) or not bool(kept.any(dim=-1).all()):
            raise InputError(
                f"kept must name at least one of {self.blocks} blocks in each row, got {tuple(kept.shape)}"
            )
        with ExitStack() as stack:
            for network in (*self.online, *self.targets):
                stack.enter_context(network.keeping(kept))
            yield

    @contextmanager
    def without(self, labels: Label | Iterable[Label]) -> Iterator[None]:
        """Context: the agent as if it had never learned some groups, to predict, evaluate or learn on.

        It acts by the blocks that learned none of them; contexts within one another add up.
        ``model.learn`` within it leaves the groups out of every block's samples, and goes on to train the
        blocks that learned them before, which do not act.

        Args:
            labels: one group, or several.

        Raises:
            InputError: an unknown group, or groups of which every block learned one.
        """
        if isinstance(labels, str) or not isinstance(labels, Iterable):
            labels = [labels]
        before = self.buffer.without
        without = before | {self._number(label) for label in labels}
        kept = ~self.buffer.exposed()[:, list(without)].any(axis=1)
        if not kept.any():
            raise InputError(
                f"every one of {self.blocks} blocks learned one of "
                f"{[self.labels[one] for one in sorted(without)]}: name fewer groups, or attach with more "
                f"blocks or a smaller keep"
            )
        self.buffer.without = without
        try:
            with self.keeping(torch.from_numpy(kept)):
                yield
        finally:
            self.buffer.without = before

    def influence(
        self,
        env: Environment,
        *,
        episodes: int = 10,
        ghosts: int = 100,
        seed: int = 0,
        progress: bool = True,
    ) -> ExperienceInfluence:
        """Influence of every group on the return, on the bias of values and on the loss.

        Rolls out every block alone, and the hidden and the exposed sub-network of every group and ghost.

        Args:
            env: environment's id, an environment with a spec, or a function that makes one. For a model
                with ``VecNormalize``, one that is not normalized.
            episodes: of each sub-network; episode e begins alike for all of them.
            ghosts: groups that never existed, rolled out for the noise of hidden minus exposed, >= 20.
            seed: of the first episode and of the sampled transitions.
            progress: whether to show a progress bar.

        Returns:
            :class:`ExperienceInfluence`, a table of groups.

        Raises:
            InputError: no group yet, or settings out of range.
        """
        check_whole("episodes", episodes, 1)
        check_whole("ghosts", ghosts, 20)
        check_whole("seed", seed, 0)
        settings: dict[str, Any] = {
            "episodes": episodes,
            "ghosts": ghosts,
            "seed": seed,
            "progress": progress,
        }
        return influence(self.model, self.buffer, self.keeping, env, **settings)

    def contents(self) -> dict[Label, str]:
        """Say what the stored transitions of each group are, for a report: a short text by label.

        Their number, the episodes that ended in the group, their mean reward, and the share of them that
        are terminal, which the end by a time limit is not.

        Example:
            >>> agent.contents()[0]
            '1,000 transitions, 5 episodes ended, mean reward -1.23, 0.2% terminal'
        """
        buffer, steps = self.buffer, self.buffer.size()
        groups = buffer.groups[:steps].reshape(-1)
        ended = buffer.dones[:steps].reshape(-1) > 0
        terminal = ended & ~(buffer.timeouts[:steps].reshape(-1) > 0)
        rewards, ends, terminals = (
            np.bincount(groups, weights=column, minlength=len(self.labels))
            for column in (buffer.rewards[:steps].reshape(-1), ended, terminal)
        )
        texts = {}
        for number, label in enumerate(self.labels):
            count = int(buffer.counts()[number])
            texts[label] = "no stored transitions"
            if count:
                texts[label] = (
                    f"{_counted(count, 'transition')}, {_counted(int(ends[number]), 'episode')} ended, "
                    f"mean reward {rewards[number] / count:.3g}, {terminals[number] / count:.1%} terminal"
                )
        return texts

    def add(self, episodes: Iterable[Episode], label: Label | None = None) -> int:
        """Add recorded episodes, such as ``minari.load_dataset(...).iterate_episodes()``.

        Args:
            episodes: objects with ``observations`` (steps + 1, ...), ``actions``, ``rewards``,
                ``terminations`` and ``truncations`` (steps, ...), as Minari's.
            label: their group; ``None``: by the ``groups`` of :func:`attach`.

        Returns:
            The number of transitions added.

        Raises:
            InputError: episodes that do not fit the model's spaces, or more than the buffer holds.
        """
        if label is not None:
            label = checked_label(label)
        return add_episodes(self.model, self.buffer, episodes, label)

    def learn_offline(self, updates: int, *, progress: bool = True) -> None:
        """Learn from the stored transitions alone.

        Args:
            updates: gradient steps; a target network follows as after as many steps of an environment.
            progress: whether to show a progress bar.

        Raises:
            InputError: an empty buffer.
        """
        check_whole("updates", updates, 1)
        if not self.buffer.stored():
            raise InputError(
                "the buffer is empty: add recorded episodes first, agent.add(episodes)"
            )
        ensure_logger(self.model)
        for _ in tqdm(range(updates), desc="learn", unit=" updates", disable=not progress):
            self.model.train(gradient_steps=1, batch_size=self.model.batch_size)
            self.model._on_step()
        self.model.policy.set_training_mode(False)

    def audit(self, label: Label, *, updates: int = 20) -> LeakReport:
        """Look for leaks: change a group's rewards, train both ways, and compare the blocks' weights.

        The model is as before afterwards.

        Args:
            label: a group with stored transitions.
            updates: gradient steps of each way.

        Returns:
            :class:`LeakReport`, which prints as a table.
        """
        check_whole("updates", updates, 1)
        number = self._number(label)
        ensure_logger(self.model)
        return audit(self, number, updates=updates)

    def save(self, folder: str | Path) -> None:
        """Write weights, optimizers, experiences and groups: safetensors and JSON, all or nothing.

        Raises:
            InputError: the folder exists and holds something else.
        """
        save(self, Path(folder))

    def load(self, folder: str | Path) -> None:
        """Continue from what :meth:`save` wrote, in a model made and attached with the same settings.

        Raises:
            InputError: a damaged folder, or one of another model, other blocks or other masks.
        """
        load(self, Path(folder))

    def _number(self, label: Label) -> int:
        if label not in self.buffer._numbers:
            shown = ", ".join(map(str, self.buffer.labels[:10])) or "none yet"
            raise InputError(f"no group {label!r}; groups: {shown}")
        return self.buffer.number(label)

    def __repr__(self) -> str:
        lines = [
            f"{type(self.model).__name__} of {self.blocks} blocks, keep {self.buffer.spec.keep:g}, "
            f"{len(self.labels)} groups, {self.buffer.stored()} stored transitions"
        ]
        return "\n".join([*lines, *(f"- {change}" for change in self.changes)])


def attach(
    model: OffPolicyAlgorithm,
    *,
    groups: Grouping = 1000,
    blocks: int = 32,
    keep: float = 0.8,
    seed: int = 0,
    widths: Sequence[int] | None = None,
    norm: bool = True,
    batch_size: int | None = None,
) -> Agent:
    """Make a new model of Stable-Baselines3 learn under masks of its groups of experiences.

    Each network becomes ``blocks`` small networks, whose mean acts. A block learns from the groups that
    its masks expose to it, and bootstraps from its own target network, so that what it never learned
    reaches it through no target. Call it before ``model.learn``; it changes the model in place.

    Args:
        model: a ``DQN``, ``SAC`` or ``TD3`` with an ``MlpPolicy``, before it learns.
        groups: what a group is: a number of transitions that follow one another, ``"episode"``, or a
            function of a step's ``info`` that returns a whole number or a text (a source, a
            demonstrator).
        blocks: number of blocks.
        keep: share of the groups that a block learns.
        seed: of masks and of the sampling of transitions; weights are drawn by torch's generator.
        widths: hidden widths of a block; ``None``: the policy's, at most 32 each.
        norm: whether blocks have layer norms.
        batch_size: transitions of one block in a step; ``None``: the model's, at most 64.

    Returns:
        :class:`Agent`.

    Raises:
        InputError: another algorithm, a model that learned already, or settings under which groups would
            mix: image encoders, ``use_sde``, ``n_steps``, ``optimize_memory_usage``.

    Example:
        >>> model = SAC("MlpPolicy", "Pendulum-v1")
        >>> agent = turnover.integrations.sb3.attach(model, groups=500)
        >>> model.learn(10_000)
        >>> found = agent.influence("Pendulum-v1")
        >>> with agent.without(found.worst(2)):
        ...     evaluate_policy(model, env)

    Source: Hiraoka et al. 2024 (arXiv 2405.14629); targets by block and the regression are ours.
    """
    check_supported(model)
    check_whole("blocks", blocks, 2)
    if batch_size is not None:
        check_whole("batch_size", batch_size, 1)
    if widths is not None and not isinstance(widths, Sequence):
        raise InputError(f"widths must be a list of hidden widths, got {widths!r}")
    spec = MaskSpec(keep=keep, seed=seed, balanced=False)
    old = model.replay_buffer
    assert old is not None
    buffer = ExperienceBuffer(
        model.buffer_size,
        model.observation_space,
        model.action_space,
        device=model.device,
        n_envs=model.n_envs,
        handle_timeout_termination=old.handle_timeout_termination,
        grouping=groups,
        spec=spec,
        blocks=blocks,
    )
    agent = Agent(model, buffer)

    def make(features: int, hidden: list[int], outputs: int, kind: type[nn.Module]) -> Blocks:
        own = list(widths) if widths is not None else [min(width, WIDTH) for width in hidden]
        activation: Activation = kind()
        return Blocks(features, own, outputs, blocks=blocks, activation=activation, norm=norm)

    replaced = replace_networks(model, make, buffer.idle)
    agent.online, agent.targets = replaced.online, replaced.targets
    model.replay_buffer = buffer
    before = model.batch_size
    model.batch_size = min(before, _BATCH) if batch_size is None else batch_size
    agent.changes = [
        f"networks are {blocks} blocks, and a step takes {model.batch_size} transitions for each",
        *replaced.changes,
        *_mixing(model),
    ]
    return agent


_BATCH = 64
"""Transitions of one block in a gradient step, at most, unless the user gives a number."""


def _mixing(model: OffPolicyAlgorithm) -> list[str]:
    """What carries groups to blocks that never learned them, in sentences."""
    found = [
        "a group's influence on which experiences came later is not seen: all blocks act together"
    ]
    if model.get_vec_normalize_env() is not None:
        found.append("VecNormalize's statistics come from all groups")
    return found


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def ensure_logger(model: OffPolicyAlgorithm) -> None:
    """Give the model a silent logger, which training outside of ``learn`` needs, unless it has one."""
    if not hasattr(model, "_logger"):
        # set_logger would also silence every learn() that follows.
        model._logger = configure(None, [])
