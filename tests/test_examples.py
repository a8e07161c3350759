"""Every script of ``examples/`` runs as it stands, is short, and needs at most three lines of turn-over."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NEEDED = {
    "accelerate_loop": ("accelerate", "datasets", "transformers"),
    "lightning_trainer": ("lightning", "sklearn"),
    "peft_lora": ("accelerate", "datasets", "peft", "transformers"),
    "pytorch": ("sklearn",),
    "sb3_agent": ("stable_baselines3", "gymnasium"),
    "several_nodes": ("sklearn",),
    "sklearn_classifier": ("sklearn",),
    "transformers_trainer": ("accelerate", "datasets", "transformers"),
}

of_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)


def test_there_are_examples():
    assert SCRIPTS


@of_script
def test_an_example_is_short_and_marks_at_most_three_lines(script):
    lines = script.read_text().splitlines()
    marked = [line for line in lines if line.endswith("# turn-over")]
    assert len(lines) < 40
    assert 1 <= len(marked) <= 3


@pytest.mark.long
@of_script
def test_an_example_runs_and_names_training_instances(script, tmp_path):
    for package in NEEDED.get(script.stem, ()):
        pytest.importorskip(package, reason=f"{script.name} needs {package}")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "helpful" in done.stdout or "helped" in done.stdout
