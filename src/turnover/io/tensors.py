"""Read and write tensors as safetensors, checked against the model before memory is allocated.

A header may not claim more than the file holds, so shapes that fit it are no larger than the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from turnover.errors import InputError
from turnover.io.parsing import check_file

_LENGTH = 8
"""Bytes at the beginning of a file that hold the length of its header."""
_SHOWN = 3
_Model = TypeVar("_Model", bound=nn.Module)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Open a file of tensors with safetensors."""
    from safetensors import SafetensorError, safe_open

    check_file(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
        size = path.stat().st_size
        if size < _LENGTH or length > size - _LENGTH:
            raise InputError(
                f"{path}: missing or damaged: cannot be read as safetensors (its header would be {length} "
                f"bytes, and the file is {size})"
            )
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError, KeyError, TypeError, UnicodeError) as error:
        raise InputError(
            f"{path}: missing or damaged: cannot be read as safetensors ({error})"
        ) from error


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, from the header alone."""
    with opened(path) as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def check_shapes(path: Path, wanted: Mapping[str, Tensor], prefix: str = "") -> None:
    """Refuse a file that does not hold exactly a model's tensors, among names that begin with ``prefix``."""
    found = shapes(path)
    for name, value in wanted.items():
        if found.get(name) != tuple(value.shape):
            has = f"is {found[name]}" if name in found else "is missing"
            raise InputError(
                f"{path}: {name} {has} where {tuple(value.shape)} is needed: damaged, or of another model"
            )
    others = [name for name in found if name not in wanted and name.startswith(prefix)]
    if others:
        raise InputError(
            f"{path}: holds {', '.join(others[:_SHOWN])}, which the model does not have"
        )


def read_weights(path: Path, wanted: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors that replace a model's: same shapes and kinds of numbers, and no new NaN."""
    check_shapes(path, wanted, prefix)
    with opened(path) as tensors:
        found = {name: tensors.get_tensor(name) for name in wanted}
    for name, value in found.items():
        own = wanted[name]
        if value.is_floating_point() != own.is_floating_point():
            raise InputError(f"{path}: {name} is {value.dtype} where {own.dtype} is needed")
        check_finite(path, name, value, own)
    return found


def distinct(model: nn.Module) -> dict[str, Tensor]:
    """State of a model, each tensor under its first name only: safetensors does not store ties."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value.detach()
    return found


def write_model(path: Path, model: nn.Module) -> None:
    """Write the weights of a model."""
    from safetensors.torch import save_file

    save_file({name: value.cpu().contiguous() for name, value in distinct(model).items()}, path)


def read_model(path: Path, build: Callable[[], _Model]) -> _Model:
    """Build a model and read its weights from a file; returns it in eval mode.

    Shapes are compared before any memory is allocated for a model that the file does not hold.
    """
    with torch.device("meta"):
        check_shapes(path, distinct(build()))
    with torch.random.fork_rng(devices=[]):
        model = build()
    model.load_state_dict(read_weights(path, distinct(model)), strict=False)
    return model.eval()


def check_finite(path: Path, name: str, value: Tensor, own: Tensor | None = None) -> None:
    """Refuse NaN and infinities, unless the model's ``own`` value has some."""
    if not torch.isfinite(value).all() and (own is None or bool(torch.isfinite(own).all())):
        raise InputError(
            f"{path}: {name} holds NaN or infinite numbers; restore it, or train again"
        )
