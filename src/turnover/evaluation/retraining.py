"""Retraining on subsets: the truth that influence scores are judged by."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
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
from turnover.files import replacing, writing_to
from turnover.objectives import Objective, costs

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
            depend on, so that a run that was cut off goes on, and one that is finished is read.
        progress: show a progress bar.

    Returns:
        float32 (subsets, seeds, targets, classes), of whole networks in eval mode.

    Raises:
        InputError: shapes that do not fit, a seed given twice, or a training that fails (see
            :func:`~turnover.evaluation.train`).
    """
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
    missing: dict[int, list[tuple[int, int]]] = {}
    sizes = subsets.keep.sum(axis=1)
    # Networks that share a seed share its masks, and a batch of networks has one number of rows.
    for seed in seeds:
        for subset, keep in enumerate(subsets.keep):
            stored = store.read(keep, seed) if store else None
            if stored is None:
                missing.setdefault(int(sizes[subset]), []).append((subset, seed))
            else:
                found[subset, seed] = stored
    # The example's width in units is left out: masks of a retraining share their seeds.
    at_once = batch_of_models(build(seeds[0]), len(inputs))
    total = len(subsets) * len(seeds)
    with tqdm(
        desc="retraining", total=total, initial=len(found), unit="network", disable=not progress
    ) as bar:
        for jobs in missing.values():
            for first in range(0, len(jobs), at_once):
                chunk = jobs[first : first + at_once]
                rows = np.stack([np.flatnonzero(subsets.keep[subset]) for subset, _ in chunk])
                trained = train(
                    build,
                    inputs,
                    labels,
                    recipe,
                    [seed for _, seed in chunk],
                    rows=rows,
                    ids=ids,
                    masked=masked,
                )
                for (subset, seed), logits in zip(chunk, trained.logits(on), strict=True):
                    found[subset, seed] = logits
                    if store:
                        store.write(subsets.keep[subset], seed, logits)
                bar.update(len(chunk))
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
        from safetensors import SafetensorError, safe_open

        path = self._path(keep, seed)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                logits: Tensor = file.get_tensor("logits")
                intact = (file.metadata() or {}).get("sha256") == _digest(logits)
        except (SafetensorError, OSError, KeyError):
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
