"""Per-example gradients of one layer, for a block of rows, in the form that is cheapest to keep.

Knows tensors alone: which layer they come from is for :mod:`turnover.influence.gram.rules`. Whatever
the form, the gradients are never projected or rounded: inner products are those of the full vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 2**24
"""Elements of a temporary: 64 MB."""


@dataclass(frozen=True)
class Factors(ABC):
    """Gradients of some rows by the trained parameters of a layer. Tensors are float32, rows first."""

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it is made of, by field."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(value.numel() * value.element_size() for value in self.tensors().values())

    def rows(self, start: int, stop: int) -> Self:
        """Some of the rows."""
        return replace(self, **{name: value[start:stop] for name, value in self.tensors().items()})

    @abstractmethod
    def explicit(self) -> Tensor:
        """The gradients themselves: float32 (rows, parameters)."""

    @abstractmethod
    def add_gram(self, other: Factors, out: Tensor) -> None:
        """Add the inner products with other rows of the same layer to ``out`` (rows, other rows)."""

    @classmethod
    @abstractmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The rows of all parts, one below another."""


def join(parts: Sequence[Factors]) -> Factors:
    """The rows of all parts; where their forms differ, explicitly."""
    if len(parts) == 1:
        return parts[0]
    if len({type(part) for part in parts}) > 1:
        parts = [Explicit(part.explicit()) for part in parts]
    return type(parts[0]).joined(parts)


@dataclass(frozen=True)
class Explicit(Factors):
    """The gradients themselves: ``matrix`` (rows, parameters)."""

    matrix: Tensor

    def explicit(self) -> Tensor:
        """See :class:`Factors`."""
        return self.matrix

    def add_gram(self, other: Factors, out: Tensor) -> None:
        """See :class:`Factors`."""
        if isinstance(other, Explicit):
            out.addmm_(self.matrix, other.matrix.T)
        else:
            _add_explicit(self, other, out)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """See :class:`Factors`."""
        return cls(torch.cat([part.matrix for part in parts]))


@dataclass(frozen=True)
class Outer(Factors):
    """One outer product for each row: ``back`` (rows, outputs) times ``inputs`` (rows, inputs).

    Attributes:
        inputs: what the layer was given.
        back: gradients of its outputs.
        bias: whether a bias is trained, too, which sees an input of 1.
    """

    inputs: Tensor
    back: Tensor
    bias: bool

    def explicit(self) -> Tensor:
        """See :class:`Factors`: the weight (outputs, inputs), then the bias."""
        weight = (self.back[:, :, None] * self.inputs[:, None, :]).flatten(1)
        return torch.cat([weight, self.back], dim=1) if self.bias else weight

    def add_gram(self, other: Factors, out: Tensor) -> None:
        """See :class:`Factors`."""
        if not isinstance(other, Outer):
            _add_explicit(self, other, out)
            return
        inputs = self.inputs @ other.inputs.T
        if self.bias:
            inputs.add_(1.0)
        out.addcmul_(inputs, self.back @ other.back.T)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """See :class:`Factors`."""
        inputs = torch.cat([part.inputs for part in parts])
        return cls(inputs, torch.cat([part.back for part in parts]), parts[0].bias)


@dataclass(frozen=True)
class Tokens(Factors):
    """A sum of outer products over tokens (or places of an image), within each group of channels.

    Attributes:
        inputs: (rows, groups, tokens, inputs of a group).
        back: gradients of the outputs (rows, groups, tokens, outputs of a group).
        bias: as in :class:`Outer`.
    """

    inputs: Tensor
    back: Tensor
    bias: bool

    @property
    def parameters(self) -> int:
        """Numbers in an explicit gradient, the bias apart."""
        return self.inputs.shape[1] * self.inputs.shape[3] * self.back.shape[3]

    def explicit(self) -> Tensor:
        """See :class:`Factors`: the weight (groups * outputs, inputs), then the bias."""
        weight = self._weight(0, self.back.shape[3])
        return torch.cat([weight, self._sums()], dim=1) if self.bias else weight

    def cheapest(self) -> Factors:
        """Itself, or the explicit gradients where these are no more numbers."""
        if self.back.shape[2] == 1 and self.back.shape[1] == 1:
            return Outer(self.inputs[:, 0, 0], self.back[:, 0, 0], self.bias)
        kept = (self.inputs.numel() + self.back.numel()) // max(len(self.back), 1)
        return Explicit(self.explicit()) if self.parameters <= kept else self

    def add_gram(self, other: Factors, out: Tensor) -> None:
        """See :class:`Factors`: over pairs of tokens, or by parts of the explicit gradients."""
        if not isinstance(other, Tokens):
            _add_explicit(self, other, out)
            return
        widths = self.inputs.shape[3] + self.back.shape[3]
        pairs = self.inputs.shape[2] * other.inputs.shape[2] * self.inputs.shape[1]
        if pairs * widths < self.parameters:
            self._add_pairs(other, out)
        else:
            self._add_parts(other, out)

    def _add_parts(self, other: Tokens, out: Tensor) -> None:
        groups, outputs = self.back.shape[1], self.back.shape[3]
        rows = max(len(self), len(other))
        step = max(1, _CHUNK // (rows * groups * self.inputs.shape[3]))
        for start in range(0, outputs, step):
            stop = min(start + step, outputs)
            one = self._weight(start, stop)
            two = one if other is self else other._weight(start, stop)
            out.addmm_(one, two.T)
        if self.bias:
            out.addmm_(self._sums(), other._sums().T)

    def _add_pairs(self, other: Tokens, out: Tensor) -> None:
        tokens = self.inputs.shape[2]
        across = other.inputs.shape[2] * len(other)
        step = max(1, _CHUNK // (tokens * across))
        for group in range(self.inputs.shape[1]):
            inputs = other.inputs[:, group].flatten(0, 1)
            back = other.back[:, group].flatten(0, 1)
            for start in range(0, len(self), step):
                part = self.rows(start, start + step)
                products = part.inputs[:, group].flatten(0, 1) @ inputs.T
                if self.bias:
                    products.add_(1.0)
                products.mul_(part.back[:, group].flatten(0, 1) @ back.T)
                split = products.view(len(part), tokens, len(other), -1)
                out[start : start + step].add_(split.sum(dim=(1, 3)))

    def _weight(self, start: int, stop: int) -> Tensor:
        back = self.back[..., start:stop].transpose(2, 3)
        return torch.matmul(back, self.inputs).flatten(1)

    def _sums(self) -> Tensor:
        return self.back.sum(dim=2).flatten(1)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """See :class:`Factors`: short rows are filled up with tokens whose gradient is 0."""
        tokens = max(part.inputs.shape[2] for part in parts)
        inputs = torch.cat([_filled(part.inputs, tokens) for part in parts])
        back = torch.cat([_filled(part.back, tokens) for part in parts])
        return cls(inputs, back, parts[0].bias)


@dataclass(frozen=True)
class Lookup(Factors):
    """Rows of a table that were looked up.

    Attributes:
        tokens: int64 (rows, tokens), entries of the table; -1: none.
        back: gradients of what was found, (rows, tokens, width).
        entries: length of the table.
    """

    tokens: Tensor
    back: Tensor
    entries: int

    def explicit(self) -> Tensor:
        """See :class:`Factors`: the table (entries, width)."""
        rows, _, width = self.back.shape
        table = self.back.new_zeros((rows, self.entries + 1, width))
        index = (self.tokens % (self.entries + 1))[..., None].expand_as(self.back)
        return table.scatter_add_(1, index, self.back)[:, :-1].flatten(1)

    def add_gram(self, other: Factors, out: Tensor) -> None:
        """See :class:`Factors`: entry by entry, over the rows that looked it up."""
        if not isinstance(other, Lookup):
            _add_explicit(self, other, out)
            return
        found = other._by_entry()
        for entry, (rows, back) in self._by_entry().items():
            if entry in found:
                others, other_back = found[entry]
                products = back @ other_back.T
                out[rows[:, None], others[None, :]] += products

    def _by_entry(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Rows that looked an entry up, and the sums of their gradients by it."""
        count = len(self.tokens)
        row = torch.arange(count, device=self.tokens.device)[:, None].expand_as(self.tokens)
        there = self.tokens >= 0
        keys = self.tokens[there] * count + row[there]
        unique, place = torch.unique(keys, return_inverse=True)
        sums = self.back.new_zeros((len(unique), self.back.shape[2]))
        sums.index_add_(0, place, self.back[there])
        entries, sizes = torch.unique_consecutive(unique // count, return_counts=True)
        lengths: list[int] = sizes.tolist()
        parts = zip(torch.split(unique % count, lengths), torch.split(sums, lengths), strict=True)
        return dict(zip(entries.tolist(), parts, strict=True))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """See :class:`Factors`."""
        longest = max(part.tokens.shape[1] for part in parts)
        tokens = [
            functional.pad(part.tokens, (0, longest - part.tokens.shape[1]), value=-1)
            for part in parts
        ]
        back = [
            functional.pad(part.back, (0, 0, 0, longest - part.back.shape[1])) for part in parts
        ]
        return cls(torch.cat(tokens), torch.cat(back), parts[0].entries)


def _filled(values: Tensor, tokens: int) -> Tensor:
    return functional.pad(values, (0, 0, 0, tokens - values.shape[2]))


def _add_explicit(one: Factors, other: Factors, out: Tensor) -> None:
    out.addmm_(one.explicit(), other.explicit().T)
