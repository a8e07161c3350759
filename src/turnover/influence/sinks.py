"""Sinks of scores: in memory, or block by block on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover.batches import Batch, named
from turnover.errors import InputError
from turnover.influence.engine import TargetBlock
from turnover.influence.protocol import Estimator
from turnover.influence.signature import Signed, signatures, tolerance
from turnover.results.calibration import GhostPool, NoiseFloor
from turnover.results.result import Result

if TYPE_CHECKING:
    from turnover.results.writer import Writer

Array = NDArray[Any]


class Sink(Protocol):
    """Takes the arrays of a result, in parts of (targets, second dimension)."""

    def begin(self, start: int, batches: Sequence[Batch]) -> None:
        """Announce the targets of a block, from number ``start`` on."""

    def has(self, name: str, rows: slice, columns: slice | None = None) -> bool:
        """Whether a part was put before."""

    def put(self, name: str, rows: slice, values: Array, columns: slice | None = None) -> None:
        """Take a part of an array: all its columns, or some."""


@dataclass(frozen=True)
class Region:
    """The part of a result that holds the scores of a block of targets.

    Attributes:
        block: the targets.
        rows: their numbers.
        ids: int64 (train,), to be scored.
        columns: ids to score at a time.
        sink: takes the scores.
    """

    block: TargetBlock
    rows: slice
    ids: Tensor
    columns: int
    sink: Sink

    @property
    def targets(self) -> int:
        """Number of the targets."""
        return int(self.rows.stop - self.rows.start)

    def has(self, name: str, columns: slice | None = None) -> bool:
        """See :class:`Sink`."""
        return self.sink.has(name, self.rows, columns)

    def put(self, name: str, values: Array, columns: slice | None = None) -> None:
        """See :class:`Sink`."""
        self.sink.put(name, self.rows, values, columns)


class MemorySink:
    """Keeps everything in memory.

    Args:
        train: length of the second dimension of arrays that come in parts.
    """

    def __init__(self, train: int) -> None:
        self._train = train
        self._blocks: dict[str, list[Array]] = {}
        self._ids: list[Tensor | None] = []

    def begin(self, start: int, batches: Sequence[Batch]) -> None:  # noqa: ARG002
        """See :class:`Sink`."""
        self._ids += [batch.ids for batch in batches]

    def has(self, name: str, rows: slice, columns: slice | None = None) -> bool:  # noqa: ARG002
        """See :class:`Sink`: never."""
        return False

    def put(self, name: str, rows: slice, values: Array, columns: slice | None = None) -> None:
        """See :class:`Sink`."""
        blocks = self._blocks.setdefault(name, [])
        if columns is None:
            blocks.append(values)
            return
        if columns.start == 0:
            shape = (rows.stop - rows.start, self._train)
            blocks.append(np.empty(shape, dtype=values.dtype))
        blocks[-1][:, columns] = values

    def result(self, train_ids: NDArray[np.int64], **described: Any) -> Result:
        """Everything as a result.

        Args:
            train_ids: int64 (train,), unless the extremes came with theirs.
            described: method, objective, sites, network and considered of :class:`Result`.
        """
        pool = GhostPool()
        floors = [pool.add(ghosts) for ghosts in self._blocks["ghost"]]
        values = {
            name: np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
            for name, blocks in self._blocks.items()
        }
        known = [ids for ids in self._ids if ids is not None]
        complete = bool(known) and len(known) == len(self._ids)
        return Result(
            scores=values["score"],
            floor=NoiseFloor(
                np.concatenate([floor.mean for floor in floors]),
                np.concatenate([floor.sd for floor in floors]),
            ),
            null=pool.null(),
            train_ids=values.get("train_id", train_ids),
            target_ids=torch.cat(known).cpu().numpy() if complete else None,
            standard_error=values.get("standard_error"),
            exact=values.get("exact"),
            recall=values.get("recall"),
            **described,
        )


class StoreSink:
    """Writes to a stored result.

    Args:
        writer: of the result.
        estimator: of the scores, for a sink that announces targets.
    """

    def __init__(self, writer: Writer, estimator: Estimator | None = None) -> None:
        self._writer = writer
        self._estimator = estimator

    def begin(self, start: int, batches: Sequence[Batch]) -> None:
        """See :class:`Sink`."""
        ids = [batch.ids for batch in batches if batch.ids is not None]
        self._writer.announce(
            start,
            np.concatenate([fingerprints(batch) for batch in batches]),
            torch.cat(ids).cpu().numpy() if len(ids) == len(batches) else None,
            _labels(batches),
            self._signed(batches),
        )

    def _signed(self, batches: Sequence[Batch]) -> Signed | None:
        estimator = self._estimator
        if estimator is None or not self._writer.has_signature:
            return None
        return Signed(signatures(estimator, batches), tolerance(estimator.engines))

    def has(self, name: str, rows: slice, columns: slice | None = None) -> bool:
        """See :class:`Sink`."""
        return self._writer.read(name, _place(name, rows, columns)) is not None

    def put(self, name: str, rows: slice, values: Array, columns: slice | None = None) -> None:
        """See :class:`Sink`."""
        self._writer.write(name, _place(name, rows, columns), values)


def _place(name: str, rows: slice, columns: slice | None) -> tuple[slice, ...]:
    if name == "recall":
        return (rows,)
    return (rows, slice(None)) if columns is None else (rows, columns)


def _labels(batches: Sequence[Batch]) -> NDArray[np.int64] | None:
    found = []
    for batch in batches:
        labels = batch.labels
        if labels is None or labels.is_floating_point() or labels.shape != (len(batch),):
            return None
        found.append(labels.cpu().long().numpy())
    return np.concatenate(found)


def fingerprints(batch: Batch) -> NDArray[np.uint64]:
    """Hash the inputs and labels of every row of a batch, with what all rows share: uint64 (rows,)."""
    rows = len(batch)
    shared = hashlib.blake2b(_layout([batch.inputs, batch.labels]).encode(), digest_size=8)
    digests = [hashlib.blake2b(digest_size=8) for _ in range(rows)]
    # A shared tensor may happen to be as long as the batch.
    values = [(batch.shares(name), value) for name, value in named(batch.inputs)]
    values += [] if batch.labels is None else [(False, batch.labels)]
    for common_to_all, given in values:
        value = given.detach().cpu()
        head = f"{value.dtype}{tuple(value.shape[1:])}".encode()
        by_row = not common_to_all and value.dim() and len(value) == rows
        flat = value.contiguous().reshape(rows, -1) if by_row else None
        if flat is None:
            shared.update(head + value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            continue
        raw = flat.view(torch.uint8).numpy() if flat.numel() else np.empty((rows, 0), np.uint8)
        for row, digest in enumerate(digests):
            digest.update(head + raw[row].tobytes())
    common = shared.digest()
    words = [int.from_bytes(digest.digest(), "little") for digest in digests]
    return np.array(words, dtype=np.uint64) ^ np.uint64(int.from_bytes(common, "little"))


def _layout(value: Any) -> str:
    """Nested inputs in words, without the tensors."""
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key!r}:{_layout(item)}' for key, item in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"[{','.join(map(_layout, value))}]"
    if value is None or isinstance(value, str | bytes | int | float | complex):
        return repr(value)
    return type(value).__name__  # the repr of another object may hold its address


def check_columns(coordinates: Mapping[str, Any], train: int) -> dict[str, tuple[str, Array]]:
    """Check that coordinates have one value for each training id."""
    checked = {}
    for name, values in coordinates.items():
        array: Array = np.empty(0, dtype=object)
        with suppress(ValueError):
            array = np.asarray(values)
        if array.shape != (train,) or array.dtype == object:
            raise InputError(
                f"coordinate {name!r} must hold one number or string for each of the {train} training "
                f"ids, got an array of {array.dtype} {array.shape}"
            )
        checked[name] = ("train", array)
    return checked
