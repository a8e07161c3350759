"""Whether axis 0 of what a site gives is the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_functorch: Any = torch._C._functorch

VMAPPED = (
    "the model runs in torch.func.vmap, within which a row has no place in the batch: open a context for "
    "each row outside of vmap, or loop over the rows"
)


def sequence_first(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Which module, this one or one around it, says that sequences are on axis 0, and the batch on axis 1.

    Args:
        name: of a module.
        modules: all modules, by name.
    """
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


def is_ambiguous(output: Tensor) -> bool:
    """Whether an output with sequences first could be one with the batch first, by its shape."""
    return output.dim() > 2 and output.shape[0] == output.shape[1] > 1


def is_vmapped_over_rows(output: Tensor, rows: int, model: nn.Module) -> bool:
    """Whether ``torch.func.vmap`` goes over the rows of the batch.

    Where it goes over the parameters of several models, each of them has the whole batch.
    """
    if not _functorch.is_functorch_wrapped_tensor(output):
        return False
    sizes = list(_vmapped(output))
    if not sizes or any(size for parameter in model.parameters() for size in _vmapped(parameter)):
        return False
    return rows in sizes or len(output) != rows


def _vmapped(value: Tensor) -> Iterator[int]:
    """Sizes of the axes that vmap hides."""
    while _functorch.is_functorch_wrapped_tensor(value):
        inner = _functorch.get_unwrapped(value)
        if _functorch.is_batchedtensor(value):
            yield inner.shape[_functorch.maybe_get_bdim(value)]
        value = inner
