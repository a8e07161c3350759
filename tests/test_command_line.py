"""What all commands keep to: help, completion, one JSON document, and exit codes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

import typer

import test_cli
import tiny
from test_cli import ENVIRONMENT, fit_arguments, sentences, turnover, turnover_process, write_csv
from turnover.cli import EXAMPLES, app
from turnover.io.parsing import read_json

encoder, data, run, noisy_run = test_cli.encoder, test_cli.data, test_cli.run, test_cli.noisy_run
copy_of_run = test_cli.copy_of_run
GROUP = typer.main.get_command(app)
COMMANDS = sorted(GROUP.commands)
OPTIONS = [
    pytest.param(option, id=f"{name} {option.name}")
    for name, command in GROUP.commands.items()
    for option in command.params
]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_has_help(option) -> None:
    assert option.help and option.help[0].isupper() and option.help.rstrip().endswith(".")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_that_parses_and_can_print_json(name: str) -> None:
    command = GROUP.commands[name]
    assert f"Example: turnover {name} " in turnover(name, "--help").stdout
    (example,) = (line for one, line in EXAMPLES.items() if one.__name__ == name)
    arguments = shlex.split(example)[2:]
    assert command.make_context(name, [*arguments]).params["as_json"] is False
    assert command.make_context(name, [*arguments, "--json"]).params["as_json"] is True


def test_help_and_version_end_with_0() -> None:
    assert turnover().stdout == turnover("--help").stdout
    from turnover import __version__

    assert turnover("--version").stdout == f"turnover {__version__}\n"


def test_choices_are_those_of_the_library() -> None:
    from turnover.fairness import GAPS
    from turnover.tasks.cleanse import RANKINGS
    from turnover.tasks.explain import AMONG
    from turnover.tasks.fairness import DECISIONS, METHODS
    from turnover.tasks.score import OBJECTIVES, PAIR_METHODS

    def choices(command: str, option: str) -> set[str]:
        return set(completed(f"turnover {command} --{option} "))

    assert choices("influence run", "method") == set(PAIR_METHODS)
    assert choices("influence run", "objective") == set(OBJECTIVES)
    assert choices("groups run", "objective") == set(OBJECTIVES)
    assert choices("cleanse run", "ranking") == set(RANKINGS)
    assert choices("fairness run", "gap") == set(GAPS)
    assert choices("fairness run", "method") == set(METHODS)
    assert choices("fairness run", "decision") == set(DECISIONS)
    assert choices("explain run", "among") == set(AMONG)


def completed(words: str, shell: str = "bash") -> list[str]:
    """What a shell is told when the tabulator key is pressed after these words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_TURNOVER_COMPLETE", f"complete_{shell}")
        patch.setenv("COMP_WORDS", words)
        patch.setenv("COMP_CWORD", str(len(shlex.split(words)) - (not words.endswith(" "))))
        patch.setenv("_TYPER_COMPLETE_ARGS", words)
        patch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        return turnover().stdout.splitlines()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_options_complete(shell: str) -> None:
    assert "influence" in "\n".join(completed("turnover infl", shell))
    options = "\n".join(completed("turnover influence run --met", shell))
    assert "--method" in options and "--objective" not in options
    assert "exact" in "\n".join(completed("turnover influence run --method ", shell))


IN_SHELLS = {
    "bash": """eval "$(turnover --show-completion)"
COMP_WORDS=(turnover influence run --method ""); COMP_CWORD=4
_turnover_completion turnover; echo "${COMPREPLY[@]}"
""",
    "zsh": """autoload -U compinit; compinit -u
eval "$(turnover --show-completion)"
_arguments() { print -r -- "$@"; }
words=(turnover influence run --method ""); CURRENT=5
_turnover_completion
""",
    "fish": """turnover --show-completion | source
complete -C "turnover influence run --method "
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("shell", IN_SHELLS)
def test_a_shell_completes_by_the_script_that_is_shown(shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"no {shell} here")
    command, script = tmp_path / "turnover", tmp_path / "script"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m turnover "$@"\n')
    command.chmod(0o755)
    script.write_text(IN_SHELLS[shell])
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    finished = subprocess.run(
        [program, str(script)],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "PATH": path, "HOME": str(tmp_path)},
    )
    found = re.findall("linear|exact|rerank|auto", finished.stdout)
    assert sorted(found) == ["auto", "exact", "linear", "rerank"], finished.stderr


@pytest.fixture
def grouped_run(encoder: Path, tmp_path: Path) -> Path:
    rows = [(f"source {i % 5}", text, label) for i, text, label in sentences(60)]
    path = write_csv(tmp_path / "grouped.csv", rows, "source,text,label")
    more = ("--group-column", "source", "--test", path, "--no-compare", "--epochs", 1)
    turnover(*fit_arguments(path, encoder, tmp_path / "grouped", *more))
    return tmp_path / "grouped"


def document(*arguments: object) -> object:
    """What a command prints on stdout with --json."""
    finished = turnover(*arguments, "--json")
    assert finished.stderr.strip(), "what people read is on stderr"
    found = json.loads(finished.stdout)
    page = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text(encoding="utf-8")
    section = page.partition("## JSON")[2].partition("\n## ")[0]
    documented = [
        row
        for _, command, row in (
            line.split("|", 2) for line in section.splitlines() if line[:3] == "| `"
        )
        if f"`{arguments[0]}" in command
    ]
    for key in found[0] if isinstance(found, list) else found:
        assert any(f"`{key}`" in row for row in documented), key
    return found


def test_fit_and_plan_print_one_document(
    encoder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "r"
    found = document(*fit_arguments(data[0], encoder, out, "--no-compare", "--epochs", 1))
    metrics = read_json(out / "metrics.json")
    assert found == {"run": str(out), "metrics": metrics}
    planned = document("plan", data[0], "--model", encoder, "--id-column", "id")
    assert planned["asked"]["units"] == 8192 and planned["pilot"] is None


def test_what_scores_a_run_prints_one_document(copy_of_run: Path) -> None:
    plan = document("influence", copy_of_run, "--explain-plan", "--ghosts", 100)["plan"]
    assert {cost["method"] for cost in plan["costs"]} == {"linear", "rerank", "exact"}
    found = document("influence", copy_of_run, "--ghosts", 100, "--no-gram")
    metrics = read_json(copy_of_run / "metrics.json")
    assert found == {"run": str(copy_of_run), "metrics": metrics}
    (explained,) = document("explain", copy_of_run, "--show", 1)
    assert explained["helpful"] and explained["harmful"]
    page = document("report", copy_of_run)["file"]
    assert Path(page) == copy_of_run / "report.html" and Path(page).is_file()


def test_groups_print_one_document(grouped_run: Path) -> None:
    found = document("groups", grouped_run, "--show", 1)
    assert found == json.loads((grouped_run / "results" / "groups.json").read_text())


def test_what_judges_the_data_prints_one_document(noisy_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(noisy_run, tmp_path / "run"))
    learned = document("memorize", run, "--show", 4)
    assert learned["file"] == str(run / "results" / "memorization.csv")
    assert {"key", "label", "memorization", "text"} == set(learned["rows"][3])
    assert len(learned["rows"]) == 4 and len(learned["curves"]["memorized"]["hidden"]) == 4
    out_of_sample = document("predict", run, "--hidden")
    assert out_of_sample["rows"] == 160 and 0 <= out_of_sample["exposed_share"] <= 1
    predicted = document("predict", run)
    assert set(predicted) == {"file", "rows", "accuracy", "device"}
    flagged = document("review", run, "--budget", 5)
    assert Path(flagged["file"]).is_file() and len(flagged["rows"]) == 5
    decisions, out = tmp_path / "d.csv", tmp_path / "cleaned.csv"
    decisions.write_text(f"key,decision\n{flagged['rows'][0]['key']},remove\n")
    after = document("review", run, "--decisions", decisions, "--out", out)
    assert after == {"file": str(out), "kept": 159, "removed": 1, "relabelled": 0}
    validation = write_csv(tmp_path / "v.csv", sentences(20, 900))
    arguments = ("--validation", validation, "--out", out, "--fraction", 0.05, "--seeds", 1)
    cleansed = document("cleanse", run, *arguments)
    assert cleansed["file"] == str(out) and Path(cleansed["removed_file"]).is_file()
    assert {"ranking", "fraction", "removed", "validation", "test"} <= set(cleansed)


def test_the_demo_prints_one_document(
    encoder: Path, data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its own sentences take minutes; what is tested here is what it prints.
    monkeypatch.setattr("turnover.data.demo.model_folder", lambda: encoder)
    monkeypatch.setattr("turnover.data.demo.write_sentences", lambda folder: data)
    out = tmp_path / "demo"
    found = document("demo", "--out", out, "--head-units", 64)
    assert set(found) == {"run", "metrics", "explanations", "file"}
    assert Path(found["file"]).is_file() and found["run"] == str(out)
    again = tmp_path / "again"
    turnover("fit", "--config", out / "fit.toml", "--out", again)
    weights = [(one / "model.safetensors").read_bytes() for one in (out, again)]
    assert weights[0] == weights[1]


def test_numbers_that_are_not_finite_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    from turnover.cli.output import Output

    Output(as_json=True).document({"a": float("nan"), "b": [1.5, float("inf")]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None]}


def test_texts_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    from turnover.cli.output import Output

    output, table = Output(as_json=False), Table("text")
    table.add_row("[bold] :fire:")
    output.say(table)
    output.say("run: " + 30 * "long/[red]:fire:/")
    shown = capsys.readouterr().out
    assert "[bold] :fire:" in shown and 30 * "long/[red]:fire:/" in shown


BAD_INPUT = {
    "attribute": ("--model", "no/such", "--train", "nothing.csv", "--test", "no.csv", "--out", "r"),
    "fit": ("nothing.csv", "--model", "no/such", "--out", "r"),
    "plan": ("nothing.csv", "--model", "no/such"),
    "influence": (".", "--ghosts", 100),
    "explain": (".", "--sheet", "s.png"),
    "memorize": (".",),
    "groups": (".",),
    "predict": (".", "--out", "p.csv"),
    "review": (".", "--out", "r.csv"),
    "fairness": (".", "--attributes", "a.csv", "--positive", "pos"),
    "cleanse": (".", "--validation", "v.csv", "--out", "c.csv"),
    "report": (".", "--out", "r.html"),
    "view": (".", "--no-open"),
    "demo": ("--out", ".", "--head-units", 0),
    "doctor": ("too", "much"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_bad_input_is_one_line_with_json_too_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for more in ((), ("--json",)):
        finished = turnover(name, *BAD_INPUT[name], *more, expect=2)
        assert finished.stderr.startswith("turnover: ") and not finished.stdout
        assert len(finished.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_process_of_every_command_ends_with_2_on_bad_input(name: str, tmp_path: Path) -> None:
    finished = turnover_process(name, *BAD_INPUT[name], "--json", cwd=tmp_path)
    assert finished.returncode == 2 and not finished.stdout
    assert len(finished.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fit", "x.csv"), "Missing option '--model'"),
        (("fitt",), "Did you mean 'fit'"),
        (("influence",), "Missing argument"),
        (("influence", "run", "--mehtod", "linear"), "No such option"),
        (("explain", "run", "--top", 0), "'--top'"),
        (("plan", "x.csv", "--model", "m", "--epochs", "many"), "'--epochs'"),
    ],
)
def test_what_cannot_be_parsed_is_one_line_that_says_where_help_is(
    arguments: tuple[object, ...], said: str
) -> None:
    finished = turnover(*arguments, expect=2)
    assert said in finished.stderr and "--help" in finished.stderr
    assert len(finished.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("report", "--out", "no/such/r.html"), "no/such"),
        (("report", "--out", "."), "is a folder"),
        (("predict", "--out", "."), "is a folder"),
        (("explain", "--text", "a", "--image", "b.png"), "give one of them"),
        (("cleanse", "--validation", "v.csv", "--out", "c.xls"), "cannot write that format"),
        (("fairness", "--attributes", "a.csv", "--positive", "p", "--out", "f.tsv"), "a CSV file"),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_run_is_read(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *options = arguments
    assert said in turnover(name, "no run", *options, expect=2).stderr
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_written_over_a_file(
    encoder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    taken = tmp_path / "notes.txt"
    taken.write_text("mine")
    refused = turnover(*fit_arguments(data[0], encoder, taken, "--overwrite"), expect=2)
    assert "notes.txt" in refused.stderr and taken.read_text() == "mine"
    demo = turnover("demo", "--out", taken, expect=2)
    assert "not a run" in demo.stderr and [taken] == list(tmp_path.iterdir())
    inside = turnover(*fit_arguments(data[0], encoder, taken / "run"), expect=2)
    assert "notes.txt" in inside.stderr


@pytest.mark.slow
def test_an_unexpected_error_of_a_process_is_a_traceback_and_1(run: Path) -> None:
    program = (
        "from turnover import cli; from turnover.runs.run import Run; Run.load = None; import sys; "
        f"sys.argv = ['turnover', 'memorize', {str(run)!r}, '--json']; cli.main()"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert finished.returncode == 1 and not finished.stdout
    assert "Traceback" in finished.stderr and "TypeError" in finished.stderr


@pytest.mark.slow
def test_an_interrupted_process_ends_with_130_and_resumes(
    encoder: Path, data: tuple[Path, Path], tmp_path: Path
) -> None:
    more = ("--test", data[1], "--no-compare", "--json")
    arguments = fit_arguments(data[0], encoder, tmp_path / "run", *more)
    command = [sys.executable, "-m", "turnover", *map(str, arguments), "--epochs", "40"]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=tiny.interruptible,
    )
    checkpoint = tmp_path / ".run.partial" / "turnover.checkpoint"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and not out
    assert err.splitlines()[-1] == "turnover: interrupted; the same command resumes where it can"
    assert "Traceback" not in err
    assert checkpoint.exists() and not (tmp_path / "run").exists()
    resumed = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["run"] == str(tmp_path / "run")
    progress = re.findall(r"with turn-over dropout:\s+(\d+)%", resumed.stderr)
    assert int(progress[0]) > 0, "epochs that were done are not done again"
    assert not list(tmp_path.glob(".*"))
