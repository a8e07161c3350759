"""Gradients of the weight between words and numbers: an output head's, alone or tied to an embedding.

The gradients of a text's logits are its tokens times the vocabulary, far more than all other numbers of the
row. Those of a cross entropy are ``scale * (softmax(logits) - label)`` at each token, so :class:`Softmax`
keeps the head's inputs, and computes them again for some entries of the vocabulary at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

from turnover.errors import InputError
from turnover.influence.gram.factors import Explicit, Factors, Lookup, add_product
from turnover.influence.gram.sides import Maps, Moments, Numbers

_CHUNK = 2**24
"""Elements of a temporary: 64 MB."""
_WIDER = 2
"""Outputs for each input that only layers with a vocabulary have."""
_TOLERANCE = 1e-4
"""Relative difference from the form of a cross entropy that float32 in another order may make."""


@dataclass(frozen=True)
class Head:
    """What all rows share: no tensor of :class:`Factors`, so it is neither counted nor stored with them.

    Attributes:
        weight: of the layer (entries, width).
        bias: of the layer (entries,), or ``None``.
        trained_bias: whether its gradient is wanted.
        dtype: in which the layer rounds its logits.
        version: of the weight, which must not change; ``None``: as it is now.
        factor: float32 (entries, width), that of the bias last: what gradients are multiplied by.
    """

    weight: Tensor
    bias: Tensor | None
    trained_bias: bool
    dtype: torch.dtype
    version: int | None = None
    factor: Tensor | None = None

    def __post_init__(self) -> None:
        if self.version is None:
            object.__setattr__(self, "version", self.weight._version)

    def __reduce__(self) -> tuple[Any, ...]:
        self._check()  # a copy's weight counts its changes anew
        kept = self.weight, self.bias, self.trained_bias, self.dtype, None, self.factor
        return type(self), kept

    def _check(self) -> None:
        if self.weight._version != self.version:
            raise InputError(
                "the model's weights have changed since its gradients were taken: fit again"
            )

    @property
    def entries(self) -> int:
        """Length of the vocabulary."""
        return len(self.weight)

    def logits(self, inputs: Tensor, entries: slice | Tensor) -> Tensor:
        """The logits of some entries as the layer computes them: float32 (..., entries)."""
        self._check()
        weight = self.weight[entries].to(self.dtype).float()
        bias = None if self.bias is None else self.bias[entries].to(self.dtype).float()
        return functional.linear(inputs, weight, bias).to(self.dtype).float()


@dataclass(frozen=True)
class Vocabulary(Factors):
    """Gradients by a weight (entries, width), and by the bias of the head.

    Attributes:
        inputs: of the head (rows, tokens, width).
        tokens: int64 (rows, lookups), entries that a tied embedding looked up; -1: none.
        found: gradients of the vectors found (rows, lookups, width).
        head: the layer.
    """

    inputs: Tensor
    tokens: Tensor
    found: Tensor
    head: Head

    @abstractmethod
    def backs(self, entries: slice | Tensor) -> Tensor:
        """Gradients of the logits of some entries: (rows, tokens, entries)."""

    def cheapest(self) -> Factors:
        """See :class:`Factors`."""
        return self if self.head.entries > self.inputs.shape[1] else Explicit(self.explicit())

    def moments(self) -> Moments:
        """See :class:`Factors`: of each number alone, as words differ in how often they are met."""
        chunks = self._chunks(self._step(len(self)))
        squares = torch.cat([one.square().sum(dim=0) for one in chunks]).view(-1, self._width)
        return Numbers(self._flat(squares[None])[0])

    def whitened(self, maps: Maps) -> Factors:
        """See :class:`Factors`."""
        if maps.inputs is not None:
            return Explicit(self.explicit()).whitened(maps)
        table = self.head.entries * self.inputs.shape[2]
        weight, bias = maps.back[0].tensor_split([table])
        factor = weight.view(self.head.entries, -1)
        if self.head.trained_bias:
            factor = torch.cat([factor, bias[:, None]], dim=1)
        return replace(self, head=replace(self.head, factor=factor))

    def explicit(self) -> Tensor:
        """See :class:`Factors`: the weight (entries, width), then the bias."""
        step = self._step(len(self))
        chunks = [chunk.view(len(self), -1, self._width) for chunk in self._chunks(step)]
        return self._flat(torch.cat(chunks, dim=1))

    def _flat(self, table: Tensor) -> Tensor:
        """The weight, then the bias, of (rows, entries, width)."""
        if not self.head.trained_bias:
            return table.flatten(1)
        return torch.cat([table[..., :-1].flatten(1), table[..., -1]], dim=1)

    def joins(self, other: Factors) -> bool:
        """See :class:`Factors`."""
        return type(other) is type(self)

    def add_gram(self, other: Factors, out: Tensor) -> None:
        """See :class:`Factors`."""
        if not isinstance(other, Vocabulary):
            super().add_gram(other, out)
            return
        ours, theirs = (one.inputs.shape[0] * one.inputs.shape[1] for one in (self, other))
        width = self._width
        by_outputs = (ours + theirs) * 2 * width + len(self) * len(other) * width
        by_pairs = ours * theirs + (ours + theirs) * width
        crossed = ours * other.tokens.numel() + theirs * self.tokens.numel()
        by_pairs += crossed * 2 * width // self.head.entries
        if by_pairs < by_outputs and self.head.factor is None:
            self._add_by_pairs(other, out)
            self._lookup()._add_products(other._lookup(), out)
            self._add_crossed(other, out)
            other._add_crossed(self, out.T)
        else:
            self._add_by_outputs(other, out)

    @property
    def _width(self) -> int:
        return self.inputs.shape[2] + self.head.trained_bias

    def _inputs(self) -> Tensor:
        """With the input of the bias, which is 1."""
        return (
            functional.pad(self.inputs, (0, 1), value=1.0)
            if self.head.trained_bias
            else self.inputs
        )

    def _lookup(self) -> Lookup:
        return Lookup(self.tokens, self.found, self.head.entries)

    def _step(self, rows: int) -> int:
        """Entries of a chunk."""
        return max(1, _CHUNK // max(1, rows * max(self._width, self.inputs.shape[1])))

    def _chunks(self, step: int) -> Iterator[Tensor]:
        """The explicit gradients by some entries at a time: (rows, entries * width)."""
        inputs, rows = self._inputs(), len(self)
        known = self.tokens >= 0
        entries, order = self.tokens[known].sort()
        row = known.nonzero()[order, 0]
        found = functional.pad(self.found[known][order], (0, self._width - self.found.shape[2]))
        for start in range(0, self.head.entries, step):
            stop = min(start + step, self.head.entries)
            weight = torch.bmm(self.backs(slice(start, stop)).mT, inputs)
            first, last = torch.searchsorted(entries, entries.new_tensor([start, stop])).tolist()
            place = row[first:last] * (stop - start) + entries[first:last] - start
            weight.view(-1, self._width).index_add_(0, place, found[first:last])
            if self.head.factor is not None:
                weight.mul_(self.head.factor[start:stop])
            yield weight.view(rows, -1)

    def _add_by_outputs(self, other: Vocabulary, out: Tensor) -> None:
        """Over the explicit gradients, some entries at a time."""
        step = min(self._step(len(self)), other._step(len(other)))
        if other is self:
            for one in self._chunks(step):
                add_product(out, one, one)
            return
        for one, two in zip(self._chunks(step), other._chunks(step), strict=True):
            add_product(out, one, two)

    def _add_by_pairs(self, other: Vocabulary, out: Tensor) -> None:
        """Over pairs of tokens of the head, some rows at a time."""
        theirs = other._inputs().flatten(0, 1)
        if not theirs.numel() or not self.inputs.numel():
            return
        for start, part in self._parts(len(theirs)):
            ours = part._inputs().flatten(0, 1)
            products = ours.new_zeros((len(ours), len(theirs)))
            step = max(1, _CHUNK // max(products.shape))
            for first in range(0, self.head.entries, step):
                chunk = slice(first, min(first + step, self.head.entries))
                back = part.backs(chunk).flatten(0, 1)
                products.addmm_(back, other.backs(chunk).flatten(0, 1).T)
            products.mul_(ours @ theirs.T)
            split = products.view(len(part), part.inputs.shape[1], len(other), -1)
            out[start : start + len(part)].add_(split.sum(dim=(1, 3)))

    def _add_crossed(self, other: Vocabulary, out: Tensor) -> None:
        """Between the tokens of this head and the lookups of another's embedding."""
        known = other.tokens >= 0
        entries, row = other.tokens[known], known.nonzero()[:, 0]
        if not len(entries) or not self.inputs.numel():
            return
        found = other.found[known]
        for start, part in self._parts(len(entries)):
            products = (part.inputs @ found.T).mul_(part.backs(entries))
            out[start : start + len(part)].index_add_(1, row, products.sum(dim=1))

    def _parts(self, across: int) -> Iterator[tuple[int, Self]]:
        """Some rows at a time, so that their tokens times a number are few."""
        step = max(1, _CHUNK // max(1, self.inputs.shape[1] * across))
        for start in range(0, len(self), step):
            yield start, self.rows(start, start + step)


@dataclass(frozen=True)
class Dense(Vocabulary):
    """Any gradients of logits: ``back`` (rows, tokens, entries)."""

    back: Tensor

    def backs(self, entries: slice | Tensor) -> Tensor:
        """See :class:`Vocabulary`."""
        return self.back[..., entries]


@dataclass(frozen=True)
class Softmax(Vocabulary):
    """Gradients ``scale * (softmax(logits) - label)`` of logits, with the logits computed again.

    Attributes:
        scale: (rows, tokens).
        labels: int64 (rows, tokens).
        sums: the logits' logsumexp (rows, tokens).
    """

    scale: Tensor
    labels: Tensor
    sums: Tensor

    def backs(self, entries: slice | Tensor) -> Tensor:
        """See :class:`Vocabulary`."""
        sums = self.sums.masked_fill(self.scale == 0, torch.inf)  # tokens that pad a row
        logits = self.head.logits(self.inputs, entries)
        back = logits.sub_(sums[..., None]).exp_()
        if isinstance(entries, Tensor):
            back.sub_((self.labels[..., None] == entries).float())
        else:
            inside = (self.labels >= entries.start) & (self.labels < entries.stop)
            row, token = inside.nonzero(as_tuple=True)
            back[row, token, self.labels[inside] - entries.start] -= 1.0
        return back.mul_(self.scale[..., None])


def is_head(weight: Tensor) -> bool:
    """Whether a layer that makes the model's outputs has as many of them as there are words."""
    return len(weight) > _WIDER * weight.shape[1]


def compressed(dense: Dense) -> Vocabulary:
    """The same gradients in fewer numbers, if a cross entropy has them."""
    found = [_labels_of(one) for one in dense.back]
    labels = [one for one in found if one is not None]
    return _softmax(dense, torch.stack(labels)) if len(labels) == len(found) else dense


def _softmax(dense: Dense, labels: Tensor) -> Vocabulary:
    """With the scales that fit best, if they fit."""
    head, active = dense.head, labels >= 0
    kept = int(active.sum(dim=1).max())
    order = active.int().argsort(dim=1, descending=True, stable=True)[:, :kept]
    labels = labels.gather(1, order)
    inputs = dense.inputs.gather(1, order[..., None].expand(-1, -1, dense.inputs.shape[2]))
    scale, sums, excess, size = (inputs.new_zeros(order.shape) for _ in range(4))
    step = max(1, _CHUNK // head.entries)
    for row, start in product(range(len(order)), range(0, kept, step)):
        some = row, slice(start, start + step)
        logits, label = head.logits(inputs[some], slice(None)), labels[some]
        sums[some] = logits.logsumexp(dim=1)
        shape = logits.sub_(sums[some][:, None]).exp_()
        shape[torch.arange(len(shape), device=label.device), label] -= 1.0
        own = dense.back[row, order[some]]
        fitted = (own * shape).sum(dim=1) / shape.square().sum(dim=1)
        scale[some] = torch.where(label >= 0, fitted.nan_to_num(0.0), 0.0)
        excess[some] = shape.mul_(scale[some][:, None]).sub_(own).square().sum(dim=1)
        size[some] = own.square().sum(dim=1)
    if kept:
        # What float32 loses in softmax - 1 where the label is almost certain.
        usual = scale.abs().median(dim=1, keepdim=True).values
        rounding = 4 * torch.finfo(torch.float32).eps * scale.abs().maximum(usual)
        beyond = (excess.sqrt() - rounding).clamp_min(0).norm(dim=1)
        tolerance = max(_TOLERANCE, torch.finfo(head.dtype).eps)
        if bool((beyond > tolerance * size.sum(dim=1).sqrt()).any()):
            return dense
    return Softmax(inputs, dense.tokens, dense.found, head, scale, labels, sums)


def _labels_of(back: Tensor) -> Tensor | None:
    """The labels of a row's tokens, -1 where nothing is predicted; ``None`` if no cross entropy has them.

    The gradient of a cross entropy has one sign at the label, and the other elsewhere.
    """
    negative, positive = (back < 0).sum(dim=1), (back > 0).sum(dim=1)
    if not bool(((negative <= 1) | (positive <= 1)).all()):
        return None
    labels = torch.where(negative <= 1, back.argmin(dim=1), back.argmax(dim=1))
    return labels.masked_fill((negative == 0) & (positive == 0), -1)
