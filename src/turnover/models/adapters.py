"""LoRA components in a frozen encoder, by PEFT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


def add_lora(encoder: nn.Module, rank: int, targets: Sequence[str]) -> None:
    """Freeze an encoder and add LoRA to its linear layers.

    Args:
        encoder: a transformers model, changed in place.
        rank: of the components, one mask unit each.
        targets: names of the layers, or their ends; empty: all.
    """
    from peft import LoraConfig, inject_adapter_in_model

    encoder.requires_grad_(False)
    lora = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=list(targets) or "all-linear",
    )
    inject_adapter_in_model(lora, encoder)


def usual_targets(encoder: Any) -> tuple[str, ...]:
    """Ends of the layers that PEFT gives LoRA in an encoder of this type; empty if it knows none."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TARGETS

    return tuple(TARGETS.get(encoder.config.model_type) or ())


@contextmanager
def without_lora(encoder: nn.Module) -> Iterator[None]:
    """Run the encoder as it was pretrained."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [one for one in encoder.modules() if isinstance(one, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
