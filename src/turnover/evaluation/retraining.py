"""Retraining on subsets: the truth that influence scores are judged by."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from turnover import objectives
from turnover.batches import Batch
from turnover.errors import InputError
from turnover.evaluation.recipe import Build, Masked, Recipe
from turnover.evaluation.subsets import Subsets
from turnover.evaluation.training import batch_of_models, train
from turnover.io.files import replacing, writing_to
from turnover.io.tensors import opened
from turnover.objectives import Objective, costs
from turnover.parallel.engines import check_engine, sweeping
from turnover.parallel.jobs import evenly

_FORMAT = "turnover retraining, version 1"


def retrain(
    build: Build,
    inputs: Tensor,
    labels: Tensor,
    recipe: Recipe,
    subsets: Subsets,
    seeds: Sequence[int],
    *,
    on: Tensor,
    ids: Tensor | None = None,
    masked: Masked | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
    engine: str = "process",
) -> NDArray[np.float32]:
    """Outputs of networks trained on every subset, with every seed.

    Take other seeds than those of the networks whose attributions are judged: sharing an
    initialisation with the truth would flatter them.

    Args:
        build: makes the networks.
        inputs: float32 (N, ...), all training instances.
        labels: int64 (N,).
        recipe: how they are trained.
        subsets: of the N instances.
        seeds: of the trainings on each subset.
        on: (targets, ...), inputs whose outputs are wanted (targets, or the training set itself).
        ids: int64 (N,), what masks depend on; ``None``: 0 to N - 1.
        masked: train under turn-over masks.
        cache: folder that keeps the outputs of every finished training under a hash of all that they
            depend on, so that a run that was cut off goes on, and one that is finished is read. Small
            networks are trained together, and in another company may differ in their last bits.
        progress: show a progress bar.
        engine: what trains the networks, as :func:`~turnover.evaluation.train` takes it; this process
            alone writes to the cache.

    Returns:
        float32 (subsets, seeds, targets, classes), of whole networks in eval mode.

    Raises:
        InputError: shapes that do not fit, a seed given twice, an unknown engine, or a training that fails
            (see :func:`~turnover.evaluation.train`).
    """
    check_engine(engine)
    if subsets.keep.shape[1] != len(inputs):
        raise InputError(
            f"the subsets are of {subsets.keep.shape[1]} instances, but there are {len(inputs)} inputs"
        )
    if len(set(seeds)) < len(seeds) or not seeds:
        raise InputError(f"seeds must be distinct, and at least one, got {list(seeds)}")
    store = None
    if cache is not None:
        described = _described(build, inputs, labels, recipe, on, ids, masked)
        store = _Store(Path(cache), described)
    found: dict[tuple[int, int], Tensor] = {}
    missing: list[list[tuple[int, int]]] = []
    # The example's width in units is left out: masks of a retraining share their seeds.
    at_once = batch_of_models(build(seeds[0]), len(inputs))
    # What is trained together does not depend on what is cached, and so neither do the last bits.
    for together in _together(subsets, seeds, at_once):
        for subset, seed in together:
            stored = store.read(subsets.keep[subset], seed) if store else None
            if stored is not None:
                found[subset, seed] = stored
        missing.append([one for one in together if one not in found])
    missing = [chunk for chunk in missing if chunk]

    def rows(chunk: list[tuple[int, int]]) -> NDArray[np.int64]:
        return np.stack([np.flatnonzero(subsets.keep[subset]) for subset, _ in chunk])

    total = len(subsets) * len(seeds)
    with (
        sweeping(engine) as sweep,
        tqdm(
            desc="retraining", total=total, initial=len(found), unit="network", disable=not progress
        ) as bar,
    ):
        work = partial(_outputs, build, recipe, masked)
        data = (inputs, labels, torch.arange(len(inputs)) if ids is None else ids, on)
        jobs = (([seed for _, seed in chunk], rows(chunk)) for chunk in missing)
        for number, logits in sweep(work, data, jobs):
            for (subset, seed), one in zip(missing[number], logits, strict=True):
                found[subset, seed] = one
                if store:
                    store.write(subsets.keep[subset], seed, one)
            bar.update(len(missing[number]))
    return np.stack(
        [
            np.stack([found[subset, seed].cpu().numpy() for seed in seeds])
            for subset in range(len(subsets))
        ]
    )


def minus_cost(
    logits: NDArray[np.float32], labels: Tensor, objective: Objective = objectives.margin
) -> NDArray[np.float32]:
    """Minus the objective of outputs: higher is better, as positive scores are helpful.

    Args:
        logits: float32 (..., targets, classes), as :func:`retrain` gives them.
        labels: int64 (targets,).
        objective: cost of a prediction; the default gives the log-odds of the labelled class.

    Returns:
        float32 (..., targets).

    Raises:
        InputError: labels that do not fit the logits.
    """
    *leading, targets, classes = logits.shape
    if labels.shape != (targets,):
        raise InputError(f"labels must be ({targets},), got {tuple(labels.shape)}")
    flat = torch.from_numpy(np.ascontiguousarray(logits)).view(-1, classes)
    repeated = labels.cpu().repeat(len(flat) // targets)
    cost = costs(objective, flat, Batch(flat, repeated))
    values: NDArray[np.float32] = -cost.numpy().reshape(*leading, targets)
    return values


def _together(
    subsets: Subsets, seeds: Sequence[int], at_once: int
) -> Iterator[list[tuple[int, int]]]:
    """Subsets and seeds whose networks are trained as one.

    Networks that share a seed share its masks, and a batch of networks has one number of rows.
    """
    sizes: dict[int, list[tuple[int, int]]] = {}
    for seed in seeds:
        for subset, size in enumerate(subsets.keep.sum(axis=1)):
            sizes.setdefault(int(size), []).append((subset, seed))
    for alike in sizes.values():
        yield from (alike[part] for part in evenly(len(alike), at_once))


def _outputs(
    build: Build,
    recipe: Recipe,
    masked: Masked | None,
    inputs: Tensor,
    labels: Tensor,
    ids: Tensor,
    on: Tensor,
    job: tuple[list[int], NDArray[np.int64]],
) -> Tensor:
    """Outputs (models, targets, classes) of networks trained with a job's seeds on its rows."""
    seeds, rows = job
    trained = train(build, inputs, labels, recipe, seeds, rows=rows, ids=ids, masked=masked)
    # A network may write into its inputs, and those of a task are not its own.
    return trained.logits(on.clone())


def _described(
    build: Build,
    inputs: Tensor,
    labels: Tensor,
    recipe: Recipe,
    on: Tensor,
    ids: Tensor | None,
    masked: Masked | None,
) -> str:
    """Hash of all that the outputs of a training depend on, but for its rows and seed."""
    # The weights of one seed stand for the initialisation, which no name or shape tells.
    model = build(0)
    digest = hashlib.sha256(f"{_FORMAT}\0{model!r}\0".encode())
    masks = None if masked is None else asdict(masked)
    digest.update(json.dumps([asdict(recipe), masks], sort_keys=True).encode())
    named = {"inputs": inputs, "labels": labels, "on": on} | ({} if ids is None else {"ids": ids})
    for name, value in [*named.items(), *model.state_dict().items()]:
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().contiguous().cpu().numpy().tobytes()


class _Store:
    """One small file for each training, under a hash of all that its outputs depend on."""

    def __init__(self, folder: Path, described: str) -> None:
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._described = described

    def read(self, keep: NDArray[np.bool_], seed: int) -> Tensor | None:
        """The outputs, if they are there; a damaged file is named, and then trained anew."""
        path = self._path(keep, seed)
        if not path.exists():
            return None
        try:
            with opened(path) as file:
                logits: Tensor = file.get_tensor("logits")
                intact = (file.metadata() or {}).get("sha256") == _digest(logits)
        except InputError:
            intact = False
        if not intact:
            warnings.warn(f"{path} is damaged: that network is trained again", stacklevel=3)
            return None
        return logits

    def write(self, keep: NDArray[np.bool_], seed: int, logits: Tensor) -> None:
        from safetensors.torch import save_file

        with replacing(self._path(keep, seed)) as draft:
            save_file({"logits": logits.contiguous().cpu()}, draft, {"sha256": _digest(logits)})

    def _path(self, keep: NDArray[np.bool_], seed: int) -> Path:
        rows = f"{self._described}\0{seed}\0{len(keep)}\0".encode() + np.packbits(keep).tobytes()
        return self._folder / f"{hashlib.sha256(rows).hexdigest()[:32]}.safetensors"


def _digest(logits: Tensor) -> str:
    return hashlib.sha256(_bytes(logits)).hexdigest()
