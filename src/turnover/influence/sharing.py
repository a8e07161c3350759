"""Hooks by which the ids of a target share work in one forward."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from turnover.dropout.modules import in_this_thread
from turnover.dropout.network import Network
from turnover.errors import BindingError
from turnover.objectives import logits_of

_log = logging.getLogger(__name__)

AT_SITE = "at the site"
AT_INPUTS = "at the inputs"

AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Strategy:
    """How the ids of a target share work.

    Attributes:
        place: where one row becomes many: the inputs of a module, the site, or the model's inputs.
        split: site behind which hidden rows are derived from exposed ones, if any.
        affine: name of the module that derives them.
        logits: that module makes the logits, of the one masked site.
        elements: elements of the largest output of a module, for one row.
    """

    place: str
    split: str | None = None
    affine: str | None = None
    logits: bool = False
    elements: int = 1

    def __str__(self) -> str:
        if self.affine is None:
            return self.place
        return (
            f"{'one product with' if self.logits else 'hidden rows derived behind'} {self.affine}"
        )


def logits_in(outputs: Any) -> Tensor | None:
    """The logits in a model's outputs, if it has any."""
    try:
        return logits_of(outputs)
    except Exception:  # noqa: BLE001 - a user's outputs
        _log.debug("outputs without logits", exc_info=True)
        return None


def holds_nothing_else(outputs: Any) -> bool:
    """Whether outputs hold logits and nothing else for an objective to use."""
    if isinstance(outputs, Mapping):
        return set(outputs) == {"logits"}
    return isinstance(outputs, Tensor) or (isinstance(outputs, tuple | list) and len(outputs) == 1)


def with_logits(outputs: Any, logits: Tensor) -> Any:
    """Other logits, in outputs of the same kind."""
    if isinstance(outputs, Tensor):
        return logits
    if isinstance(outputs, Mapping):
        return type(outputs)(logits=logits)  # type: ignore[call-arg]
    return (logits,)


@contextmanager
def recording(modules: Any) -> Iterator[dict[int, Tensor]]:
    """The outputs of modules (of a tuple the first), by the modules' identity."""
    outputs: dict[int, Tensor] = {}

    def leave(module: nn.Module, _args: Any, output: Any) -> None:
        first = _first(output)
        if isinstance(first, Tensor):
            outputs[id(module)] = first

    with _hooked([module.register_forward_hook(in_this_thread(leave)) for module in modules]):
        yield outputs


@contextmanager
def _hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else output


@dataclass
class Trace:
    """Where a site's output went in a forward.

    Attributes:
        uses: how often the site ran.
        output: its last output.
        fed: linear and convolution layers that took that very tensor, and their outputs.
    """

    uses: int = 0
    output: Tensor | None = None
    fed: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    _versions: list[int] = field(default_factory=list)
    _version: int = 0

    def leave_site(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Forward hook of the site."""
        first = _first(output)
        if isinstance(first, Tensor):
            self.uses += 1
            self.output, self._version = first, _version(first)

    def leave_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the layers behind it."""
        given = args[0] if args else None
        if not isinstance(given, Tensor) or given is not self.output:
            return
        if (
            isinstance(output, Tensor) and _version(given) == self._version
        ):  # not written into since
            self.fed.append((module, output))
            self._versions.append(_version(output))

    def unchanged(self) -> Iterator[tuple[nn.Module, Tensor]]:
        """Layers whose outputs are as the layers returned them."""
        for (module, output), version in zip(self.fed, self._versions, strict=True):
            if _version(output) == version:
                yield module, output


def _version(tensor: Tensor) -> int:
    """Number of writes into a tensor."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def following(model: nn.Module, site: nn.Module) -> Iterator[Trace]:
    """Trace the output of a site."""
    trace = Trace()
    layers = [module for module in model.modules() if type(module) in AFFINE]
    handles = [site.register_forward_hook(in_this_thread(trace.leave_site))]
    leave_layer = in_this_thread(trace.leave_layer)
    handles += [layer.register_forward_hook(leave_layer) for layer in layers]
    with _hooked(handles):
        yield trace


@contextmanager
def deriving(network: Network, strategy: Strategy) -> Iterator[None]:
    """Behind the split, append the hidden rows to the exposed ones.

    For an affine layer f: ``f(whole) = keep * f(exposed) + (1 - keep) * f(hidden)``.
    """
    if strategy.affine is None:
        yield
        return
    keep = network.spec.keep

    layer = network.model.get_submodule(strategy.affine)
    forward, own = layer.forward, vars(layer).get("forward")

    def both(given: Tensor) -> Tensor:
        binding = network.masking.active
        if binding is None or given is not binding.exposed:
            return cast(Tensor, forward(given))
        assert binding.whole is not None
        if len(binding.whole) != 1 or _version(given):
            raise BindingError("the masked rows are not those of one row, or were written into")
        whole: Tensor = forward(binding.whole)
        rows = len(given)
        output = whole.new_empty((2 * rows, *whole.shape[1:]))
        if own is None and type(layer) is nn.Linear and layer.bias is not None and given.dim() == 2:
            torch.addmm(layer.bias, given, layer.weight.T, out=output[:rows])
        else:
            output[:rows] = forward(given)
        torch.add(whole / (1 - keep), output[:rows], alpha=-keep / (1 - keep), out=output[rows:])
        return output

    # A hook would have to copy all rows of the layer's output.
    layer.forward = both
    try:
        yield
    finally:
        del layer.forward
        if own is not None:  # of another library
            layer.forward = own


@contextmanager
def expanding(model: nn.Module, place: str, rows: int) -> Iterator[None]:
    """Repeat the first tensor that enters a module, if it has one row."""
    if place in (AT_SITE, AT_INPUTS):
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
    with _hooked([register(in_this_thread(enter), with_kwargs=True)]):
        yield


def _is_one_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1
