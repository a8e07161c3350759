"""Sites: find the modules to mask by names, glob patterns, module types and presets.

A site is a masked activation: the output of one module. Put it *after* the activation function; before
a sigmoid, dropped units would still reach the next layer's weights.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from turnover.dropout import lora
from turnover.dropout.blocks import BlockOutputs, Blocks
from turnover.dropout.head import WideHead
from turnover.errors import InputError

_LEADING = (["module"], ["base_model", "model"])
_ANYWHERE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


@dataclass(frozen=True)
class Site:
    """An activation to mask: one module's output, or blocks of an axis of it.

    Args:
        name: module name (canonical or as in ``named_modules``) or glob pattern.
        axis: axis of the output that holds the units; not 0, which is the batch. ``None``: 1 after a
            convolution, otherwise the last axis.
        unit_size: consecutive elements of the axis that form one unit (the width of an attention head).

    Raises:
        InputError: ``axis`` is 0 or ``unit_size`` < 1.
    """

    name: str
    axis: int | None = None
    unit_size: int = 1

    def __post_init__(self) -> None:
        if self.axis == 0:
            raise InputError(f"site {self.name!r}: axis 0 is the batch; units are on another axis")
        if self.unit_size < 1:
            raise InputError(f"site {self.name!r}: unit_size must be >= 1, got {self.unit_size}")


SiteLike = str | type[nn.Module] | Site


@dataclass(frozen=True)
class ResolvedSite:
    """A site in a model."""

    name: str
    """Canonical name, which does not change with wrappers; masks depend on it."""
    module: nn.Module
    axis: int
    unit_size: int
    units: int | None
    """Number of units; ``None``: the first forward determines it."""
    lora_layer: nn.Module | None = None
    """PEFT's layer around the module, which skips it when its weights are merged."""
    adapter: str = ""
    """Name of the module's adapter in that layer."""
    sequence_first: str | None = None
    """The module, this one or one around it, that has ``batch_first=False``."""

    def check_runs(self) -> None:
        """Refuse LoRA that does not run the module once on each row of the batch."""
        lora.check(self.name, self.lora_layer, self.adapter)


def canonical_name(name: str) -> str:
    """Module name without the parts that wrappers (DDP, torch.compile, PEFT, FSDP) add.

    The wrapped model itself has the canonical name ``""``.
    """
    parts = [part for part in name.split(".") if part not in _ANYWHERE]
    while prefix := next((one for one in _LEADING if parts[: len(one)] == one), None):
        parts = parts[len(prefix) :]
    return ".".join(parts)


def resolve(model: nn.Module, sites: SiteLike | Sequence[SiteLike]) -> list[ResolvedSite]:
    """Find the modules of the sites, each once, in the model's definition order."""
    requests = [sites] if isinstance(sites, str | type | Site) else list(sites)
    if not requests:
        raise InputError("no sites given: name at least one module, pattern, type or preset")
    everything = dict(model.named_modules())
    modules = {
        name: module
        for name, module in everything.items()
        if canonical_name(name) and not _is_spare(name, everything)
    }
    roots = {name: module for name, module in everything.items() if not canonical_name(name)}
    found: dict[str, Site] = {}
    for request in requests:
        site = request if isinstance(request, Site) else Site("")
        for name in _match(request, modules, roots):
            named = replace(site, name=canonical_name(name))
            if found.setdefault(name, named) != named:
                raise InputError(f"site {named.name!r} is requested twice, with different settings")
    predecessors = _predecessors(modules)
    resolved: dict[str, ResolvedSite] = {}
    for name, module in modules.items():
        if name not in found:
            continue
        site = found[name]
        source = module if _width(module) is not None else predecessors.get(name, module)
        axis = site.axis if site.axis is not None else (1 if _has_channels(source) else -1)
        width = _width(source) if site.axis is None and _is_certain(name, everything) else None
        if site.name in resolved:
            raise InputError(f"two modules have the canonical name {site.name!r}; rename one")
        units = None if width is None or width % site.unit_size else width // site.unit_size
        layer, adapter = lora.layer_of(name, everything)
        sequence_first = _sequence_first(name, everything)
        resolved[site.name] = ResolvedSite(
            site.name, module, axis, site.unit_size, units, layer, adapter, sequence_first
        )
        resolved[site.name].check_runs()
    return list(resolved.values())


def _match(
    request: SiteLike, modules: dict[str, nn.Module], roots: dict[str, nn.Module]
) -> list[str]:
    """Names of the modules that a request matches; presets also see the model itself (``roots``)."""
    if isinstance(request, type):
        names = [name for name, module in modules.items() if isinstance(module, request)]
        if not names:
            kinds = sorted({type(module).__name__ for module in modules.values()})
            raise InputError(
                f"no module of type {request.__name__} in the model; it has {', '.join(kinds)}"
            )
        return names
    if isinstance(request, str) and request in PRESETS:
        names = [name for name in PRESETS[request]({**roots, **modules}) if name in modules]
        if not names:
            raise InputError(
                f"preset {request!r} finds no site in this model: {PRESETS[request].__doc__}"
                f"{lora.missing_ranks(modules) if request == 'lora' else ''} "
                f"Name modules instead (as in model.named_modules())."
            )
        return names
    wanted = request if isinstance(request, str) else request.name
    known = {name: canonical_name(name) for name in modules}
    names = [
        name
        for name, canonical in known.items()
        if wanted in (name, canonical) or fnmatch.fnmatchcase(canonical, wanted)
    ]
    if not names:
        close = difflib.get_close_matches(wanted, [*known.values(), *PRESETS], n=5, cutoff=0.3)
        raise InputError(
            f"unknown site {wanted!r}: no module or preset has that name or matches it. "
            f"Closest: {', '.join(close or list(known.values())[:10])}"
        )
    return names


def _is_spare(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether PEFT runs a trained copy (``modules_to_save``) in place of the module."""
    parts = name.split(".")
    return any(
        part == "original_module" and ".".join([*parts[:index], "modules_to_save"]) in modules
        for index, part in enumerate(parts)
    )


def _width(module: nn.Module) -> int | None:
    attributes = ["out_features", "out_channels", "nf"]
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        attributes.append("num_features")  # of other modules, the width of a whole encoder
    for attribute in attributes:
        value = getattr(module, attribute, None)
        if isinstance(value, int):
            return value
    return None


def _is_certain(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the width of the module or of its predecessor is certain to be the width of its output.

    Only in an ``nn.Sequential`` is the definition order certain to be the order of the forward
    (DistilBERT defines its activation after both of its linear layers).
    """
    module, parent = modules[name], modules.get(name.rpartition(".")[0])
    if _width(module) is not None:
        return True
    elementwise = _is_activation(module) and not isinstance(module, nn.GLU)
    return elementwise and isinstance(parent, nn.Sequential | WideHead)


def _has_channels(module: nn.Module) -> bool:
    kinds = nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm | BlockOutputs
    return isinstance(module, kinds)


def _is_activation(module: nn.Module) -> bool:
    kind = type(module)
    if kind.__module__ == "torch.nn.modules.activation":
        return not isinstance(module, nn.MultiheadAttention | nn.Softmax | nn.LogSoftmax)
    return kind.__module__ == "transformers.activations"


def _predecessors(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """For each module, the nearest earlier module with a width, in definition order."""
    previous: nn.Module | None = None
    nearest = {}
    for name, module in modules.items():
        if previous is not None:
            nearest[name] = previous
        width = _width(module)
        normalizes = isinstance(module, nn.modules.batchnorm._BatchNorm) and (
            previous is not None and _width(previous) == width
        )
        # A batch norm keeps the layout of the layer that it follows.
        if width is not None and not normalizes:
            previous = module
    return nearest


def _sequence_first(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The module, this one or one around it, whose batch is on axis 1, behind the sequence."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        around = ".".join(parts[:length])
        if around in modules and _batch_first(modules[around]) is False:
            return f"{around or 'the model'} ({type(modules[around]).__name__})"
    return None


def _batch_first(module: nn.Module) -> bool | None:
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        return _batch_first(module.layers[0]) if len(module.layers) else None
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    return getattr(module, "batch_first", None)


def _head(modules: dict[str, nn.Module]) -> Iterable[str]:
    """the activation of every turnover.WideHead."""
    return [
        f"{name}.activation".removeprefix(".")
        for name, module in modules.items()
        if isinstance(module, WideHead)
    ]


def _mlp(modules: dict[str, nn.Module]) -> Iterable[str]:
    """activation modules that follow a linear layer."""
    return _activations_after(
        modules, lambda layer: isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D"
    )


def _lora(modules: dict[str, nn.Module]) -> Iterable[str]:
    """the rank components (outputs of lora_A) of PEFT's LoRA layers."""
    return [
        name
        for name, module in modules.items()
        if ".lora_A." in f".{name}" and isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    ]


def _channels(modules: dict[str, nn.Module]) -> Iterable[str]:
    """activation modules that follow a convolution or its batch norm."""
    return _activations_after(modules, _has_channels)


def _blocks(modules: dict[str, nn.Module]) -> Iterable[str]:
    """the blocks of every turnover.Blocks."""
    return [
        f"{name}.each_output".removeprefix(".")
        for name, module in modules.items()
        if isinstance(module, Blocks)
    ]


def _activations_after(
    modules: dict[str, nn.Module], accepts: Callable[[nn.Module], bool]
) -> list[str]:
    before = _predecessors(modules)
    return [
        n for n, m in modules.items() if _is_activation(m) and n in before and accepts(before[n])
    ]


PRESETS: dict[str, Callable[[dict[str, nn.Module]], Iterable[str]]] = {
    "head": _head,
    "mlp": _mlp,
    "lora": _lora,
    "channels": _channels,
    "blocks": _blocks,
}
"""Rules that find sites: preset name to a function of ``named_modules``."""
