"""What a method of attribution is given, and what it gives."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .problems import Problem

Floats = NDArray[np.float32]
_SECONDS = 450.0


@dataclass(frozen=True)
class Attribution:
    """Trained networks whose predictions on a problem's targets are attributed.

    Attributes:
        problem: data, architectures and recipe.
        network: ``"standard"``, ``"wide"`` (the turn-over network's architecture, trained plainly),
            ``"turnover"`` or ``"head"`` (the one that ``turnover fit`` trains).
        models: plain modules in eval mode; methods of one network take the first.
        seeds: of the models.
        sites: modules that were masked in training; none: a plain training.
        keep: of these masks.
        checkpoints: state dicts of the first model along its training, the last one at its end.
        train_seconds: of one training.
        workdir: folder for a method's files.
    """

    problem: Problem
    network: str
    models: list[nn.Module]
    seeds: tuple[int, ...]
    sites: tuple[str, ...]
    keep: float
    checkpoints: list[dict[str, torch.Tensor]]
    train_seconds: float
    workdir: Path

    @property
    def suspicions(self) -> bool:
        """Whether self scores are asked for: without wrong labels there is nothing to judge them by."""
        return bool(self.problem.train.wrong.any())


@dataclass(frozen=True)
class Scored:
    """What a method found, and what it took.

    Attributes:
        scores: float32 (targets, train), positive = helpful; ``None``: it has no pairs, or failed.
        self_scores: float32 (train,), higher = more suspicious; ``None``: it has none, or none
            were asked for.
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


def attempt(
    method: Callable[[Attribution], Scored], task: Attribution, seconds: float = _SECONDS
) -> Scored:
    """Run a method; one that fails, or takes too long, is a row that says why.

    Args:
        method: what is run, with torch's global generator at seed 0 and put back afterwards: packages
            draw from it.
        task: what it is given.
        seconds: wall-clock limit, kept in the main thread alone.
    """
    task.workdir.mkdir(parents=True, exist_ok=True)
    try:
        with torch.random.fork_rng(devices=[]), _limited(seconds):
            torch.manual_seed(0)
            scored = method(task)
    except Exception as error:  # noqa: BLE001 - a peer may fail in any way, and the board goes on
        said = str(error).strip().splitlines()
        return _failed(f"{type(error).__name__}: {said[0][:200] if said else ''}")
    train, test = len(task.problem.train), len(task.problem.test)
    for name, shape in (("scores", (test, train)), ("self_scores", (train,))):
        values = getattr(scored, name)
        if values is None:
            continue
        if values.shape != shape:
            return _failed(f"{name} are {values.shape}, not {shape}")
        if not np.isfinite(values).all():
            return _failed(f"{name} are not finite")
    return scored


def _failed(why: str) -> Scored:
    return Scored(None, None, 0.0, 0.0, 0, note=f"failed: {why}")


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise a ``TimeoutError`` in what takes longer."""
    # Only the main thread gets signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
