"""What a method of attribution is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .problems import Problem

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Attribution:
    """Trained networks whose predictions on a problem's targets are attributed.

    Attributes:
        problem: data, architectures and recipe.
        network: ``"standard"``, ``"wide"`` (the turn-over network's architecture, trained plainly)
            or ``"turnover"``.
        models: plain modules in eval mode; methods of one network take the first.
        seeds: of the models.
        masked: whether they were trained under turn-over masks.
        keep: of these masks.
        checkpoints: state dicts of the first model along its training, the last one at its end.
        train_seconds: of one training.
        workdir: folder for a method's files.
    """

    problem: Problem
    network: str
    models: list[nn.Module]
    seeds: tuple[int, ...]
    masked: bool
    keep: float
    checkpoints: list[dict[str, torch.Tensor]]
    train_seconds: float
    workdir: Path


@dataclass(frozen=True)
class Scored:
    """What a method found, and what it took.

    Attributes:
        scores: float32 (targets, train), positive = helpful; ``None``: it has no pairs, or failed.
        self_scores: float32 (train,), higher = more suspicious; ``None``: it has none.
        prepare_seconds: what is done before a target is known, trainings apart.
        score_seconds: what is done for the targets.
        stored_bytes: what is kept between the two.
        networks: trainings that it used.
        note: why it failed, or what to know.
    """

    scores: Floats | None
    self_scores: Floats | None
    prepare_seconds: float
    score_seconds: float
    stored_bytes: int
    networks: int = 1
    note: str = ""


def attempt(method: Callable[[Attribution], Scored], task: Attribution) -> Scored:
    """Run a method; one that fails is a row that says why."""
    task.workdir.mkdir(parents=True, exist_ok=True)
    try:
        scored = method(task)
    except Exception as error:  # noqa: BLE001 - a peer may fail in any way, and the board goes on
        said = str(error).strip().splitlines()
        note = f"failed: {type(error).__name__}: {said[0][:200] if said else ''}"
        return Scored(None, None, 0.0, 0.0, 0, note=note)
    for name in ("scores", "self_scores"):
        values = getattr(scored, name)
        if values is not None and not np.isfinite(values).all():
            note = f"failed: {name} are not finite"
            return Scored(None, None, scored.prepare_seconds, scored.score_seconds, 0, note=note)
    return scored
