"""Checks of the networks whose influence is estimated."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from turnover.dropout.network import Network
from turnover.errors import InputError


def distinct(
    network: Network | nn.Module | Sequence[Network | nn.Module],
) -> list[Network | nn.Module]:
    """The networks as a list; refuse none, and one that is given twice."""
    models = [network] if isinstance(network, Network | nn.Module) else list(network)
    if not models:
        raise InputError("no network given")
    if len({id(one.model if isinstance(one, Network) else one) for one in models}) < len(models):
        raise InputError(
            "one network is given twice, and would count double in the mean over networks"
        )
    return models


def attached(models: Sequence[Network | nn.Module], method: str) -> list[Network]:
    """The networks; refuse modules without masks, and networks of different sites."""
    networks = [one for one in models if isinstance(one, Network)]
    if len(networks) < len(models):
        raise InputError(
            f"method={method!r} needs the masks that a network was trained under: give one from "
            f'turnover.attach, or take method="gram" for a network that was trained without'
        )
    for one in networks[1:]:
        if one.sites != networks[0].sites:
            raise InputError(
                f"the networks have different sites, {networks[0].sites} and {one.sites}: attach the "
                f"same ones to all"
            )
    return networks
