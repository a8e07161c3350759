"""Retraining on subsets: the truth by which influence scores are judged."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from turnover import objectives
from turnover.batches import Batch
from turnover.errors import InputError
from turnover.evaluation.correlation import check_finite
from turnover.evaluation.recipe import Build, Masked, Recipe
from turnover.evaluation.subsets import Subsets
from turnover.evaluation.training import evenly, stack_size, train
from turnover.io.bars import tqdm
from turnover.io.files import replacing, writing_to
from turnover.io.tensors import opened
from turnover.objectives import Objective, costs

_FORMAT = "turnover retraining, version 1"


@dataclass(frozen=True)
class Retraining:
    """A training to repeat on subsets of its instances, and the targets to look at.

    Args:
        build: makes the networks.
        inputs: float32 (train, ...), all training instances.
        labels: int64 (train,).
        recipe: how the networks are trained.
        targets: (targets, ...), inputs of the predictions to look at, or the training inputs themselves.
        target_labels: int64 (targets,); ``None``: :func:`retrain` alone can be called.
        objective: cost of a prediction, for :func:`leave_one_out` and :func:`removal_curve`.
        ids: int64 (train,), what masks depend on; ``None``: 0 to train - 1.
        masked: train under turn-over masks; ``None``: without masks.
        cache: folder that keeps the outputs of every finished training under a hash of all that they
            depend on, so that an interrupted run resumes, and a finished one is read. Small networks are
            trained together, and the last bits may depend on which are.
        progress: show a progress bar.
    """

    build: Build
    inputs: Tensor
    labels: Tensor
    recipe: Recipe
    targets: Tensor
    target_labels: Tensor | None = None
    objective: Objective = objectives.margin
    ids: Tensor | None = None
    masked: Masked | None = None
    cache: str | Path | None = None
    progress: bool = False


def retrain(retraining: Retraining, subsets: Subsets, seeds: Sequence[int]) -> NDArray[np.float32]:
    """Return outputs of networks trained on every subset, with every seed.

    Take other seeds than those of the networks whose attributions are judged: sharing an
    initialization with the truth would flatter them.

    Args:
        retraining: the training, and the targets.
        subsets: of its training instances.
        seeds: seeds of the trainings on each subset.

    Returns:
        float32 (subsets, seeds, targets, classes), of whole networks in eval mode.

    Raises:
        InputError: shapes that do not fit, a seed given twice, or a training that fails (see
            :func:`~turnover.evaluation.train`).
    """
    count, keep = len(retraining.inputs), subsets.keep
    if keep.shape[1] != count:
        raise InputError(
            f"the subsets are of {keep.shape[1]} instances, but there are {count} inputs"
        )
    if len(set(seeds)) < len(seeds) or not seeds:
        raise InputError(f"seeds must be distinct, and at least one, got {list(seeds)}")
    store = None if retraining.cache is None else _Store(Path(retraining.cache), retraining)
    found: dict[tuple[int, int], Tensor] = {}
    # Mask units do not count here: networks of one seed share their masks.
    at_once = stack_size(retraining.build(seeds[0]), count)
    # The stacks do not depend on the cache, and so neither do the last bits.
    stacks = list(_stacks(keep, seeds, at_once))
    for subset, seed in chain.from_iterable(stacks):
        stored = store.read(keep[subset], seed) if store else None
        if stored is not None:
            found[subset, seed] = stored
    with tqdm(
        desc="retraining",
        total=len(subsets) * len(seeds),
        initial=len(found),
        unit="network",
        disable=not retraining.progress,
    ) as bar:
        for stack in stacks:
            missing = [one for one in stack if one not in found]
            if not missing:
                continue
            trained = train(
                retraining.build,
                retraining.inputs,
                retraining.labels,
                retraining.recipe,
                [seed for _, seed in missing],
                rows=np.stack([np.flatnonzero(keep[subset]) for subset, _ in missing]),
                ids=retraining.ids,
                masked=retraining.masked,
            )
            # A network may write into its inputs.
            logits = trained.logits(retraining.targets.clone())
            for (subset, seed), one in zip(missing, logits, strict=True):
                found[subset, seed] = one
                if store:
                    store.write(keep[subset], seed, one)
            bar.update(len(missing))
    ordered = [
        found[subset, seed].cpu().numpy() for subset in range(len(subsets)) for seed in seeds
    ]
    return np.stack(ordered).reshape(len(subsets), len(seeds), *ordered[0].shape)


def minus_cost(
    logits: NDArray[np.float32], labels: Tensor, objective: Objective = objectives.margin
) -> NDArray[np.float32]:
    """Return minus the objective of outputs: higher is better, as positive scores are helpful.

    Args:
        logits: float32 (..., targets, classes), as :func:`retrain` gives them.
        labels: int64 (targets,).
        objective: cost of a prediction; the default gives the log-odds of the labeled class.

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


def check_scores(scores: NDArray[np.floating], retraining: Retraining) -> None:
    """Refuse scores that are not finite and (targets, train)."""
    expected = len(retraining.targets), len(retraining.inputs)
    if np.shape(scores) != expected:
        raise InputError(f"scores must be {expected}, got {np.shape(scores)}")
    check_finite("scores", np.asarray(scores))


def outputs_without(
    retraining: Retraining, removed: Sequence[NDArray[np.int64]], seeds: Sequence[int]
) -> NDArray[np.float32]:
    """Return minus the targets' costs, float32 (1 + removals, seeds, targets), with all instances first."""
    labels = retraining.target_labels
    if labels is None:
        raise InputError("the objective needs the labels of the targets: give target_labels")
    keep = np.ones((1 + len(removed), len(retraining.inputs)), dtype=np.bool_)
    for row, gone in zip(keep[1:], removed, strict=True):
        row[gone] = False
    logits = retrain(retraining, Subsets(keep), seeds)
    return minus_cost(logits, labels, retraining.objective)


def _stacks(
    keep: NDArray[np.bool_], seeds: Sequence[int], at_once: int
) -> Iterator[list[tuple[int, int]]]:
    """Subsets and seeds of the networks of each stack: one number of rows, and few seeds' masks."""
    sizes: dict[int, list[tuple[int, int]]] = {}
    for seed in seeds:
        for subset, size in enumerate(keep.sum(axis=1)):
            sizes.setdefault(int(size), []).append((subset, seed))
    for alike in sizes.values():
        yield from (alike[part] for part in evenly(len(alike), at_once))


class _Store:
    """One small file for each training, under a hash of all that its outputs depend on."""

    def __init__(self, folder: Path, retraining: Retraining) -> None:
        self._described = _described(retraining)
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def read(self, keep: NDArray[np.bool_], seed: int) -> Tensor | None:
        """Return kept outputs; ``None`` without any, or where their file is damaged."""
        path = self._path(keep, seed)
        if not path.exists():
            return None
        try:
            with opened(path) as file:
                logits: Tensor = file.get_tensor("logits")
                intact = (file.metadata() or {}).get("sha256") == _sha256(logits)
        except InputError:
            intact = False
        if not intact:
            warnings.warn(f"{path} is damaged: that network is trained again", stacklevel=3)
            return None
        return logits

    def write(self, keep: NDArray[np.bool_], seed: int, logits: Tensor) -> None:
        from safetensors.torch import save_file

        with replacing(self._path(keep, seed)) as draft:
            save_file({"logits": logits.contiguous().cpu()}, draft, {"sha256": _sha256(logits)})

    def _path(self, keep: NDArray[np.bool_], seed: int) -> Path:
        rows = f"{self._described}\0{seed}\0{len(keep)}\0".encode() + np.packbits(keep).tobytes()
        return self._folder / f"{hashlib.sha256(rows).hexdigest()[:32]}.safetensors"


def _described(retraining: Retraining) -> str:
    """Hash all that the outputs of a training depend on, but for its rows and seed."""
    # The weights of one seed identify the initialization, which no name or shape tells.
    model = retraining.build(0)
    digest = hashlib.sha256(f"{_FORMAT}\0{model!r}\0".encode())
    masks = None if retraining.masked is None else asdict(retraining.masked)
    recipe = asdict(retraining.recipe)
    recipe["optimiser"] = recipe.pop("optimizer")  # the name in the hashes of existing caches
    digest.update(json.dumps([recipe, masks], sort_keys=True).encode())
    named = {"inputs": retraining.inputs, "labels": retraining.labels, "on": retraining.targets}
    if retraining.ids is not None:
        named["ids"] = retraining.ids
    for name, value in [*named.items(), *model.state_dict().items()]:
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> bytes:
    return value.detach().contiguous().cpu().numpy().tobytes()


def _sha256(logits: Tensor) -> str:
    return hashlib.sha256(_bytes(logits)).hexdigest()
