"""Hidden predictions of a run, in ``results/hidden_predictions.safetensors``: computed once, then read."""

from __future__ import annotations

import os

import torch

from turnover.dropout.hidden import HiddenPredictions
from turnover.errors import InputError
from turnover.io.files import replacing, writing_to
from turnover.io.tensors import check_finite, opened
from turnover.runs.run import Run, data_digest
from turnover.tasks.predict import predict_training

_FILE = "hidden_predictions.safetensors"
_VERSION = 1


def open_hidden(run: Run) -> HiddenPredictions:
    """Read a run's calibrated hidden predictions; compute and store them first where they are missing.

    Those of other rows, labels or another network are computed again. In a folder that cannot be written
    they are not stored.

    Raises:
        InputError: as :func:`~turnover.tasks.predict.predict_training`, or a damaged file.

    Example::

        print(open_hidden(Run.load(Path("runs/mine"))).probabilities)
    """
    key = f"{_VERSION} {run.network.digest()} {data_digest(run.train, run.test)}"
    found = _read(run, key)
    if found is None:
        found = predict_training(run)
        if os.access(run.folder, os.W_OK):
            _write(run, found, key)
    return found


def _read(run: Run, key: str) -> HiddenPredictions | None:
    path = run.folder / "results" / _FILE
    if not path.exists():
        return None
    with opened(path) as tensors:
        if (tensors.metadata() or {}).get("of") != key:
            return None
        values = {name: tensors.get_tensor(name) for name in ("probabilities", "calibration")}
    for name, value in values.items():
        check_finite(path, name, value)
    probabilities, calibration = values["probabilities"], values["calibration"]
    if probabilities.shape != (len(run.train), len(run.train.classes)) or len(calibration) != 2:
        raise InputError(f"{path}: damaged; delete it, and it is made again")
    share, temperature = calibration.tolist()
    return HiddenPredictions(probabilities.numpy(), run.train.ids.numpy(), share, temperature)


def _write(run: Run, found: HiddenPredictions, key: str) -> None:
    from safetensors.torch import save_file

    path = run.folder / "results" / _FILE
    with writing_to(path.parent):
        path.parent.mkdir(exist_ok=True)
    calibration = torch.tensor([found.exposed_share, found.temperature], dtype=torch.float64)
    tensors = {"probabilities": torch.as_tensor(found.probabilities), "calibration": calibration}
    with replacing(path) as draft:
        save_file(tensors, draft, {"of": key})
