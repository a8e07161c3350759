"""``make check-gpu`` without a GPU, and without most of the packages of this environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# What a machine with torch, transformers and peft does not have for these.
MISSING = """
import sys
from importlib.machinery import PathFinder

ABSENT = {
    *("PIL", "click", "datasets", "lightning", "matplotlib", "msgspec", "pandas", "plotly"),
    *("ray", "rich", "scipy", "sklearn", "starlette", "tomli_w", "typer", "uvicorn", "xarray", "zarr"),
}
find = PathFinder.find_spec


@classmethod
def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in ABSENT else find(name, path, target)


PathFinder.find_spec = find_spec
"""

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="needs make")


def make(target: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(MISSING)
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH="{folder}:$PYTHONPATH" exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    given = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "MAKE"))}
    return subprocess.run(
        ["make", "--no-print-directory", target, f"PYTHON={python}"],
        cwd=ROOT,
        env={**given, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_every_check_skips_without_a_gpu(tmp_path):
    done = make("check-gpu", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "device: no GPU; torch" in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]
    assert "skipped" in done.stdout.splitlines()[-1]


def test_the_checks_hold_on_the_cpu(tmp_path):
    done = make("check-gpu", tmp_path, TURNOVER_GPU_TESTS="cpu")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert skipped
    assert all("needs a GPU" in line or "msgspec" in line for line in skipped), skipped
    assert not torch.cuda.is_available() or "device: the CPU" in done.stdout
