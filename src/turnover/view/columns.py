"""The pairs of a run by training instance: the influence of one instance on every error.

Results are stored by target, a few targets per chunk, so one training instance's scores are in every
chunk; and q is adjusted over all instances of a target. This reads all scores once and stores them
beside the result, with few training instances and many targets per chunk.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from turnover.errors import InputError
from turnover.io.bars import tqdm
from turnover.results.arrays import Variable
from turnover.results.reader import StoredResult, open_result
from turnover.results.store import writing
from turnover.runs.run import Run
from turnover.tasks.explain import SIGNIFICANT_Q

_NAME = "columns"
_VERSION = 1
_PAIRS_HELD = 2**24
"""Pairs of a block of targets, 8 bytes each."""
_PAIRS_AT_ONCE = 2**20
_FEW = 8
"""Fewest targets read together: a chunk of scores holds several, and is read as a whole."""
_CHUNK = 2**18


def open_columns(run: Run) -> StoredResult:
    """Open the pairs of a run's errors by training instance; write them first where they are missing.

    ``score`` and ``q``: float32 (train, target), in nats and from 0 to 1. For each target
    ``significant`` (int64: instances with q <= 0.05), ``smallest_q`` and ``largest_z`` (float32); for
    each training id ``helped`` and ``hurt`` (int64: targets on which it is significant).
    """
    errors = open_errors(run)
    key = _key(errors)
    path = run.folder / "results" / f"{_NAME}.zarr"
    if path.exists():
        made = open_result(path)  # of any network: the key differs
        if made.attributes.get("source") == key:
            return made
    with run.draft(_NAME, key) as draft:
        _write(errors, key, str(draft))
    return open_result(path)


def open_errors(run: Run) -> StoredResult:
    """Open the pairs of a run's errors by target; refuse a result that holds only extremes."""
    found = run.open_result("errors")
    if found.kind != "dense":
        raise InputError(
            f"{found.url} holds only the extremes: run `turnover influence {run.folder}` again"
        )
    return found


def _key(errors: StoredResult) -> str:
    """Digest that differs for a result estimated later or with other settings."""
    hashed = hashlib.blake2b(f"{_VERSION} {sorted(errors.attributes.items())}".encode())
    for name in ("train", "ghost_mean", "noise_floor"):
        hashed.update(errors.part(name).tobytes())
    return hashed.hexdigest()[:32]


def _write(errors: StoredResult, key: str, url: str) -> None:
    train_ids = errors.train_ids
    sizes = {"train": len(train_ids), "target": len(errors)}
    rows = max(1, min(len(errors), _PAIRS_HELD // len(train_ids)))
    chunk = (max(1, min(len(train_ids), _CHUNK // rows)), rows)
    by_train = Variable(("train",), "int64", (min(len(train_ids), _CHUNK),))
    variables = {
        "score": Variable(("train", "target"), "float32", chunk),
        "q": Variable(("train", "target"), "float32", chunk),
        "significant": Variable(("target",), "int64", (rows,)),
        "smallest_q": Variable(("target",), "float32", (rows,)),
        "largest_z": Variable(("target",), "float32", (rows,)),
        "helped": by_train,
        "hurt": by_train,
    }
    names = ("method", "objective", "sites", "network", "considered")
    described = {name: errors.attributes[name] for name in names}
    ids = {"train": ("train", train_ids)}
    helped, hurt = np.zeros((2, len(train_ids)), dtype=np.int64)
    with writing(url, {"source": key}, variables, sizes, ids, "columns") as writer:
        starts = range(0, len(errors), rows)
        for start in tqdm(starts, "pairs by training instance", unit="block", delay=1):
            block = slice(start, min(start + rows, len(errors)))
            score, q, largest_z = _block(errors, block)
            writer.write("score", (slice(None), block), np.ascontiguousarray(score.T))
            writer.write("q", (slice(None), block), np.ascontiguousarray(q.T))
            sure = q <= SIGNIFICANT_Q
            writer.write("significant", (block,), sure.sum(axis=1))
            writer.write("smallest_q", (block,), q.min(axis=1))
            writer.write("largest_z", (block,), largest_z)
            helped += (sure & (score > 0)).sum(axis=0)
            hurt += (sure & (score < 0)).sum(axis=0)
        writer.write("helped", (), helped)
        writer.write("hurt", (), hurt)
        writer.finish(source=key, **described)


def _block(
    errors: StoredResult, block: slice
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Scores and q-values (targets, train) and largest absolute z (targets,) of some targets."""
    step = max(_FEW, _PAIRS_AT_ONCE // len(errors.train_ids))
    found: list[tuple[NDArray[np.float32], ...]] = []
    for start in range(block.start, block.stop, step):
        part = errors.load(slice(start, min(start + step, block.stop)))
        found.append((part.scores, part.q.astype(np.float32), np.abs(part.z).max(axis=1)))
    score, q, largest_z = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    return score, q, largest_z
