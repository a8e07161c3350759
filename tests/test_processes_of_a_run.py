"""Commands on one run that are killed, or run at the same time: real processes."""

# ruff: noqa: F811 - fixtures of other files

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="pillow is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("typer", reason="typer is not installed")

from test_cli import turnover
from test_images import folders, run  # noqa: F401 - fixtures: a run of images, with its results
from test_store import wait_for
from turnover.runs.run import Run

TIMED = {"metrics.json"}
HERE = Path(__file__).parent
PAUSED = """
import importlib, sys, time
module, name, calls = sys.argv[1].split(":")
module = importlib.import_module(module)
*owner, name = name.split(".")
for one in owner:
    module = getattr(module, one)
of, left = getattr(module, name), int(calls)
def paused(*given, **named):
    global left
    if left == 0:
        print("now", flush=True)
        time.sleep(600)
    left -= 1
    return of(*given, **named)
setattr(module, name, paused)
from turnover import cli
sys.argv = ["turnover", *sys.argv[2:]]
cli.main()
"""


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def same(left: dict[str, bytes], right: dict[str, bytes]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left.keys() - TIMED if left[name] != right[name]] == []


def paused(where: str, *arguments: object) -> subprocess.Popen[bytes]:
    """A command that stands still at a call of a function: module:name:calls before."""
    paths = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSED, where, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert any(line == b"now\n" for line in process.stdout), "it ended before"
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.mark.long
def test_influence_killed_between_two_stages_ends_as_if_never_cut_off(
    copy: Path, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(copy, tmp_path / "whole"))
    turnover("influence", whole, "--ghosts", 1000)
    turnover("explain", copy, "--show", 0)
    stages = (
        "turnover.tasks.score:_fresh:0",  # the errors are estimated
        "turnover.tasks.score:write_json:0",  # all is, but for the metrics
    )
    for stage in stages:
        kill(paused(stage, "influence", copy, "--ghosts", 1000))
        Run.load(copy)
    turnover("influence", copy, "--ghosts", 1000)
    (copy / "results" / "explanations.json").unlink()
    same(contents(copy), contents(whole))


@pytest.mark.long
def test_of_two_that_score_one_run_one_is_refused(copy: Path, tmp_path: Path) -> None:
    whole = contents(copy)
    first = paused("turnover.tasks.score:_fresh:0", "influence", copy, "--ghosts", 1000)
    try:
        before = contents(copy)
        for other in (("--ghosts", 1000), ("--ghosts", 50, "--objective", "cross_entropy")):
            said = turnover("influence", copy, *other, expect=2).stderr
            assert "is being written by another process; wait for it to end" in said
        assert contents(copy) == before
        turnover("explain", copy, "--show", 0)  # what there was before
    finally:
        kill(first)
    turnover("influence", copy, "--ghosts", 1000)
    (copy / "results" / "explanations.json").unlink()
    same(contents(copy), whole)


FIT = ("--model", "vgg11", "--width", 4, "--hidden", 64, "--epochs", 1, "--batch-size", 12)


@pytest.mark.long
def test_a_fit_replaces_a_run_when_nobody_scores_it_any_more(
    copy: Path, folders: tuple[Path, Path]
) -> None:
    fit = ("fit", folders[0], "--test", folders[1], *FIT, "--no-compare", "--seed", 5)
    loaded, old = Run.load(copy), contents(copy)
    scoring = paused("turnover.tasks.score:_fresh:0", "influence", copy, "--ghosts", 1000)
    paths = str(HERE.parent / "src")
    fitting = subprocess.Popen(
        [sys.executable, "-m", "turnover", *map(str, fit), "--overwrite", "--out", str(copy)],
        env=os.environ | {"PYTHONPATH": paths},
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    draft = copy.with_name(".run.partial")
    try:
        wait_for(lambda: (draft / "digests.json").exists())
        assert fitting.poll() is None
        other = turnover(*fit[:-1], 6, "--overwrite", "--out", copy, expect=2).stderr
        assert "is being written by another process; wait for it to end" in other
        assert (copy / "model.safetensors").read_bytes() == old["model.safetensors"]
    finally:
        kill(scoring)
    assert fitting.wait(60) == 0
    assert (copy / "model.safetensors").read_bytes() != old["model.safetensors"]
    assert not (copy / "results").exists() and not draft.exists()
    from turnover.tasks.score import ScoreConfig, score

    with pytest.raises(ValueError, match="was fitted again since it was loaded; run again"):
        score(loaded, ScoreConfig(ghosts=50))
    assert not list((copy / "results").iterdir())


@pytest.mark.long
def test_of_two_fits_of_one_run_one_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    fit = ("fit", folders[0], "--test", folders[1], *FIT, "--no-compare")
    turnover(*fit, "--out", tmp_path / "whole")
    first = paused("turnover.tasks.fit:_metrics:0", *fit, "--out", tmp_path / "run")
    try:
        said = turnover(*fit, "--out", tmp_path / "run", expect=2).stderr
        assert "is being written by another process; wait for it to end" in said
        assert (tmp_path / ".run.partial" / "turnover.checkpoint").exists()
    finally:
        kill(first)
    turnover(*fit, "--out", tmp_path / "run")
    made, whole = contents(tmp_path / "run"), contents(tmp_path / "whole")
    assert made.keys() == whole.keys()
    assert made["model.safetensors"] == whole["model.safetensors"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("report",), "report.html"),
        (("explain", "--show", 0), "results/explanations.json"),
        (("predict",), "results/predictions.csv"),
    ],
    ids=["report", "explain", "predict"],
)
def test_a_command_killed_while_it_writes_leaves_what_was_there(
    command: tuple[object, ...], name: str, copy: Path
) -> None:
    turnover(command[0], copy, *command[1:])
    before = contents(copy)
    kill(paused("pathlib:Path.replace:0", command[0], copy, *command[1:]))
    after = contents(copy)
    assert {key: after.get(key) for key in before} == before
    assert all(Path(key).name.startswith(".") for key in after.keys() - before.keys())
    turnover(command[0], copy, *command[1:])
    assert contents(copy)[name] == before[name]
