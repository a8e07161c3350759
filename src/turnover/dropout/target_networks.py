"""Target networks: models that hold a network and a slow copy of it, as in reinforcement learning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from turnover.dropout.modules import is_sharded
from turnover.dropout.sites import canonical_name
from turnover.errors import InputError

_SLOW = frozenset({"target", "targ", "tgt", "ema", "teacher", "momentum", "old"})
_ONLINE = frozenset({"online", "student", "live", "local", "current", "main", "policy"})
_FILLING = frozenset({"net", "network", "model", "module", "q"})


def check_targets(model: nn.Module, sites: Sequence[nn.Module]) -> None:
    """Refuse sites in both a network and its target, where an instance would have different masks.

    Pairs are recognized by names (``critic`` and ``critic_target``, ``online`` and ``target``), structure
    and equal weights, so that twin critics and copied layers pass.

    Args:
        model: the model.
        sites: the modules to mask.

    Raises:
        InputError: the message names both.
    """
    masked = set(sites)
    for parent, holder in model.named_modules():
        children = {name: child for name, child in holder.named_children() if name}
        for online, slow in _pairs(list(children)):
            first, second = _masked(children[online], masked), _masked(children[slow], masked)
            if first & second and _are_equal(children[online], children[slow]):
                one, other = (
                    canonical_name(f"{parent}.{name}".strip(".")) for name in (online, slow)
                )
                raise InputError(
                    f"the model holds {one!r} and its target {other!r}, in which an instance would have "
                    f"different masks: attach to each by itself, turnover.attach(model.{one}, ...) and "
                    f"turnover.attach(model.{other}, ...), whose masks agree, and open a context of each; "
                    f"or name sites of {one!r} alone"
                )


def _pairs(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names of a network and of its target."""
    for slow in names:
        words = _words(slow)
        rest = [word for word in words if word not in _SLOW]
        if len(rest) == len(words):
            continue
        for online in names:
            others = _words(online)
            if _SLOW.isdisjoint(others) and _are_counterparts(rest, others):
                yield online, slow


def _are_counterparts(rest: list[str], online: list[str]) -> bool:
    """Whether a target's name, without the word for target, is the name of the online network."""
    if rest == online:
        return True
    plain = [word for word in online if word not in _ONLINE]
    if len(plain) < len(online) and _core(plain) == _core(rest):
        return True
    return not _core(rest) and not _core(online)


def _core(words: list[str]) -> list[str]:
    return [word for word in words if word not in _FILLING]


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]


def _masked(network: nn.Module, sites: set[nn.Module]) -> set[str]:
    return {name for name, module in network.named_modules() if module in sites}


def _are_equal(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    if not first or list(first) != list(second):
        return False
    pairs = [(first[name], second[name]) for name in first]
    return all(isinstance(a, Tensor) and isinstance(b, Tensor) and _same(a, b) for a, b in pairs)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta or is_sharded(one) or is_sharded(other):
        return False
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.equal(one, other)
