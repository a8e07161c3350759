"""Influence of groups of experiences on an agent: a table with the uncertainty of every number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm as gaussian
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import Tensor

from turnover.errors import InputError
from turnover.integrations.sb3.buffer import ExperienceBuffer, Label, blocks_of
from turnover.integrations.sb3.effects import Effects, regress
from turnover.integrations.sb3.rollouts import Environment, roll_out
from turnover.integrations.sb3.values import targets, values_of_blocks
from turnover.io.parsing import finite_or_none, write_json
from turnover.results.calibration import q_values

_FREE_GHOSTS = 1000
"""Ghosts of the regression, which need no roll-outs."""
_ROWS = 512
"""Transitions of a group whose loss is taken."""
_SHOWN = 20

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """Hidden minus exposed, float64 (groups,) each; NaN for a group that no block, or every one, learned.

    Attributes:
        exposed: number of the blocks that learned the group.
        hidden: number of the others.
        z: their difference in standard deviations of ghosts' differences.
        p: two-sided, by the normal distribution.
        q: Benjamini-Hochberg over the groups.
        ghost_mean: mean of ghosts' differences.
        ghost_spread: their standard deviation.
    """

    exposed: Floats
    hidden: Floats
    z: Floats
    p: Floats
    q: Floats
    ghost_mean: Floats
    ghost_spread: Floats


@dataclass(frozen=True)
class ExperienceInfluence:
    """Influence of every group of experiences.

    Attributes:
        labels: names of the groups, in the order in which they came.
        transitions: stored transitions of each group, int64 (groups,).
        blocks: number of blocks that learned each group, int64 (groups,).
        whole: mean return of the whole agent.
        whole_se: standard error of that mean over episodes.
        episodes: episodes of each sub-network.
        on_return: effect of each group on a block's return, by regression: ``effect``, ``se``, ``t``, ``p``.
        q: Benjamini-Hochberg of ``on_return.p`` over the groups.
        on_bias: the same effect on the bias of values (expected minus received).
        ghost_return: ``on_return`` of 1,000 groups that never existed.
        returns: return of the hidden and the exposed sub-network.
        bias: their bias of values.
        loss: their squared temporal-difference error on the group's transitions, with targets of the
            whole network; NaN for a group of which no transition is stored.
    """

    labels: list[Label]
    transitions: NDArray[np.int64]
    blocks: NDArray[np.int64]
    whole: float
    whole_se: float
    episodes: int
    on_return: Effects
    q: Floats
    on_bias: Effects
    ghost_return: Effects
    returns: Difference
    bias: Difference
    loss: Difference

    def worst(self, count: int, *, q: float | None = None) -> list[Label]:
        """The groups without which the return would be highest.

        Args:
            count: at most so many.
            q: only groups that harm, with a q-value up to this.
        """
        chosen = [one for one in self._by_harm() if np.isfinite(self.on_return.t[one])]
        if q is not None:
            chosen = [one for one in chosen if self.q[one] <= q and self.on_return.t[one] < 0]
        return [self.labels[one] for one in chosen[:count]]

    def false_positives(self, p: float = 0.05) -> float:
        """Share of ghosts with a p-value below ``p``: near ``p`` if the p-values hold."""
        known = self.ghost_return.p[np.isfinite(self.ghost_return.p)]
        return float((known < p).mean()) if len(known) else float("nan")

    def rows(self) -> list[dict[str, Any]]:
        """The table as JSON values, a row for each group; NaN as ``None``."""
        columns: dict[str, Any] = {
            "group": self.labels,
            "transitions": self.transitions.tolist(),
            "blocks": self.blocks.tolist(),
            "effect_on_return": self.on_return.effect,
            "se": self.on_return.se,
            "t": self.on_return.t,
            "p": self.on_return.p,
            "q": self.q,
            "effect_on_bias": self.on_bias.effect,
            "bias_t": self.on_bias.t,
        }
        for name, one in (("return", self.returns), ("bias", self.bias), ("loss", self.loss)):
            for part in ("hidden", "exposed", "z", "q"):
                columns[f"{name}_{part}"] = getattr(one, part)
        lists = {name: _plain(values) for name, values in columns.items()}
        return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, atomically."""
        found = {
            "whole_return": finite_or_none(self.whole),
            "whole_return_se": finite_or_none(self.whole_se),
            "episodes": self.episodes,
            "ghosts_below_0.05": finite_or_none(self.false_positives()),
            "groups": self.rows(),
        }
        write_json(Path(path), found)

    def _by_harm(self) -> NDArray[np.int64]:
        """Positions of the groups, the most harmful first and those of unknown effect last."""
        return np.argsort(np.nan_to_num(self.on_return.t, nan=np.inf), kind="stable")

    def __str__(self) -> str:
        lines = [
            f"return of the whole agent {self.whole:.1f} ± {self.whole_se:.1f} ({self.episodes} episodes); "
            f"{len(self.labels)} groups; {self.false_positives():.1%} of {len(self.ghost_return.p):,} ghosts "
            f"have p < 0.05",
            f"{'group':>20}  {'rows':>7} {'effect on return':>20} {'t':>6} {'q':>7}   "
            f"{'return without':>14} {'with':>9} {'z':>6}",
        ]
        for one in self._by_harm()[:_SHOWN]:
            found, sides = self.on_return, self.returns
            effect = f"{found.effect[one]:.1f} ± {found.se[one]:.1f}"
            lines.append(
                f"{str(self.labels[one])[:20]:>20}  {self.transitions[one]:>7} {effect:>20} "
                f"{found.t[one]:>6.1f} {self.q[one]:>7.3f}   {sides.hidden[one]:>14.1f} "
                f"{sides.exposed[one]:>9.1f} {sides.z[one]:>6.1f}"
            )
        if len(self.labels) > _SHOWN:
            lines.append(f"({len(self.labels) - _SHOWN} more groups, by t)")
        return "\n".join(lines)


def influence(
    model: OffPolicyAlgorithm,
    buffer: ExperienceBuffer,
    keeping: Callable[[Tensor], Any],
    env: Environment,
    *,
    episodes: int,
    ghosts: int,
    seed: int,
    progress: bool,
) -> ExperienceInfluence:
    """Roll out and compare sub-networks: see ``Agent.influence``."""
    labels, blocks = list(buffer.labels), buffer.blocks
    if buffer.without:
        raise InputError("influence is of all blocks: call it outside of agent.without(...)")
    if not labels:
        raise InputError("no group of experiences yet: learn, or add recorded episodes")
    model.policy.set_training_mode(False)
    learned = buffer.exposed().T
    made = _ghosts(buffer, ghosts)
    both = np.concatenate([learned, made])
    split = np.flatnonzero(_splits(both))
    kept = np.concatenate(
        [np.ones((1, blocks), bool), np.eye(blocks, dtype=bool), both[split], ~both[split]]
    )
    found = roll_out(model, keeping, kept, env, episodes=episodes, seed=seed, progress=progress)
    free = blocks_of(buffer.spec, range(-_FREE_GHOSTS, 0), blocks)
    free = free[_splits(free)]
    alone = slice(1, 1 + blocks)
    on_return, ghost_return = regress(found.returns[alone].mean(axis=1), learned.T, free.T)
    on_bias, _ = regress(found.bias[alone].mean(axis=1), learned.T, free.T)
    whole = found.returns[0]
    se = whole.std(ddof=1) / len(whole) ** 0.5 if episodes > 1 else np.nan
    return ExperienceInfluence(
        labels,
        buffer.counts().copy(),
        learned.sum(axis=1),
        float(whole.mean()),
        float(se),
        episodes,
        on_return,
        _q(on_return.p),
        on_bias,
        ghost_return,
        _difference(found.returns, split, 1 + blocks, len(labels), len(both)),
        _difference(found.bias, split, 1 + blocks, len(labels), len(both)),
        _losses(model, buffer, keeping, learned, made, seed),
    )


def _splits(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which groups some blocks learned, and others not: bool (groups,)."""
    return np.asarray(masks.any(axis=1) & ~masks.all(axis=1))


def _ghosts(buffer: ExperienceBuffer, count: int) -> NDArray[np.bool_]:
    """Blocks of ghosts that some blocks would have learned, and some not: bool (count, blocks)."""
    drawn = blocks_of(buffer.spec, range(-4 * count - 64, 0), buffer.blocks)[::-1]
    both = drawn[_splits(drawn)]
    if len(both) < count:
        raise InputError(
            f"too few masks of {buffer.blocks} blocks at keep {buffer.spec.keep:g} hide some blocks and not "
            f"all: attach with more blocks or a keep nearer to 0.5"
        )
    return both[:count]


def _difference(
    values: Floats, split: NDArray[np.int64], first: int, groups: int, every: int
) -> Difference:
    means = values.mean(axis=1)
    sides = np.full((2, every), np.nan)
    sides[0, split] = means[first : first + len(split)]
    sides[1, split] = means[first + len(split) :]
    exposed, hidden = sides
    ghosts = (hidden - exposed)[groups:]
    return _judged(
        exposed[:groups], hidden[:groups], float(ghosts.mean()), float(ghosts.std(ddof=1))
    )


def _judged(
    exposed: Floats, hidden: Floats, mean: float | Floats, spread: float | Floats
) -> Difference:
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (hidden - exposed - mean) / spread
    p = 2 * gaussian.sf(np.abs(z))
    means, spreads = np.full_like(z, mean), np.full_like(z, spread)
    return Difference(exposed, hidden, z, p, _q(p), means, spreads)


def _q(p: Floats) -> Floats:
    """Benjamini-Hochberg over the p-values that are known."""
    found = np.full_like(p, np.nan)
    known = np.isfinite(p)
    found[known] = q_values(p[known])
    return found


def _losses(
    model: OffPolicyAlgorithm,
    buffer: ExperienceBuffer,
    keeping: Callable[[Tensor], Any],
    learned: NDArray[np.bool_],
    ghosts: NDArray[np.bool_],
    seed: int,
) -> Difference:
    """Loss of hidden and exposed sub-networks on each group's own transitions, beside all ghosts on them."""
    groups = len(learned)
    exposed, hidden, mean, spread = (np.full(groups, np.nan) for _ in range(4))
    stored = buffer.groups.reshape(-1)[: buffer.stored()]
    random = np.random.default_rng(seed)
    whole, splits = torch.ones(buffer.blocks, dtype=torch.bool), _splits(learned)
    for group in range(groups):
        own = np.flatnonzero(stored == group)
        if not len(own) or not splits[group]:
            continue
        rows = random.choice(own, min(_ROWS, len(own)), replace=False)
        data = buffer.at(rows, model.get_vec_normalize_env())
        with keeping(whole):
            wanted = targets(model, data)
        values = values_of_blocks(model, data)
        masks = np.concatenate([learned[group : group + 1], ghosts])
        inside, outside = (_squared(values, wanted, one) for one in (masks, ~masks))
        exposed[group], hidden[group] = inside[0], outside[0]
        mean[group] = (outside - inside)[1:].mean()
        spread[group] = (outside - inside)[1:].std(ddof=1)
    return _judged(exposed, hidden, mean, spread)


def _squared(values: Tensor, wanted: Tensor, kept: NDArray[np.bool_]) -> Floats:
    """Mean squared error of the mean of some blocks: float64 (sub-networks,)."""
    weights = torch.from_numpy(kept).to(values)
    weights = weights / weights.sum(dim=1, keepdim=True)
    means = values @ weights.T
    return (means - wanted[:, None]).square().mean(dim=(0, 1)).double().cpu().numpy()


def _plain(values: Any) -> list[Any]:
    if isinstance(values, list):
        return values
    return [finite_or_none(one) for one in values]
