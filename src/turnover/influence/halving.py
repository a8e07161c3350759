"""Forwards of fewer rows, once a device has run out of memory.

What is written as a whole is computed as a whole: where a forward within it does not fit, all of it begins
again with half the rows. The new bound is noted beside a stored result, so that whoever continues it begins
with that bound, and repeats the bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

from turnover.batches import Batch
from turnover.errors import InputError

T = TypeVar("T")

IDS, ROWS = "ids", "rows of a batch"
"""What a forward holds several of: ids that a target is scored on, or rows as the user batched them."""


class _AgainError(BaseException):
    """Ends a computation that begins again; no handler of a user's model's errors may catch it."""


class Book(Protocol):
    """Where bounds are written down: the writer of a stored result."""

    @property
    def halved(self) -> dict[str, int]:
        """Bounds that were noted."""

    def note_halved(self, most: Mapping[str, int]) -> None:
        """Note bounds."""


class Halving:
    """Most ids and rows in a forward, halved whenever a device runs out of memory.

    Attributes:
        most: bounds by what they count; what was never halved has none.
        note: takes the bounds when they change.
    """

    def __init__(self, most: Mapping[str, int] | None = None) -> None:
        self.most = dict(most or {})
        self.note: Callable[[Mapping[str, int]], None] = _forget
        self._running = False

    def __reduce__(self) -> tuple[type[Halving], tuple[dict[str, int]]]:
        return type(self), (self.most,)  # another process notes them in its own way

    def size(self, kind: str, wanted: int) -> int:
        """As many as wanted, or as the bound allows."""
        return min(wanted, self.most.get(kind, wanted))

    def learn(self, most: Mapping[str, int]) -> None:
        """Lower the bounds to those of another process, and warn of what changes."""
        for kind, bound in most.items():
            if self.size(kind, bound + 1) > bound:
                self.most[kind] = bound
                _warn(kind, bound)

    @contextmanager
    def noted(self, book: Book) -> Iterator[None]:
        """Begin with the bounds in a book, and write every change into it."""
        stored = book.halved
        self.learn(stored)
        if self.most != stored:  # an earlier estimate halved
            book.note_halved(self.most)
        self.note = book.note_halved
        try:
            yield
        finally:
            self.note = _forget

    def whole(self, make: Callable[[], T]) -> T:
        """What ``make`` returns, called again whenever a forward within it was halved.

        Within another call it is a part of that one's whole.

        Args:
            make: leaves nothing behind if it does not return.
        """
        if self._running:
            return make()
        self._running = True
        try:
            while True:
                try:
                    return make()
                except _AgainError:
                    pass
                # Only here is nothing left that refers to the tensors of the failed forward.
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        finally:
            self._running = False

    @contextmanager
    def forward(self, kind: str, size: int) -> Iterator[None]:
        """Run a forward of some ids or rows, within :meth:`whole`.

        Raises:
            InputError: the device has no memory for a single one.
        """
        try:
            yield
        except torch.OutOfMemoryError as error:
            if size < 2:
                raise InputError(
                    f"the device is out of memory with 1 of {kind} in a forward: free some of it, shorten "
                    f"the inputs, or compute on the CPU ({str(error).splitlines()[0]})"
                ) from error
            self.most[kind] = size // 2
            _warn(kind, size // 2)
            self.note(self.most)
            raise _AgainError from None

    def by_rows(self, batch: Batch, function: Callable[[Batch], T]) -> list[T]:
        """A function of a batch, or of its parts of as many rows as the device has memory for."""

        def parts() -> list[T]:
            found, size = [], self.size(ROWS, len(batch))
            for start in range(0, len(batch), size):
                part = batch.rows(start, min(start + size, len(batch)))
                with self.forward(ROWS, len(part)):
                    found.append(function(part))
            return found

        return self.whole(parts)


def _forget(_: Mapping[str, int]) -> None:
    pass


def _warn(kind: str, bound: int) -> None:
    warnings.warn(
        f"the device ran out of memory: forwards now have {bound} {kind} at most", stacklevel=2
    )
