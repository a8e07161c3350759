"""Runs one script in an interpreter that may have neither turnover nor anything but torch and the tool.

``python -m benchmarks.effort.child SCRIPT count|time FOLDER PACKAGE`` writes ``FOLDER/found.json`` and,
where the script has them, ``FOLDER/scores.npy`` and ``FOLDER/suspicion.npy``.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import runpy
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from benchmarks.effort.data import digits
from benchmarks.memory import peak_gib

_FEATURES = 64


class Passes:
    """Counts training rows on their way into the network.

    A row is told by its pixels, sixteenths of whole numbers, whatever batch, transform or copy of the
    network it comes through.
    """

    def __init__(self, train: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        self._weights = torch.randint(2**40, (_FEATURES,), generator=generator)
        self._keys = self._key(train)
        self.rows = 0

    def __call__(self, module: nn.Module, given: Any) -> None:
        first = isinstance(module, nn.Linear) and module.in_features == _FEATURES
        # Of linear layers that take so many, the later ones have other inputs than pixels.
        if not first or not given:
            return
        x = given[0].detach()
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            x = torch._C._functorch.get_unwrapped(x)
        with torch.no_grad():
            self.rows += int(torch.isin(self._key(x.reshape(-1, _FEATURES)), self._keys).sum())

    def _key(self, x: Tensor) -> Tensor:
        return ((x * 16).round().long() * self._weights).sum(dim=1)


def main() -> None:
    script, mode, folder, package = sys.argv[1:]
    to = Path(folder).resolve()
    found = run(Path(script).resolve(), to, count=mode == "count")
    found["package"] = f"{package} {version(package)}"
    (to / "found.json").write_text(json.dumps(found))


def run(script: Path, folder: Path, *, count: bool) -> dict[str, Any]:
    """Run a script in a folder of its own, and say what it took.

    Args:
        script: to run.
        folder: for its arrays, and for ``work``, its working directory.
        count: count passes, which takes time.
    """
    train, _ = digits()
    passes = Passes(train.tensors[0])
    if count:
        register_module_forward_pre_hook(passes)
    _import_all(script)
    work = folder / "work"
    work.mkdir(parents=True)
    os.chdir(work)
    trained: list[float] = []
    _at_first_eval(trained)
    started = time.process_time()
    # Some of the tools have progress bars that cannot be turned off.
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        made = runpy.run_path(str(script))
    ended = time.process_time()
    stored = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    for name in ("scores", "suspicion"):
        if name in made:
            np.save(folder / f"{name}.npy", np.ascontiguousarray(made[name], dtype=np.float32))
    return {
        "train_seconds": trained[0] - started,
        "seconds": ended - trained[0],
        "passes": passes.rows / len(train),
        "stored_bytes": stored,
        "peak_bytes": int(peak_gib() * 2**30),
    }


def _at_first_eval(times: list[float]) -> None:
    """Note when the script has trained its network, which is when it calls ``eval``."""
    before = nn.Module.eval

    def noted(module: Any) -> Any:
        if not times:
            times.append(time.process_time())
        return before(module)

    setattr(nn.Module, "eval", noted)  # noqa: B010 - mypy takes no assignment to a method


def _import_all(script: Path) -> None:
    """Import what the script imports, so that its seconds are those of the job."""
    tree = ast.parse(script.read_text())
    imports: list[ast.stmt] = [
        node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    exec(compile(ast.Module(imports, []), str(script), "exec"), {})


if __name__ == "__main__":
    main()
