"""The wide head, and losses of rows in their exposed and hidden sub-networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

import turnover
from turnover.evaluation import Build, Masked
from turnover.evaluation.training import State

_ROWS = 500


HEAD = Masked(("head",))


def wide_head(x: Tensor, units: int, classes: int) -> Build:
    """Wide heads on features that look like ``x``."""

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = turnover.WideHead(x.shape[1], units, classes)
        head.standardize(x)
        return nn.Sequential(head)

    return build


@contextmanager
def attached(build: Build, state: State, masked: Masked, seed: int) -> Iterator[turnover.Network]:
    """A trained network in eval mode, under the masks that it was trained with."""
    model = build(seed).eval()
    model.load_state_dict(state)
    network = turnover.attach(model, list(masked.sites), masked.spec(seed))
    yield network
    network.detach()


def outputs(network: turnover.Network, x: Tensor, ids: Tensor | None, *, hidden: bool) -> Tensor:
    """Logits (rows, classes) of rows under the masks of their ids; without ids of the whole network."""
    found = []
    with torch.no_grad():
        for rows in torch.split(torch.arange(len(x)), _ROWS):
            if ids is None:
                context = network.mean()
            else:
                context = network.hidden(ids[rows]) if hidden else network.exposed(ids[rows])
            with context:
                found.append(network.model(x[rows]))
    return torch.cat(found)


def losses(
    network: turnover.Network, x: Tensor, y: Tensor, ids: Tensor | None, *, hidden: bool = False
) -> Tensor:
    """Cross entropy (rows,) of rows under the masks of their ids; without ids of the whole network."""
    found = outputs(network, x, ids, hidden=hidden)
    return functional.cross_entropy(found, y, reduction="none")


def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (rows, classes) of a plain network."""
    with torch.no_grad():
        return torch.cat([model(part) for part in torch.split(x, _ROWS)])


def centre(values: Tensor) -> list[float]:
    """Mean and half width of its 95% interval."""
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    return [round(float(values.mean()), 4), round(half, 4)]
