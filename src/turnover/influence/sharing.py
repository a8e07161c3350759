"""How the ids of a target share work in one forward: what is followed, expanded and derived."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from turnover.dropout.modules import in_this_thread
from turnover.dropout.network import Network
from turnover.errors import BindingError
from turnover.objectives import logits_of

AT_SITE = "at the site"
AT_INPUTS = "at the inputs"

AFFINE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Strategy:
    """How the ids of a target are run.

    Attributes:
        place: the module at whose inputs one row becomes many, or at the site, or at the inputs.
        split: site behind which the hidden rows are derived, if any.
        affine: name of the module that does it.
        logits: that module makes the logits, from the one masked site.
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
    """The logits in a model's outputs, where there are any."""
    with suppress(Exception):
        return logits_of(outputs)
    return None


def holds_nothing_else(outputs: Any) -> bool:
    """Whether outputs hold logits and nothing else that an objective could look at."""
    if isinstance(outputs, Mapping):
        return set(outputs) == {"logits"}
    return isinstance(outputs, Tensor) or (isinstance(outputs, tuple | list) and len(outputs) == 1)


def rows_of(outputs: Any, rows: slice) -> Any:
    """Outputs that hold the logits of some rows alone."""
    return with_logits(outputs, logits_of(outputs)[rows])


def with_logits(outputs: Any, logits: Tensor) -> Any:
    """Other logits, in the kind of outputs that the objective knows."""
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
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor):
            outputs[id(module)] = first

    handles = [module.register_forward_hook(in_this_thread(leave)) for module in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Trace:
    """Where a site's output went in a forward.

    Attributes:
        uses: how often the site ran.
        output: its last output.
        fed: linear and convolution layers that were given that very tensor, and what they made of it.
    """

    uses: int = 0
    output: Tensor | None = None
    fed: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    _versions: list[int] = field(default_factory=list)
    _version: int = 0

    def leave_site(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Forward hook of the site."""
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor):
            self.uses += 1
            self.output, self._version = first, _version(first)

    def leave_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the layers that may be fed."""
        given = args[0] if args else None
        if (
            not isinstance(given, Tensor)
            or given is not self.output
            or not isinstance(output, Tensor)
        ):
            return
        if _version(given) == self._version:  # nothing was written into it on the way
            self.fed.append((module, output))
            self._versions.append(_version(output))

    def unchanged(self) -> Iterator[tuple[nn.Module, Tensor]]:
        """The layers whose outputs nothing was written into since."""
        for (module, output), version in zip(self.fed, self._versions, strict=True):
            if _version(output) == version:
                yield module, output


def _version(tensor: Tensor) -> int:
    """Counts what was written into a tensor."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def following(model: nn.Module, site: nn.Module) -> Iterator[Trace]:
    """Where the output of a site goes."""
    trace = Trace()
    layers = [module for module in model.modules() if type(module) in AFFINE]
    handles = [site.register_forward_hook(in_this_thread(trace.leave_site))]
    leave_layer = in_this_thread(trace.leave_layer)
    handles += [layer.register_forward_hook(leave_layer) for layer in layers]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def deriving(network: Network, strategy: Strategy) -> Iterator[None]:
    """Behind the split, put the hidden rows under the exposed ones.

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

    # A hook sees what the layer returned; writing to its place saves a copy of all rows.
    layer.forward = both
    try:
        yield
    finally:
        del layer.forward
        if own is not None:  # another library had put its own there
            layer.forward = own


@contextmanager
def expanding(model: nn.Module, place: str, rows: int) -> Iterator[None]:
    """Repeat the first tensor that enters a module, where it has one row."""
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
    handle = register(in_this_thread(enter), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _is_one_row(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == 1
