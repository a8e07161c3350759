"""``make check-gpu`` without a GPU, and without most of the packages of this environment."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import gpu

import tiny
from turnover import Batch, objectives
from turnover.influence.gram.capture import Capture
from turnover.influence.gram.kernel import block_of

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
TINY = gpu.Sizes(
    product=64,
    rounds=2,
    steps=2,
    mask_rows=32,
    units=64,
    step_rows=16,
    width=64,
    linear_ids=200,
    linear_targets=40,
    block=64,
    exact_ids=64,
    exact_targets=2,
    gram_rows=40,
    gram_width=32,
    texts=12,
    tokens=8,
    text_rows=4,
    bert=(
        *(("hidden_size", 32), ("num_hidden_layers", 2), ("num_attention_heads", 2)),
        *(("intermediate_size", 64), ("vocab_size", 120)),
    ),
)


def poor_python(folder: Path) -> str:
    (folder / "sitecustomize.py").write_text(MISSING)
    python = folder / "python"
    python.write_text(
        f'#!/bin/sh\nPYTHONPATH="{folder}:$PYTHONPATH" exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    return str(python)


def ran(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "MAKE"))}
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**given, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def make(target: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    python = poor_python(folder)
    return ran("make", "--no-print-directory", target, f"PYTHON={python}", **environment)


def test_every_check_skips_without_a_gpu(tmp_path):
    done = make("check-gpu", tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "device: no GPU; torch" in done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]
    assert "skipped" in done.stdout.splitlines()[-1]


@pytest.mark.long
def test_the_checks_hold_on_the_cpu(tmp_path):
    done = make("check-gpu", tmp_path, TURNOVER_GPU_TESTS="cpu")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert skipped
    assert all("needs a GPU" in line or "msgspec" in line for line in skipped), skipped
    assert "device: the CPU" in done.stdout


def test_the_benchmark_says_that_there_is_no_gpu(tmp_path):
    done = make("bench-gpu", tmp_path)
    assert done.returncode == 2
    (said,) = (line for line in done.stderr.splitlines() if not line.startswith("make"))
    assert said == "benchmarks/gpu.py: torch sees no CUDA GPU"


def numbers(found):
    for value in found.values():
        if isinstance(value, dict):
            yield from numbers(value)
        elif isinstance(value, float):
            yield value


@pytest.mark.long
def test_every_part_of_the_benchmark_runs(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    program = (
        "from pathlib import Path; import torch; from benchmarks import gpu; Sizes = gpu.Sizes; "
        f"gpu.measure(list(gpu.PARTS), {TINY!r}, torch.device('cpu'), Path({str(tmp_path / 'gpu.json')!r}))"
    )
    path = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    done = ran(poor_python(tmp_path), "-c", program, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {"date", "device", "driver", "torch", "commit", *gpu.PARTS} <= set(found)
    for name in gpu.PARTS:
        values = list(numbers(found[name]))
        assert len(values) > 3 and all(math.isfinite(one) and one > 0 for one in values), name
        assert f"{name}:" in done.stdout


def test_a_benchmark_that_is_stopped_keeps_what_it_measured(tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    def needs_more(*_):
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    monkeypatch.setitem(gpu.PARTS, "exact", stopped)
    monkeypatch.setitem(gpu.PARTS, "bert_step", needs_more)
    out = tmp_path / "results" / "gpu.json"
    with pytest.raises(KeyboardInterrupt):
        gpu.measure(["masks", "bert_step", "exact"], TINY, torch.device("cpu"), out)
    found = json.loads(out.read_text())
    assert found["masks"]["keep_0.5"]["masks_per_s"] > 0 and "exact" not in found
    assert found["bert_step"]["skipped"] == "No module named 'peft'"
    assert [one.name for one in out.parent.iterdir()] == ["gpu.json"]


def test_operations_of_gram_are_the_products_of_its_factors():
    """Of inputs and of output gradients, layer by layer, where a row has one of each."""
    model, batch = tiny.mlp(16).eval(), Batch(tiny.features(5), tiny.labels(5))
    block = block_of([Capture(model, objectives.margin, residuals=False).rows(batch)])
    widths = (6 + 16) + (16 + 16) + (16 + tiny.CLASSES)
    assert gpu.flops_of(block, block) == 2 * 5 * 5 * widths
