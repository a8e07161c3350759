"""pyDVL's influence functions, in an environment of their own: the package needs numpy < 2.

The other interpreter gets arrays in a safetensors file and the layers by name, and gives arrays back.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import cast

from safetensors.torch import load_file, save_file
from torch import nn

from turnover import InputError

from ..methods import Attribution, Scored

_CHILD = Path(__file__).with_name("pydvl_child.py")


def python() -> Path:
    """The interpreter that has pyDVL: ``TURNOVER_PYDVL``, or the one ``make`` sets up."""
    return Path(os.environ.get("TURNOVER_PYDVL", ".bench-pydvl/bin/python"))


def pydvl(method: str) -> Callable[[Attribution], Scored]:
    """``"nystroem"`` (rank 50) or ``"ekfac"``, of the loss."""

    def run(task: Attribution) -> Scored:
        if not python().exists():
            raise InputError(f"no {python()}: make .bench-pydvl sets it up")
        folder = task.workdir / "pydvl"
        folder.mkdir(parents=True, exist_ok=True)
        train, test = task.problem.train, task.problem.test
        data = {"train_x": train.x, "train_y": train.y, "test_x": test.x, "test_y": test.y}
        weights = {f"model.{k}": v for k, v in task.models[0].state_dict().items()}
        given, made = folder / "given.safetensors", folder / "made.safetensors"
        made.unlink(missing_ok=True)
        save_file({k: v.contiguous() for k, v in (data | weights).items()}, given)
        layers = json.dumps([_layer(one) for one in cast(nn.Sequential, task.models[0])])
        asked = "pairs and self" if task.suspicions else "pairs"
        command = [str(python()), str(_CHILD), method, layers, asked, str(given), str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not made.exists():
            said = done.stderr.strip().splitlines() or ["nothing was said"]
            raise RuntimeError(said[-1])
        found = load_file(made)
        prepared, scored = found["seconds"].tolist()
        stored = int(found["stored"])
        own = found["own"].numpy() if "own" in found else None
        return Scored(found["scores"].numpy(), own, prepared, scored, stored)

    return run


def _layer(layer: nn.Module) -> list[object]:
    """Class and arguments, from which the other interpreter makes the layer."""
    if isinstance(layer, nn.Linear):
        return ["Linear", layer.in_features, layer.out_features, layer.bias is not None]
    if isinstance(layer, nn.Conv2d):
        sizes = (layer.kernel_size, layer.stride, layer.padding)
        return ["Conv2d", layer.in_channels, layer.out_channels, *sizes]
    if isinstance(layer, nn.MaxPool2d):
        return ["MaxPool2d", layer.kernel_size, layer.stride, layer.padding]
    if isinstance(layer, nn.ReLU | nn.Flatten):
        return [type(layer).__name__]
    raise InputError(f"pyDVL's interpreter cannot be told of the layer {layer}")
