"""Products of numbers with codes of +1 and -1 on a GPU, by its integer units.

A float32 number is written as three digits of 8 bits, in units of the largest number of its row. Products
of digits and codes are summed in 32-bit integers, which is exact, so scores are the same in blocks of any
size. What is left out is below 1e-7 of the row's largest number, for each number.
"""

from __future__ import annotations

import logging
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

_log = logging.getLogger(__name__)

_DIGITS, _LARGEST, _BASE = 3, 127, 254
_MULTIPLE = 32
"""Sizes of the matrices are multiples of it, which every GPU takes."""
_MOST_DRAWS = 2**24
"""Sums of more digits might overflow."""


class CodeProduct:
    """Rows of numbers, ready to be multiplied by the codes of any ids.

    Args:
        numbers: float32 (rows, draws), finite; draws are a multiple of 8.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._rows, draws = numbers.shape
        largest = numbers.abs().amax(dim=1, keepdim=True)
        rest = numbers / largest.clamp_min(torch.finfo(numbers.dtype).tiny) * _LARGEST
        digits = []
        for _ in range(_DIGITS):
            digits.append(rest.round())
            rest = (rest - digits[-1]) * _BASE
        padding = (0, -draws % _MULTIPLE, 0, -self._rows % _MULTIPLE)
        self._digits = functional.pad(torch.stack(digits), padding).to(torch.int8)
        self._scale = largest / _LARGEST  # (rows, 1)

    def into(self, packed: Tensor, out: Tensor) -> None:
        """Fill ``out``, float32 (rows, ids), with every row times the codes of every id.

        Args:
            packed: draws of the ids, uint8 (ids, draws / 8): 1 is +1 and 0 is -1.
            out: is filled.
        """
        ids, size = packed.shape
        codes = _codes(functional.pad(packed, (0, -size % (_MULTIPLE // 8), 0, -ids % _MULTIPLE)))
        sums = torch._int_mm(self._digits.flatten(0, 1), codes.T)
        high, *lower = sums.view(_DIGITS, -1, len(codes))[:, : self._rows, :ids]
        total = high.float()
        for place, digit in enumerate(lower, start=1):
            total.add_(digit, alpha=_BASE**-place)
        torch.mul(total, self._scale, out=out)


def usable(numbers: Tensor) -> bool:
    """Whether the numbers (rows, draws) are on a GPU that multiplies integers."""
    on_gpu = numbers.device.type == "cuda" and numbers.shape[1] < _MOST_DRAWS
    return on_gpu and _multiplies_integers(numbers.device)


@lru_cache(maxsize=16)
def _multiplies_integers(device: torch.device) -> bool:
    some = torch.zeros((_MULTIPLE, _MULTIPLE), dtype=torch.int8, device=device)
    try:
        torch._int_mm(some, some.T)
    except (AttributeError, RuntimeError) as error:
        _log.warning("linear scores are float32 products: no integer ones on %s: %s", device, error)
        return False
    return True


@lru_cache(maxsize=16)
def _table_on(device: torch.device) -> Tensor:
    """The eight codes of every byte, as one int64."""
    with torch.inference_mode(False):
        values = torch.arange(256, device="cpu")
        bits = (values[:, None] >> values[:8]) & 1
        return (2 * bits - 1).to(torch.int8).view(torch.int64).flatten().to(device)


def _codes(packed: Tensor) -> Tensor:
    """Codes, int8 (ids, draws)."""
    table = _table_on(packed.device)
    return table.index_select(0, packed.flatten().int()).view(torch.int8).view(len(packed), -1)
