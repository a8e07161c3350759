"""Target networks: models that hold a network and a slow copy of it, as in reinforcement learning."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn

from turnover.dropout.modules import is_sharded
from turnover.dropout.sites import canonical_name
from turnover.errors import InputError

_TARGET_WORDS = frozenset({"target", "targ", "tgt", "ema", "teacher", "momentum", "old"})
_ONLINE_WORDS = frozenset({"online", "student", "live", "local", "current", "main", "policy"})
_GENERIC_WORDS = frozenset({"net", "network", "model", "module", "q"})


def check_targets(model: nn.Module, sites: Sequence[nn.Module]) -> None:
    """Refuse sites in both a network and its target, where an instance would have different masks.

    Pairs are recognized by names (``critic`` and ``critic_target``, ``online`` and ``target``), structure
    and equal weights, so that twin critics and copied layers pass.
    """
    masked = set(sites)
    for path, parent in model.named_modules():
        children = {name: child for name, child in parent.named_children() if name}
        targets = [name for name in children if not _TARGET_WORDS.isdisjoint(_words(name))]
        for target, online in product(targets, children):
            if not _is_target(target, online):
                continue
            first, second = (
                {name for name, module in children[one].named_modules() if module in masked}
                for one in (online, target)
            )
            if first & second and _are_equal(children[online], children[target]):
                one, other = (
                    canonical_name(f"{path}.{name}".strip(".")) for name in (online, target)
                )
                raise InputError(
                    f"the model holds {one!r} and its target {other!r}, in which an instance would have "
                    f"different masks: attach to each by itself, turnover.attach(model.{one}, ...) and "
                    f"turnover.attach(model.{other}, ...), whose masks agree, and open a context of each; "
                    f"or name sites of {one!r} alone"
                )


def _is_target(name: str, online: str) -> bool:
    """Whether a name with a word for target belongs to the target of an online network."""
    rest = [word for word in _words(name) if word not in _TARGET_WORDS]
    online_words = _words(online)
    if not _TARGET_WORDS.isdisjoint(online_words):
        return False
    if rest == online_words:
        return True
    plain = [word for word in online_words if word not in _ONLINE_WORDS]
    if len(plain) < len(online_words) and _specific(plain) == _specific(rest):
        return True
    return not _specific(rest) and not _specific(online_words)


def _specific(words: list[str]) -> list[str]:
    return [word for word in words if word not in _GENERIC_WORDS]


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]


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
