"""The exact estimator: the objective in the hidden minus in the exposed sub-network of every id.

A target runs once below the first site and on one row per id above it. Where in the model one row
becomes many is found by trying, from the innermost place outwards, and each place is compared with
the plain way (the target repeated at the model's inputs) before it is trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from turnover.batches import Batch, shapes
from turnover.influence.linear import check_reached
from turnover.masks import ghost_ids
from turnover.network import Network
from turnover.objectives import Objective, costs

_PROBE_START = 2**40
"""Ghosts used for comparing places; far from the noise floor's."""
_PROBES = 3

_AT_SITE = "at the site"
_AT_INPUTS = "at the inputs"


class ExactEstimator:
    """Exact influence on one target at a time, sharing the work below the first site.

    Args:
        network: the network; its model should be in eval mode.
        objective: callable (outputs, batch) -> (rows,).
        block: ids in one forward.
        sites: masked sites; at others the network runs whole. ``None``: all.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        block: int,
        sites: Sequence[str] | None = None,
    ) -> None:
        self._network = network
        self._objective = objective
        self._block = block
        self._sites = network.sites if sites is None else list(sites)
        self._checked: dict[tuple[tuple[int, ...], ...], str] = {}
        self.place: str | None = None
        """Where one row becomes many: a module name, or at the site or the inputs."""

    def scores(self, target: Batch, ids: Tensor) -> Tensor:
        """Influence of ids on a target of one row: float32 (ids,)."""
        with torch.no_grad():
            # A place that serves inputs of one shape may not serve those of another.
            seen = shapes(target.inputs)
            if seen not in self._checked:
                self._checked[seen] = self._choose(target)
            self.place = self._checked[seen]
            parts = [self._difference(target, c, self.place) for c in torch.split(ids, self._block)]
        return torch.cat(parts)

    def _difference(self, target: Batch, ids: Tensor, place: str) -> Tensor:
        exposed = self._cost(target, ids, place, hidden=False)
        return self._cost(target, ids, place, hidden=True) - exposed

    def _cost(self, target: Batch, ids: Tensor, place: str, *, hidden: bool) -> Tensor:
        network, rows = self._network, len(ids)
        repeated = target.expanded(rows)
        shared = place != _AT_INPUTS
        binding = network._bind(ids, hidden, broadcast=shared, sites=self._sites)
        with network._context(binding), _expanding(network.model, place, rows):
            outputs = (target if shared else repeated).call(network.model)
        return costs(self._objective, outputs, repeated)

    def _choose(self, target: Batch) -> str:
        ids = ghost_ids(_PROBES, start=_PROBE_START)
        plain = {h: self._cost(target, ids, _AT_INPUTS, hidden=h) for h in (False, True)}
        tolerance = 1e-2 if self._is_coarse(plain[True].device.type) else 1e-5
        for place in self._places(target):
            # Whatever fails inside a foreign model rules the place out, and nothing else.
            with suppress(Exception):
                if all(
                    torch.allclose(
                        self._cost(target, ids, place, hidden=h), plain[h], tolerance, tolerance
                    )
                    for h in (False, True)
                ):
                    return place
        return _AT_INPUTS

    def _is_coarse(self, device_type: str) -> bool:
        parameter = next(self._network.model.parameters(), None)
        half = parameter is not None and parameter.dtype in (torch.float16, torch.bfloat16)
        return half or torch.is_autocast_enabled(device_type)

    def _places(self, target: Batch) -> Iterator[str]:
        if self.place is not None:
            yield self.place
        yield _AT_SITE
        first = self._first_site(target)
        names = {id(module): name for name, module in self._network.model.named_modules()}
        path = names[id(self._network._sites[first].module)].split(".")
        for length in range(len(path), 0, -1):
            yield ".".join(path[:length])

    def _first_site(self, target: Batch) -> str:
        network = self._network
        with torch.enable_grad(), network._probing(self._sites) as probes:
            target.call(network.model)
        check_reached(self._sites, probes)
        return next(iter(probes))  # sites are recorded in the order in which they ran


@contextmanager
def _expanding(model: nn.Module, place: str, rows: int) -> Iterator[None]:
    """Repeat the first tensor that enters a module, where it has one row."""
    if place in (_AT_SITE, _AT_INPUTS):
        yield
        return

    def repeat(value: Any) -> Any:
        return value.expand(rows, *value.shape[1:]) if _is_one_row(value) else value

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (repeat(args[0]), *args[1:]), kwargs
        first = next((key for key, value in kwargs.items() if _is_one_row(value)), None)
        return args, {key: repeat(v) if key == first else v for key, v in kwargs.items()}

    register: Callable[..., Any] = model.get_submodule(place).register_forward_pre_hook
    handle = register(enter, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _is_one_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1
