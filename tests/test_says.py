"""What commands say: plans that count everything, texts that fit, counts, bars, next steps that run."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

import test_cli
import trained
from test_cli import fit_arguments, sentences, turnover, write_csv
from turnover.io import bars
from turnover.runs.run import Run
from turnover.tasks.predict import predict_training

encoder = test_cli.encoder
LONG = " fun" * 300
ALL_STEPS = (
    "predictions",
    "influence on",
    "fresh ghosts",
    "agreement",
    "gram",
    "all test",
    "self-",
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> tuple[Path, str]:
    """A run with long texts in a folder with a blank, not scored, and what its fit said."""
    folder = tmp_path_factory.mktemp("of two words") / "a run"
    rows = [(i, f"{text}{LONG}", label) for i, text, label in sentences(60)]
    test = [
        (i, f"{t}{LONG}", "neg" if n < 6 else o) for n, (i, t, o) in enumerate(sentences(30, 900))
    ]
    train = write_csv(folder.parent / "train.csv", rows)
    more = ("--test", write_csv(folder.parent / "test.csv", test), "--id-column", "id")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bars, "_WAIT", 0.0)  # as if every step took long
        said = turnover(*fit_arguments(train, encoder, folder, *more, "--memorization"))
    return folder, said.stdout + said.stderr


@pytest.fixture(scope="module")
def scored(fitted: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Path(shutil.copytree(fitted[0], tmp_path_factory.mktemp("scored") / "a run"))
    turnover("influence", run, "--ghosts", 100)
    return run


@pytest.fixture
def copied(fitted: tuple[Path, str], tmp_path: Path) -> Path:
    return Path(shutil.copytree(fitted[0], tmp_path / "a run"))


def next_steps(said: str) -> list[list[str]]:
    """The commands that an output names."""
    found = re.findall(r"turnover (\w+ .+?)(?=, turnover | has run|$)", said, re.MULTILINE)
    return [shlex.split(one) for one in found]


def plan_of(run: Path, *more: object) -> tuple[dict[str, Any], str]:
    finished = turnover("influence", run, "--ghosts", 100, "--explain-plan", "--json", *more)
    return json.loads(finished.stdout)["plan"], finished.stderr


def test_a_plan_counts_every_step_of_the_command_with_its_options(copied: Path) -> None:
    plan, said = plan_of(copied)
    names = [step["name"] for step in plan["steps"]]
    assert all(step in " ".join(names) for step in ALL_STEPS)
    assert len(names) == len(ALL_STEPS) and all(step["seconds"] > 0 for step in plan["steps"])
    assert plan["seconds"] == pytest.approx(sum(step["seconds"] for step in plan["steps"]))
    assert plan["gib"] == max(step["gib"] for step in plan["steps"])
    assert all(name in said for name in names) and "in total" in said
    gram = next(step for step in plan["steps"] if "gram" in step["name"])
    assert gram["gib"] > 0
    without, _ = plan_of(copied, "--no-gram")
    assert [step["name"] for step in without["steps"]] == [
        one for one in names if "gram" not in one
    ]


@pytest.mark.parametrize("method", ["linear", "exact", "rerank", "auto"])
def test_the_arrow_of_a_plan_is_at_what_runs(method: str, copied: Path) -> None:
    plan, said = plan_of(copied, "--method", method, "--no-gram")
    (marked,) = (line for line in said.splitlines() if line.endswith(" <-"))
    assert marked.split()[0] == plan["method"] == (plan["chosen"] if method == "auto" else method)
    agreed = any("agreement" in step["name"] for step in plan["steps"])
    assert agreed == (plan["method"] == "linear")
    assert any("trials" in step["name"] for step in plan["steps"]) == (method == "auto")


def test_a_plan_takes_as_long_as_the_command(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    # Other processes of the machine do not count.
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    expected, _ = plan_of(copied)
    start = time.process_time()
    turnover("influence", copied, "--ghosts", 100)
    took = time.process_time() - start  # with loading the run
    assert expected["seconds"] / 3 < took < 5 * expected["seconds"] + 2


def test_texts_take_two_lines_and_are_whole_in_files(scored: Path) -> None:
    shown = turnover("explain", scored, "--show", 2, "--top", 3)
    assert "…" in shown.stdout
    # Twelve instances by turn-over and by gram for each of two errors, tables and titles around them.
    assert len(shown.stdout.splitlines()) < 2 * (2 * (2 * 6 + 6) + 3) + 12
    written = json.loads((scored / "results" / "explanations.json").read_text())["errors"]
    assert all(len(one["text"]) > len(LONG) for one in written)
    count = len(written)
    assert f"2 of {count} errors; all: " in shown.stdout
    whole = json.loads(turnover("explain", scored, "--show", 1, "--json").stdout)
    assert len(whole[0]["harmful"][0]["text"]) > len(LONG)
    learned = turnover("memorize", scored, "--show", 7).stdout
    assert "7 of 60 rows; all: " in learned and "…" in learned
    assert len(learned.splitlines()) < 14 + 7 * 2 + 8
    assert LONG in (scored / "results" / "memorization.csv").read_text()


def test_rows_that_are_held_out_are_said(encoder: Path, tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", sentences(80))
    test = write_csv(tmp_path / "test.csv", sentences(20, 900))
    model = ("--model", encoder)
    assert "no --test: about a fifth" in turnover("plan", train, *model).stdout
    assert "no --test" not in turnover("plan", train, *model, "--test", test).stdout
    fit = fit_arguments(train, encoder, tmp_path / "r", "--no-compare", "--epochs", 1)
    assert "no --test: about a fifth" in turnover(*fit).stdout


def test_what_is_bold_has_a_mark(encoder: Path, tmp_path: Path) -> None:
    train = write_csv(tmp_path / "train.csv", sentences(80))
    said = turnover("plan", train, "--model", encoder, "--head-units", 64).stdout
    (asked,) = (line for line in said.splitlines() if "│ * " in line)
    assert asked.split()[2] == "64" or " 64" in asked
    assert "(*)" in said and "bold" not in said


def test_long_steps_have_bars(fitted: tuple[Path, str], copied: Path, monkeypatch: Any) -> None:
    said = fitted[1]
    for title in (
        "features that standardize the head",
        *("exposed losses after epoch 1", "hidden losses after epoch 2", "hidden losses on"),
    ):
        assert title in said
    monkeypatch.setattr(bars, "_WAIT", 0.0)
    bar = turnover("influence", copied, "--ghosts", 100, "--no-gram").stderr
    assert "predictions: " in bar and "signal of the sites: " in bar
    bar = turnover("review", copied).stderr
    assert all(one in bar for one in ("features of the pretrained", "calibration", "hidden pred"))


def test_stages_are_named_in_a_terminal_alone(monkeypatch: Any) -> None:
    for terminal in (True, False):
        shown = io.StringIO()
        monkeypatch.setattr(shown, "isatty", lambda there=terminal: there)
        monkeypatch.setattr(sys, "stderr", shown)
        with bars.stages("preparing", 2) as begin:
            begin("loading the model")
            begin("rehearsal")
        said = shown.getvalue()
        assert ("loading the model" in said and "rehearsal" in said) == terminal
        assert bool(said) == terminal


def test_groups_count_what_takes_the_time(encoder: Path, tmp_path: Path) -> None:
    rows = [(f"source {i % 5}", text, label) for i, text, label in sentences(60)]
    path = write_csv(tmp_path / "train.csv", rows, "source,text,label")
    more = ("--group-column", "source", "--test", path, "--no-compare", "--epochs", 1)
    turnover(*fit_arguments(path, encoder, tmp_path / "r", *more))
    finished = turnover("groups", tmp_path / "r", "--show", 1)
    assert (
        "by chance: 100%" in finished.stderr and "with and without groups: 100%" in finished.stderr
    )
    assert "2 of 5 groups; all: " in finished.stdout
    assert "have q <= 0.05 (*)" in finished.stdout


def test_empty_columns_of_a_review_are_said_until_influence_fills_them(
    copied: Path, scored: Path
) -> None:
    said = turnover("review", copied, "--budget", 3).stdout
    assert "the 3 most doubtful rows of 60: " in said and "self_influence_q are empty" in said
    (fill, then) = next_steps(said)
    assert fill == ["influence", str(copied)]
    assert then[:2] == ["review", str(copied)]
    assert "are empty" not in turnover("review", scored, "--budget", 3).stdout


def test_hidden_predictions_are_computed_once_and_again_for_other_labels(copied: Path) -> None:
    assert "hidden predictions: " in turnover("review", copied).stderr
    again = turnover("predict", copied, "--hidden")
    assert "hidden predictions: " not in again.stderr
    written = (copied / "results" / "hidden_predictions.csv").read_text().splitlines()
    found = predict_training(Run.load(copied, "cpu")).probabilities
    shown = np.array([[float(cell) for cell in line.split(",")[-2:]] for line in written[1:]])
    assert np.abs(shown - found).max() < 1e-5
    assert (
        "hidden predictions: " in turnover("predict", copied, "--hidden", "--no-calibrate").stderr
    )
    stored = copied / "results" / "hidden_predictions.safetensors"
    stored.write_bytes(stored.read_bytes()[:-8])
    assert str(stored) in turnover("predict", copied, "--hidden", expect=2).stderr


@pytest.mark.parametrize("column", ["--id-column", "--group-column"])
def test_steps_named_after_an_attribution_run(tmp_path: Path, column: str) -> None:
    rows = trained.rows(60, 0)
    folder = tmp_path / "of two words"
    folder.mkdir()
    trained.write(folder / "train.csv", rows, source=[f"s{row % 5}" for row in range(60)])
    trained.write(folder / "test.csv", trained.rows(40, 1))
    trained.texts(folder / "model", rows)
    said = turnover(
        *("attribute", "--model", folder / "model", "--train", folder / "train.csv", "--test"),
        *(folder / "test.csv", column, "id" if column == "--id-column" else "source"),
        *("--layers", "head", "--out", folder / "run"),
    ).stdout
    view, report = next_steps(said)[-2:]
    assert (view[0], report[0]) == ("view", "report") and view[1] == report[1] == str(
        folder / "run"
    )
    turnover(*report)
    again = turnover("influence", folder / "run").stdout
    for step in next_steps(again):
        turnover(*step)


def test_named_steps_run_on_a_folder_with_a_blank(
    copied: Path, fitted: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (step,) = next_steps(fitted[1])
    assert step == ["influence", str(fitted[0])]
    for step in next_steps(turnover("influence", copied, "--ghosts", 100).stdout):
        turnover(*step)
    (step,) = next_steps(turnover("review", copied).stdout)
    turnover(*step)
    assert (tmp_path / "cleaned.csv").is_file()


def test_doctor_says_where_the_model_of_the_demo_is() -> None:
    from turnover.data.demo import model_folder
    from turnover.errors import InputError

    found = json.loads(turnover("doctor", "--json").stdout)["demo_model"]
    try:
        assert found == str(model_folder()) and (Path(found) / "config.json").is_file()
    except InputError:
        assert found is None
        assert "pip install" in turnover("doctor").stdout
