"""Doubts about a run's labels, in ``results/label_errors.safetensors``: estimated once, then read."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch

from turnover.errors import InputError
from turnover.io.bars import tqdm
from turnover.io.files import replacing, writing_to
from turnover.io.tensors import opened
from turnover.labels import LabelErrors
from turnover.runs.run import Run
from turnover.tasks.label_errors import Doubts, doubts

_VERSION = 3


def open_doubts(run: Run) -> Doubts:
    """Read the doubts about a run's labels; estimate and store them first where they are missing.

    Raises:
        InputError: as :func:`~turnover.tasks.label_errors.doubts`, or a damaged file.
    """
    found = read_doubts(run)
    if found is not None:
        return found
    with tqdm(total=1, desc="doubtful labels", unit="run") as bar:
        made, path = doubts(run), _path(run)
        with writing_to(path.parent):
            path.parent.mkdir(exist_ok=True)
        _write(path, made, _key(run))
        bar.update()
    return made


def read_doubts(run: Run) -> Doubts | None:
    """Read the doubts about a run's labels.

    Returns:
        ``None``: there are none, or those of other labels, another network or other scores.

    Raises:
        InputError: a damaged file.
    """
    path = _path(run)
    if not path.exists():
        return None
    with opened(path) as tensors:
        about = tensors.metadata() or {}
        if about.get("of") != _key(run):
            return None
        values = {name: tensors.get_tensor(name).numpy() for name in tensors.keys()}  # noqa: SIM118
        source = about["source"]
    rows, classes = len(run.train), len(run.train.classes)
    shapes = {
        "posterior": (rows, classes),
        "labels": (rows,),
        "suspicion": (rows,),
        "transition": (classes, classes),
        "likelihood": (),
    }
    if {name: value.shape for name, value in values.items()} != shapes:
        raise InputError(f"{path}: damaged; delete it, and it is made again")
    likelihood = float(values.pop("likelihood"))
    return Doubts(LabelErrors(**values, likelihood=likelihood), source)


def _write(path: Path, made: Doubts, key: str) -> None:
    from safetensors.torch import save_file

    tensors = {name: torch.as_tensor(value) for name, value in asdict(made.errors).items()}
    tensors["likelihood"] = torch.tensor(made.errors.likelihood, dtype=torch.float64)
    with replacing(path) as draft:
        save_file(tensors, draft, {"of": key, "source": made.source})


def _key(run: Run) -> str:
    """Digest of what the doubts are estimated from."""
    hashed = hashlib.blake2b(f"{_VERSION} {run.digest()}".encode(), digest_size=16)
    # Not texts: a run whose texts were changed by hand can still be looked at.
    for labels in (run.train.labels, run.test.labels):
        hashed.update(f"{labels}".encode())
    if run.masks is None and run.has_result("self"):
        hashed.update(run.read_result("self").scores.tobytes())
    return hashed.hexdigest()


def _path(run: Run) -> Path:
    return run.folder / "results" / "label_errors.safetensors"
