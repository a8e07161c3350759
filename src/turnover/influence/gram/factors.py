"""Gradients of one layer for a block of rows, in the cheapest exact form.

This module knows tensors only; :mod:`turnover.influence.gram.rules` knows the layers. No form projects
or rounds: inner products are those of the full gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from turnover.influence.gram.sides import Maps, Moments, Numbers, Sides, mapped, second_moment

_ROUNDING = 1e-5
"""Share of a row's largest gradient of an output up to which a token's may be rounding error."""
_CHUNK = 2**24
"""Elements of a temporary: 64 MB."""
_SUM = 2**15
"""Numbers in a sum."""
_SQUARE = 256
"""Rows whose products with all rows before them are computed together."""


@dataclass(frozen=True)
class Factors(ABC):
    """Gradients of some rows by the trained parameters of a layer.

    All tensors have the rows first, and are float32 where not stated otherwise.

    Attributes:
        ready: whether inner products are those of the tensors, and nothing is made of these before.
    """

    ready: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(value.numel() * value.element_size() for value in self.tensors().values())

    def rows(self, start: int, stop: int) -> Self:
        """The rows from start to stop."""
        return replace(self, **{name: value[start:stop] for name, value in self.tensors().items()})

    @abstractmethod
    def explicit(self) -> Tensor:
        """The gradients themselves: float32 (rows, parameters)."""

    def cheapest(self) -> Factors:
        """The form of these gradients that holds the fewest numbers."""
        return self

    @abstractmethod
    def moments(self) -> Moments:
        """Second moments of the inputs and of the gradients of the outputs."""

    @abstractmethod
    def whitened(self, maps: Maps) -> Factors:
        """The gradients after linear maps of both sides."""

    def joins(self, other: Factors) -> bool:  # noqa: ARG002
        """Whether :func:`join` may make one of both, though explicit gradients are large."""
        return True

    def add_gram(self, other: Factors, out: Tensor) -> None:
        """Add the inner products with other rows of the same layer to ``out`` (rows, other rows)."""
        if isinstance(other, type(self)):
            self._add_products(other, out)
        else:
            add_product(out, self.explicit(), other.explicit())

    def _add_products(self, other: Self, out: Tensor) -> None:
        """:meth:`add_gram` for two factors of one form."""
        add_product(out, self.explicit(), other.explicit())

    def add_own_gram(self, out: Tensor) -> None:
        """Add the inner products of the rows with one another to ``out`` (rows, rows).

        Those above the diagonal may be left out.
        """
        self.add_gram(self, out)


def add_product(out: Tensor, one: Tensor, other: Tensor) -> None:
    """Add ``one other'`` to ``out``.

    A product that begins with what is there, or is a long sum, loses the numbers that are small beside it:
    up to 5e-4 of the diagonal of a language model's words.
    """
    total: Tensor | None = None
    for left, right in zip(torch.split(one, _SUM, 1), torch.split(other, _SUM, 1), strict=True):
        products = left @ right.T
        total = products if total is None else total.add_(products)
    if total is not None:
        out.add_(total)


def add_own_product(out: Tensor, one: Tensor) -> None:
    """Add ``one one'`` to ``out`` but for most of what is above its diagonal, which is the same as below."""
    for start in range(0, len(one), _SQUARE):
        stop = start + _SQUARE
        add_product(out[start:stop, :stop], one[start:stop], one[:stop])


def join(parts: Sequence[Factors]) -> Factors:
    """The rows of all parts; explicit gradients where the forms differ."""
    if len(parts) == 1:
        return parts[0]
    if len({type(part) for part in parts}) > 1:
        parts = [Explicit(part.explicit()) for part in parts]
    names = parts[0].tensors()
    joined = {name: _padded([part.tensors()[name] for part in parts]) for name in names}
    return replace(parts[0], **joined)


def _padded(values: Sequence[Tensor]) -> Tensor:
    """All rows; short ones are padded with tokens of gradient 0, in a :class:`Lookup` of entry -1."""
    shape = [max(sizes) for sizes in zip(*(value.shape[1:] for value in values), strict=True)]
    fill = 0 if values[0].is_floating_point() else -1
    padded = []
    for value in values:
        missing = [wanted - size for wanted, size in zip(shape, value.shape[1:], strict=True)]
        sides = [side for count in reversed(missing) for side in (0, count)]
        padded.append(functional.pad(value, sides, value=fill) if any(missing) else value)
    return torch.cat(padded)


@dataclass(frozen=True)
class Explicit(Factors):
    """The gradients themselves: ``matrix`` (rows, parameters)."""

    ready: ClassVar[bool] = True
    matrix: Tensor

    def explicit(self) -> Tensor:
        """See :class:`Factors`."""
        return self.matrix

    def add_own_gram(self, out: Tensor) -> None:
        """See :class:`Factors`."""
        add_own_product(out, self.matrix)

    def moments(self) -> Moments:
        """See :class:`Factors`: the parameters' own, as there are no sides."""
        return Numbers(self.matrix.square().sum(dim=0))

    def whitened(self, maps: Maps) -> Factors:
        """See :class:`Factors`."""
        if maps.inputs is None:
            return Explicit(self.matrix * maps.back)
        rows, groups = len(self.matrix), len(maps.back)
        inputs, outputs = maps.inputs.shape[1], maps.back.shape[1]
        matrix = self.matrix
        if maps.bias:  # from behind the weight to a column of it
            weight, bias = matrix.tensor_split([groups * outputs * (inputs - 1)], dim=1)
            weight = weight.view(rows, groups, outputs, inputs - 1)
            matrix = torch.cat([weight, bias.view(rows, groups, outputs, 1)], dim=3)
        turned = mapped(matrix.view(rows, groups, outputs, inputs), maps.inputs)
        return Explicit(mapped(turned.mT, maps.back).mT.flatten(1))


@dataclass(frozen=True)
class Outer(Factors):
    """One outer product for each row: ``back`` (rows, outputs) times ``inputs`` (rows, inputs).

    Attributes:
        inputs: the layer's inputs.
        back: gradients of its outputs.
        bias: whether a bias is trained too; its input is 1.
    """

    ready: ClassVar[bool] = True
    inputs: Tensor
    back: Tensor
    bias: bool

    def explicit(self) -> Tensor:
        """See :class:`Factors`: the weight (outputs, inputs), then the bias."""
        weight = (self.back[:, :, None] * self.inputs[:, None, :]).flatten(1)
        return torch.cat([weight, self.back], dim=1) if self.bias else weight

    def moments(self) -> Moments:
        """See :class:`Factors`."""
        return self._as_tokens().moments()

    def whitened(self, maps: Maps) -> Factors:
        """See :class:`Factors`: with a bias, its input becomes one of the others."""
        return self._as_tokens().whitened(maps).cheapest()

    def _as_tokens(self) -> Tokens:
        return Tokens(self.inputs[:, None, None], self.back[:, None, None], self.bias)

    def _add_products(self, other: Self, out: Tensor) -> None:
        inputs = self.inputs @ other.inputs.T
        if self.bias:
            inputs.add_(1.0)
        out.addcmul_(inputs, self.back @ other.back.T)

    def add_own_gram(self, out: Tensor) -> None:
        """See :class:`Factors`."""
        for start in range(0, len(self), _SQUARE):
            stop = start + _SQUARE
            self.rows(start, stop)._add_products(self.rows(0, stop), out[start:stop, :stop])


@dataclass(frozen=True)
class Tokens(Factors):
    """A sum of outer products over tokens (or image positions), within each group of channels.

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
        """Numbers in an explicit gradient, without the bias."""
        return self.inputs.shape[1] * self.inputs.shape[3] * self.back.shape[3]

    def explicit(self) -> Tensor:
        """See :class:`Factors`: the weight (groups * outputs, inputs), then the bias."""
        weight = self._weight(0, self.back.shape[3])
        return torch.cat([weight, self._sums()], dim=1) if self.bias else weight

    def moments(self) -> Moments:
        """See :class:`Factors`: of the tokens that have a gradient, beyond rounding."""
        sizes = self.back.abs().amax(dim=3)  # (rows, groups, tokens)
        seen = sizes > _ROUNDING * sizes.amax(dim=(1, 2), keepdim=True)
        inputs = (self._inputs_with_bias() * seen[..., None]).transpose(0, 1).flatten(1, 2)
        back = self.back.transpose(0, 1).flatten(1, 2)
        count = int(seen.any(dim=1).sum())
        return Sides(second_moment(inputs), second_moment(back), count, bias=self.bias)

    def whitened(self, maps: Maps) -> Factors:
        """See :class:`Factors`: with a bias, its input becomes one of the others."""
        if maps.inputs is None:
            return Explicit(self.explicit()).whitened(maps)
        inputs = mapped(self._inputs_with_bias(), maps.inputs)
        return Tokens(inputs, mapped(self.back, maps.back), bias=False)

    def _inputs_with_bias(self) -> Tensor:
        if not self.bias:
            return self.inputs
        return torch.cat([self.inputs, torch.ones_like(self.inputs[..., :1])], dim=3)

    def cheapest(self) -> Factors:
        """See :class:`Factors`."""
        if self.back.shape[2] == 1 and self.back.shape[1] == 1:
            return Outer(self.inputs[:, 0, 0], self.back[:, 0, 0], self.bias)
        kept = (self.inputs.numel() + self.back.numel()) // max(len(self.back), 1)
        return Explicit(self.explicit()) if self.parameters <= kept else self

    def _add_products(self, other: Self, out: Tensor) -> None:
        if self._has_few_pairs(other):
            self._add_by_pairs(other, out)
            return
        for start, stop in self._outputs(max(len(self), len(other))):
            add_product(out, self._weight(start, stop), other._weight(start, stop))
        if self.bias:
            add_product(out, self._sums(), other._sums())

    def add_own_gram(self, out: Tensor) -> None:
        """See :class:`Factors`."""
        if self._has_few_pairs(self):
            self._add_by_pairs(self, out)
            return
        for start, stop in self._outputs(len(self)):
            add_own_product(out, self._weight(start, stop))
        if self.bias:
            add_own_product(out, self._sums())

    def _has_few_pairs(self, other: Self) -> bool:
        """Whether products of pairs of tokens are fewer than those of the explicit gradients."""
        widths = self.inputs.shape[3] + self.back.shape[3]
        pairs = self.inputs.shape[2] * other.inputs.shape[2] * self.inputs.shape[1]
        return pairs * widths < self.parameters

    def _outputs(self, rows: int) -> Iterator[tuple[int, int]]:
        """Outputs by which the explicit gradients of some rows fit in a temporary: first, and last + 1."""
        groups, outputs = self.back.shape[1], self.back.shape[3]
        step = max(1, _CHUNK // (rows * groups * self.inputs.shape[3]))
        for start in range(0, outputs, step):
            yield start, min(start + step, outputs)

    def _add_by_pairs(self, other: Self, out: Tensor) -> None:
        """Over pairs of tokens, some rows at a time."""
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


@dataclass(frozen=True)
class Lookup(Factors):
    """Entries looked up in a table.

    Attributes:
        tokens: int64 (rows, tokens), entries of the table; -1: none.
        back: gradients of the vectors found, (rows, tokens, width).
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

    def cheapest(self) -> Factors:
        """See :class:`Factors`."""
        return Explicit(self.explicit()) if self.entries <= self.tokens.shape[1] else self

    def moments(self) -> Moments:
        """See :class:`Factors`: of each number alone, as entries differ in how often they are met."""
        entries, _, sums = self._summed()
        squares = sums.new_zeros((self.entries, sums.shape[1]))
        return Numbers(squares.index_add_(0, entries, sums.square()).flatten())

    def whitened(self, maps: Maps) -> Factors:
        """See :class:`Factors`."""
        if maps.inputs is not None:
            return Explicit(self.explicit()).whitened(maps)
        factor = maps.back[0].view(self.entries, -1)
        return replace(self, back=self.back * factor[self.tokens.clamp_min(0)])

    def _add_products(self, other: Self, out: Tensor) -> None:
        found = other._by_entry()
        for entry, (rows, back) in self._by_entry().items():
            if entry in found:
                others, other_back = found[entry]
                out[rows[:, None], others[None, :]] += back @ other_back.T

    def _by_entry(self) -> dict[int, tuple[Tensor, Tensor]]:
        """The rows that looked up an entry, and the sums of their gradients by it."""
        every, rows, sums = self._summed()
        entries, sizes = torch.unique_consecutive(every, return_counts=True)
        lengths: list[int] = sizes.tolist()
        parts = zip(torch.split(rows, lengths), torch.split(sums, lengths), strict=True)
        return dict(zip(entries.tolist(), parts, strict=True))

    def _summed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of the gradients by each entry and row: the entries, ascending, the rows, the sums."""
        count = len(self.tokens)
        row = torch.arange(count, device=self.tokens.device)[:, None].expand_as(self.tokens)
        present = self.tokens >= 0
        keys = self.tokens[present] * count + row[present]
        unique, position = torch.unique(keys, return_inverse=True)
        sums = self.back.new_zeros((len(unique), self.back.shape[2]))
        sums.index_add_(0, position, self.back[present])
        return unique // count, unique % count, sums
