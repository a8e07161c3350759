"""Score all targets into a stored result, in this process or by Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from turnover.batches import Batch
from turnover.errors import InputError
from turnover.influence.blockwise import Traversal
from turnover.influence.protocol import Wanted
from turnover.influence.signature import precision, signature_columns
from turnover.influence.sinks import StoreSink, check_columns

if TYPE_CHECKING:
    from turnover.results.arrays import Variable
    from turnover.results.reader import StoredResult
    from turnover.results.writer import Writer

    Over = Callable[[Traversal, Iterable[Batch], Tensor, Writer], int]

ENGINES = ("process", "ray")
_FILE_TARGETS = 32
"""Targets in one file at most, since readers load a few."""


def check_engine(engine: str, num_gpus: float) -> None:
    """Refuse an engine that is missing, or a share of no card."""
    if engine not in ENGINES:
        raise InputError(f"unknown engine {engine!r}; there are: {', '.join(ENGINES)}")
    if not 0 < num_gpus <= 1:  # a task runs on one card
        raise InputError(f"num_gpus must be above 0 and at most 1, got {num_gpus!r}")
    if engine != "process":
        from turnover.parallel import ray  # noqa: F401 - an error names the missing package


def check_place(engine: str, out: str | Path | None) -> None:
    """Refuse an engine whose processes have no place to share."""
    if engine == "process":
        return
    if out is None:
        raise InputError(f"engine={engine!r} writes blocks from many processes: give out= as well")
    from turnover.results.location import Location

    _ = Location(out).address


@contextmanager
def scoring(wanted: Wanted, traversal: Traversal) -> Iterator[Over]:
    """Prepare an engine; gives a function that scores all targets and writes the scores."""
    if wanted.engine == "process":
        yield _in_this_process
        return
    from turnover.influence import ray_blocks
    from turnover.parallel.ray import connected

    with connected():
        settings = ray_blocks.settings_of(traversal.estimator.engines, wanted.num_gpus)
        yield partial(ray_blocks.over, settings)


def store(
    traversal: Traversal,
    targets: Iterable[Batch],
    ids: Tensor,
    wanted: Wanted,
    described: dict[str, Any],
) -> StoredResult:
    """Write a result block by block, or resume one that was interrupted.

    Args:
        traversal: scores the blocks.
        targets: batches, taken one by one.
        ids: int64 (train,).
        wanted: where and by which engine.
        described: fields of :class:`turnover.Result`.
    """
    from turnover.results.reader import open_result
    from turnover.results.store import writing

    estimator, top = traversal.estimator, traversal.top
    assert wanted.out is not None
    rows, columns = traversal.grid(len(ids))
    options = estimator.identity()
    identity = described | {
        "precision": precision(estimator.engines),
        "sites": list(described["sites"]),
        "ghosts": estimator.ghosts,
        "candidates": options.pop("candidates", None),
        "top": top,
        "grid": [rows, columns, options.pop("block", None)],
    }
    if options:
        identity["options"] = options
    sizes = {"ghost": estimator.floor_ghosts, "signature": signature_columns(estimator)}
    second, length = ("train", len(ids)) if top is None else ("rank", min(2 * top, len(ids)))
    sizes[second] = length
    variables = _variables(traversal, ("target", second), (rows, min(columns, length)), sizes)
    labelled = {"train": ("train", ids.numpy())} | check_columns(wanted.coordinates, len(ids))
    with (
        scoring(wanted, traversal) as over,
        writing(
            wanted.out, identity, variables, sizes, labelled, "dense" if top is None else "top"
        ) as writer,
    ):
        if writer.complete:  # finished before: only its targets are checked
            count = traversal.announce(targets, ids, StoreSink(writer, estimator))
        else:
            with estimator.halving.noted(writer):
                count = over(traversal, targets, ids, writer)
        writer.finish(count)
    return open_result(wanted.out)


def _in_this_process(
    traversal: Traversal, targets: Iterable[Batch], ids: Tensor, writer: Writer
) -> int:
    return traversal.over(targets, ids, StoreSink(writer, traversal.estimator))


def _variables(
    traversal: Traversal, dims: tuple[str, str], block: tuple[int, int], sizes: Mapping[str, int]
) -> dict[str, Variable]:
    from turnover.results.arrays import Variable

    chunks = (min(block[0], _FILE_TARGETS), block[1])
    variables = {
        "score": Variable(dims, "float32", chunks),
        "ghost": Variable(("target", "ghost"), "float32", (chunks[0], sizes["ghost"])),
    }
    if traversal.top is not None:
        variables["train_id"] = Variable(dims, "int64", chunks)
    if len(traversal.estimator.engines) > 1:
        variables["standard_error"] = Variable(dims, "float32", chunks)
    return variables | traversal.estimator.variables(dims, chunks)
