"""Tensors in: safetensors alone, checked against what they are for before any memory is taken for them.

A header says no more than the file holds, so that shapes that fit it are no larger than the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turnover.errors import InputError
from turnover.io.parsing import check_file

_LENGTH = 8
"""Bytes at the beginning of the file: the length of the header after them."""
_SHOWN = 3


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file of tensors, as safetensors opens it.

    Raises:
        InputError: no such file, or not safetensors, or a tensor that the body asks for is missing.
    """
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
    """Name and shape of every tensor; none of them is read.

    Raises:
        InputError: as :func:`opened`.
    """
    with opened(path) as tensors:
        return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def check_shapes(path: Path, wanted: Mapping[str, Tensor]) -> None:
    """Whether a file holds a model's tensors and no others, none of which has to be in memory.

    Raises:
        InputError: as :func:`opened`, or a tensor is missing, of another shape, or not the model's.
    """
    found = shapes(path)
    for name, value in wanted.items():
        if found.get(name) != tuple(value.shape):
            has = f"is {found[name]}" if name in found else "is missing"
            raise InputError(
                f"{path}: {name} {has} where {tuple(value.shape)} is needed: damaged, or of another model"
            )
    others = [name for name in found if name not in wanted]
    if others:
        raise InputError(f"{path}: holds {', '.join(others[:_SHOWN])}, which the model has not")


def read_weights(path: Path, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors.

    Args:
        wanted: what they take the place of: its shapes and kinds of numbers are asked for.

    Raises:
        InputError: as :func:`check_shapes`, integers in place of real numbers or the other way round, or NaN
            or infinities where there were none.
    """
    check_shapes(path, wanted)
    with opened(path) as tensors:
        found = {name: tensors.get_tensor(name) for name in wanted}
    for name, value in found.items():
        own = wanted[name]
        if value.is_floating_point() != own.is_floating_point():
            raise InputError(f"{path}: {name} is {value.dtype} where {own.dtype} is needed")
        check_finite(path, name, value, own)
    return found


def distinct(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model, each tensor under the first of its names: safetensors keeps no ties."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = value.detach()
    return found


def take(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put the state of :func:`distinct` back into a model with the same ties."""
    model.load_state_dict(state, strict=False)


def check_finite(path: Path, name: str, value: Tensor, own: Tensor | None = None) -> None:
    """Whether all numbers are.

    Args:
        own: what takes it, where infinities may be meant to be in it.

    Raises:
        InputError: NaN or infinities.
    """
    if not torch.isfinite(value).all() and (own is None or bool(torch.isfinite(own).all())):
        raise InputError(
            f"{path}: {name} holds NaN or infinite numbers; restore it, or train again"
        )
