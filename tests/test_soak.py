"""Hundreds of rounds of the same work in one process: what it holds does not grow.

``TURNOVER_SOAK_ROUNDS`` sets how many (300, half a minute of processor time); the bounds are the same for
any number.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("psutil", reason="psutil is not installed")
pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from test_cli import data, encoder, run  # noqa: F401 - fixtures
from viewing import ENVIRONMENT

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is asked of glibc"),
]
ROUNDS = int(os.environ.get("TURNOVER_SOAK_ROUNDS", "300"))
SCRIPT = Path(__file__).parent / "soak.py"
BOUNDS = {"memory": 8 * 2**20, "descriptors": 0, "threads": 32, "hooks": 0, "files": 0}
"""By how much what is held may grow after the first third of the rounds: bytes; threads up to a full pool."""


def grown(what: str, folder: Path, rounds: int = ROUNDS) -> dict[str, float]:
    """How much more of each is held in the last rounds than after the first third of them."""
    temporary = folder.parent / f"temporary {what}"
    temporary.mkdir()
    # A process of its own: what other tests left behind would be given back in this one.
    environment = {**ENVIRONMENT, "TMPDIR": str(temporary), "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, str(SCRIPT), what, str(folder), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    samples = json.loads(done.stdout)
    assert len(samples) >= 30
    warm = samples[len(samples) // 3 :]
    middle = {
        name: [statistics.median(one[name] for one in part) for part in (warm[:7], warm[-7:])]
        for name in BOUNDS
    }
    sys.stdout.write(f"{what}, {rounds} rounds: {middle}\n")
    return {name: last - first for name, (first, last) in middle.items()}


def test_training_estimates_and_results_leave_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    more = grown("estimating", folder)
    assert {name: more[name] for name in BOUNDS if more[name] > BOUNDS[name]} == {}


def test_requests_to_the_view_leave_nothing_behind(run: Path, tmp_path: Path) -> None:  # noqa: F811
    more = grown("viewing", Path(shutil.copytree(run, tmp_path / "run")))
    assert {name: more[name] for name in BOUNDS if more[name] > BOUNDS[name]} == {}


def test_what_leaks_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "nothing"
    folder.mkdir()
    more = grown("leaking", folder, rounds=300)
    assert {name for name in BOUNDS if more[name] > BOUNDS[name]} == BOUNDS.keys()
