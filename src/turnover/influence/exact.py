"""The exact estimator: the objective in the hidden minus in the exposed sub-network of every id.

A target runs once below the first site and on one row per id above it. Where in the model one row
becomes many is found by trying, from the innermost place outwards, and each place is compared with
the plain way (the target repeated at the model's inputs) before it is trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from turnover.batches import Batch
from turnover.errors import BindingError
from turnover.masks import ghost_ids
from turnover.network import Network
from turnover.objectives import Objective

_PROBE_START = 2**40
"""Ghosts used for comparing places; far from the noise floor's."""

_AT_SITE = "at the site"
_AT_INPUTS = "at the inputs"


class ExactEstimator:
    """Exact influence on one target at a time, sharing the work below the first site.

    Args:
        network: the network; its model should be in eval mode.
        objective: callable (outputs, batch) -> (rows,).
        block: ids in one forward.
    """

    def __init__(self, network: Network, objective: Objective, block: int) -> None:
        self._network = network
        self._objective = objective
        self._block = block
        self.place: str | None = None
        """Where one row becomes many: a module name, or at the site or the inputs."""

    def scores(self, target: Batch, ids: Tensor) -> Tensor:
        """Influence of ids on a target of one row: float32 (ids,)."""
        with torch.no_grad():
            if self.place is None:
                self.place = self._choose(target)
            parts = [
                self._cost(target, chunk, self.place, hidden=True)
                - self._cost(target, chunk, self.place, hidden=False)
                for chunk in torch.split(ids, self._block)
            ]
        return torch.cat(parts)

    def _cost(self, target: Batch, ids: Tensor, place: str, *, hidden: bool) -> Tensor:
        network, rows = self._network, len(ids)
        repeated = target.expanded(rows)
        shared = place != _AT_INPUTS
        binding = network._bind(ids, hidden, broadcast=shared)
        with network._context(binding), _expanding(network.model, place, rows):
            outputs = (target if shared else repeated).call(network.model)
        values = self._objective(outputs, repeated)
        if values.shape != (rows,):
            raise BindingError(
                f"the objective gave shape {tuple(values.shape)} for {rows} rows; it must be a callable "
                f"(outputs, batch) -> (rows,)"
            )
        return values.float()

    def _choose(self, target: Batch) -> str:
        ids = ghost_ids(3, start=_PROBE_START)
        plain = {h: self._cost(target, ids, _AT_INPUTS, hidden=h) for h in (False, True)}
        tolerance = 1e-2 if torch.is_autocast_enabled(plain[True].device.type) else 1e-5
        for place in self._places(target):
            try:
                same = all(
                    torch.allclose(
                        self._cost(target, ids, place, hidden=h), plain[h], tolerance, tolerance
                    )
                    for h in (False, True)
                )
            except Exception:  # noqa: BLE001 - any failure inside a foreign model rules the place out
                continue
            if same:
                return place
        return _AT_INPUTS

    def _places(self, target: Batch) -> Iterator[str]:
        yield _AT_SITE
        first = self._first_site(target)
        names = {id(module): name for name, module in self._network.model.named_modules()}
        path = names[id(self._network._sites[first].module)].split(".")
        for length in range(len(path), 0, -1):
            yield ".".join(path[:length])

    def _first_site(self, target: Batch) -> str:
        network = self._network
        with torch.enable_grad(), network._probing() as probes:
            target.call(network.model)
        return next(iter(probes))  # sites are recorded in the order in which they ran


@contextmanager
def _expanding(model: nn.Module, place: str, rows: int) -> Iterator[None]:
    """Repeat the first tensor that enters a module, where it has one row."""
    if place in (_AT_SITE, _AT_INPUTS):
        yield
        return

    def repeat(value: Any) -> Any:
        return value.expand(rows, *value.shape[1:]) if _is_one_row(value) else value

    def enter(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
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
