"""LoRA layers of PEFT: which kinds run ``lora_A`` once on each row of the batch, so that it can be masked."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from turnover.errors import InputError

_RUN_BY_ROW = frozenset({"MiCALinearVariant", "BdLoraLinearVariant", "KasaLinearVariant"})
"""Variants that run ``lora_A`` once on each row, as plain LoRA does."""
_WEIGHT_LAYERS = frozenset({"MultiheadAttention", "ParamWrapper"})
"""Layers of PEFT that add LoRA to a weight and never run ``lora_A``."""
_NAMES = {
    "adalora": "AdaLoRA",
    "ia3": "IA3",
    "loha": "LoHa",
    "lokr": "LoKr",
    "lora": "LoRA",
    "oft": "OFT",
    "boft": "BOFT",
    "randlora": "RandLoRA",
    "vblora": "VB-LoRA",
    "vera": "VeRA",
}
_FIX = (
    "use a plain peft.LoraConfig on linear layers or convolutions, or freeze the adapter and train a wide "
    'head alone (preset "head")'
)


def layer_of(name: str, modules: Mapping[str, nn.Module]) -> tuple[nn.Module | None, str]:
    """PEFT's layer around a LoRA module, and the name of the adapter; ``(None, "")`` for other modules."""
    for part in (".lora_A.", ".lora_B.", ".lora_dropout."):
        if part in name:
            layer, _, adapter = name.rpartition(part)
            return modules.get(layer), adapter
    return None, ""


def check(site: str, layer: nn.Module | None, adapter: str) -> None:
    """Refuse a site of an active adapter that does not run once on each row, or whose weights are merged."""
    if layer is None:
        return
    if adapter in getattr(layer, "active_adapters", [adapter]):
        _check_kind(site, layer, adapter)
    if getattr(layer, "merged", False):
        raise InputError(
            f"site {site!r} would never run: the adapter's weights are merged into the base layer, which "
            f"runs in place of lora_A, so nothing would be masked: call unmerge_adapter() first"
        )


def _check_kind(site: str, layer: nn.Module, adapter: str) -> None:
    kind = type(layer).__name__
    if type(layer).__module__.startswith("peft.") and kind in _WEIGHT_LAYERS:
        raise InputError(
            f"site {site!r} would never run: PEFT's {kind} adds LoRA to the weight and does not call "
            f"lora_A, so nothing would be masked: {_FIX}"
        )
    variant = type(getattr(layer, "lora_variant", {}).get(adapter)).__name__
    if adapter in getattr(layer, "lora_magnitude_vector", {}):
        raise InputError(
            f"site {site!r} belongs to a DoRA adapter, which is not supported: DoRA scales the layer by "
            f"the norm of its whole weight, so every instance reaches every sub-network: leave "
            f"use_dora=True out, or {_FIX}"
        )
    if variant not in _RUN_BY_ROW and variant != "NoneType":
        raise InputError(
            f"site {site!r} belongs to an adapter of the kind {variant.removesuffix('LinearVariant')}, "
            f"which does not run lora_A once for each row of the batch: {_FIX}"
        )


def missing_ranks(modules: Mapping[str, nn.Module]) -> str:
    """Explain why a model with an adapter has no rank components; empty without an adapter."""
    kinds = {
        type(module).__module__.split(".")[2]
        for module in modules.values()
        if type(module).__module__.startswith("peft.tuners.")
        and hasattr(module, "adapter_layer_names")
    }
    if not kinds:
        return ""
    names = " and ".join(sorted(_NAMES.get(kind, kind) for kind in kinds))
    where = " of an embedding or a parameter" if kinds == {"lora"} else ""
    return (
        f" The model's adapter is {names}{where}, which has no module that computes rank components, so "
        f"they cannot be masked: {_FIX}."
    )
