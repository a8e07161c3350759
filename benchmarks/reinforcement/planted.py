"""Planted harm in recordings: whether the harmful sources are found, and what the agent is without them.

Twelve sources recorded a pendulum with five torques, in random actions; two of them are four times as long
and harmful. Q-learning from the recordings alone. Settings were chosen on network 0 of data sets 0 and 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import DQN
from torch.nn import functional

from turnover.integrations import sb3
from turnover.integrations.sb3 import ExperienceInfluence
from turnover.integrations.sb3.rollouts import roll_out

from .pendulum import FiveTorques, Recording, record

SOURCES, BAD, EPISODES, UPDATES, BATCH = 12, 2, 4, 2000, 128
KINDS = ("rewards", "actions", "demonstrator")
Json = dict[str, Any]


@dataclass(frozen=True)
class Planted:
    """Recordings of every source, and which of them are harmful."""

    sources: list[list[Recording]]
    bad: list[int]


def planted(kind: str, data: int) -> Planted:
    """Recordings of a data set.

    Args:
        kind: ``rewards`` negates the harmful sources' rewards, ``actions`` stores the opposite torque. For
            ``demonstrator`` all sources are a controller with half of its actions random, and the harmful
            ones one that does the opposite; its rewards are true.
        data: number of the data set.
    """
    random = np.random.default_rng(data)
    bad = sorted(int(one) for one in random.choice(SOURCES, BAD, replace=False))
    found = []
    for source in range(SOURCES):
        harmful = source in bad
        episodes = record(
            EPISODES * (4 if harmful else 1),
            random,
            noise=0.5 if kind == "demonstrator" else 1.0,
            bad=harmful and kind == "demonstrator",
        )
        for one in episodes:
            if harmful and kind == "rewards":
                one.rewards = -one.rewards
            if harmful and kind == "actions":
                one.actions = 4 - one.actions
        found.append(episodes)
    return Planted(found, bad)


def agent_of(sources: dict[int, list[Recording]], network: int, **settings: Any) -> sb3.Agent:
    """An agent with the recordings of some sources in its buffer, untrained."""
    model = DQN(
        "MlpPolicy",
        FiveTorques(),
        learning_rate=3e-3,
        gamma=0.9,
        buffer_size=60_000,
        target_update_interval=20,
        seed=network,
        policy_kwargs={"net_arch": [64, 64]},
        device="cpu",
    )
    agent = sb3.attach(model, **{"batch_size": BATCH, "seed": network, **settings})
    for source, episodes in sources.items():
        agent.add(copy.deepcopy(episodes), label=source)
    return agent


def ours(agent: sb3.Agent) -> None:
    """Each block bootstraps from its own target."""
    agent.learn_offline(UPDATES, progress=False)


def recipe(agent: sb3.Agent) -> None:
    """The published recipe: a row trains the mean of its exposed blocks, on the target of their mean.

    Source: Hiraoka et al. 2024 (arXiv 2405.14629), algorithm 2, for a value network.
    """
    model, buffer = agent.model, agent.buffer
    assert isinstance(model, DQN)
    random = np.random.default_rng(buffer.spec.seed)
    learned = torch.from_numpy(agent.learned()).float()
    online, target = agent.online[0].blocks, agent.targets[0].blocks
    optimizer = torch.optim.Adam(online.parameters(), lr=3e-3)
    for update in range(UPDATES):
        rows = random.integers(0, buffer.stored(), BATCH)
        data = buffer.at(rows)
        kept = learned[buffer.groups.reshape(-1)[rows]][..., None]
        with torch.no_grad():
            after = (target.each(data.next_observations) * kept).sum(dim=1) / kept.sum(dim=1)
            wanted = data.rewards + (1 - data.dones) * model.gamma * after.amax(1, keepdim=True)
        values = (online.each(data.observations) * kept).sum(dim=1) / kept.sum(dim=1)
        loss = functional.smooth_l1_loss(values.gather(1, data.actions.long()), wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if update % 20 == 19:
            target.load_state_dict(online.state_dict())


METHODS: dict[str, tuple[Callable[[sb3.Agent], None], Json]] = {
    "ours": (ours, {}),
    "half": (ours, {"keep": 0.5}),
    "recipe": (recipe, {}),
}

JUDGED = {
    "planted": (
        ("ours", "rewards"),
        ("ours", "actions"),
        ("half", "rewards"),
        ("recipe", "rewards"),
    ),
    "more": (("half", "actions"), ("recipe", "actions"), ("ours", "demonstrator")),
}
"""Methods and kinds of harm that each part of the benchmark compares."""


def auc(scores: NDArray[np.float64], bad: list[int]) -> float:
    """Probability that a harmful source has a higher score than another; ties count half."""
    clean = [one for one in range(SOURCES) if one not in bad]
    pairs = [np.sign(scores[b] - scores[c]) for b in bad for c in clean]
    return float((1 + np.mean(pairs)) / 2)


def returns_without(agent: sb3.Agent, labels: list[list[int]], episodes: int = 20) -> list[float]:
    """Mean return of the agent without each list of sources (or ghosts), on episodes of their own."""
    kept = np.stack([~agent.learned(one).any(axis=0) for one in labels])
    found = roll_out(
        agent.model,
        agent.keeping,
        kept,
        FiveTorques,
        episodes=episodes,
        seed=10_000,
        progress=False,
    )
    return [float(one) for one in found.returns.mean(axis=1)]


def _ghost_pairs(agent: sb3.Agent, count: int) -> list[list[int]]:
    pairs = [[-2 * one - 1, -2 * one - 2] for one in range(8 * count)]
    split = [pair for pair in pairs if not agent.learned(pair).any(axis=0).all()]
    return split[:count]


def judge(method: str, kind: str, data: int, network: int) -> Json:
    """One agent: what its influences say of the harmful sources."""
    made = planted(kind, data)
    train, settings = METHODS[method]
    agent = agent_of(dict(enumerate(made.sources)), network, **settings)
    train(agent)
    found = agent.influence(FiveTorques, episodes=5, ghosts=40, progress=False)
    apart = found.returns.hidden - found.returns.exposed
    clean = [one for one in range(SOURCES) if one not in made.bad]
    picked = {"regression": [int(one) for one in found.worst(BAD)]}
    picked["hidden minus exposed"] = [
        int(one) for one in np.argsort(-np.nan_to_num(apart, nan=-np.inf))[:BAD]
    ]
    ghosts = _ghost_pairs(agent, 10)
    lists = [[], *picked.values(), made.bad, *ghosts]
    possible = [not agent.learned(one).any(axis=0).all() if one else True for one in lists]
    returns = iter(
        returns_without(agent, [one for one, may in zip(lists, possible, strict=True) if may])
    )
    after = [next(returns) if may else None for may in possible]
    return {
        "bad": made.bad,
        "auc": {
            "regression": auc(-found.on_return.t, made.bad),
            "hidden minus exposed": auc(np.nan_to_num(apart, nan=-1e9), made.bad),
            "loss": auc(np.nan_to_num(found.loss.z, nan=-1e9), made.bad),
        },
        "t_bad": found.on_return.t[made.bad].tolist(),
        "t_clean": found.on_return.t[clean].tolist(),
        "ghosts_below_0.05": found.false_positives(),
        "loss_hidden_above_exposed": float((found.loss.hidden > found.loss.exposed).mean()),
        "picked": picked,
        "return": {
            "whole": after[0],
            **dict(zip(picked, after[1:3], strict=True)),
            "without the harmful": after[3],
            "ghosts": after[4:],
        },
    }


def left_out(data: int, trainings: int = 5) -> Json:
    """Leave each source out and train again, several times, beside the influences of one agent."""
    made = planted("rewards", data)
    everything = dict(enumerate(made.sources))
    settings = {"blocks": 4, "keep": 0.9999}

    def trained(sources: dict[int, list[Recording]], network: int) -> float:
        agent = agent_of(sources, 100 + network, **settings)
        ours(agent)
        return returns_without(agent, [[]])[0]

    whole = [trained(everything, network) for network in range(trainings)]
    without = [
        [
            trained({k: v for k, v in everything.items() if k != source}, network)
            for network in range(trainings)
        ]
        for source in range(SOURCES)
    ]
    effects = np.array(whole)[None] - np.array(without)
    found: list[ExperienceInfluence] = []
    for network in range(3):
        agent = agent_of(everything, network)
        ours(agent)
        found.append(agent.influence(FiveTorques, episodes=5, ghosts=20, progress=False))
    halves = np.corrcoef(effects[:, ::2].mean(axis=1), effects[:, 1::2].mean(axis=1))[0, 1]
    truth = effects.mean(axis=1)
    return {
        "bad": made.bad,
        "whole": whole,
        "effects": effects.tolist(),
        "reliability": float(2 * halves / (1 + halves)),
        "correlation": [float(np.corrcoef(one.on_return.effect, truth)[0, 1]) for one in found],
        "correlation of hidden minus exposed": [
            float(np.corrcoef(one.returns.exposed - one.returns.hidden, truth)[0, 1])
            for one in found
        ],
        "correlation of the mean": float(
            np.corrcoef(np.mean([one.on_return.effect for one in found], axis=0), truth)[0, 1]
        ),
    }
