"""Any options in any order: a command does what is asked, or says in one line what is wrong."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("PIL")
pytest.importorskip("transformers")
pytest.importorskip("typer")

import fuzzing
from test_images import arrays, folders  # noqa: F401 - a fixture
from test_images import run as image_run  # noqa: F401 - a fixture
from turnover import cli
from turnover.cli.config import options_of

COMMANDS = {
    one.callback.__name__: options_of(one.callback)
    for one in cli.app.registered_commands
    if one.callback is not None
}
ON_A_RUN = ["explain", "memorize", "groups", "predict", "review", "report"]
TEXTS = st.text(st.characters(exclude_characters="\0"), max_size=5)
ODD = ["", " ", "-1", "0", "1", "2", "0.5", "nan", "inf", "-inf", "1e400", "9" * 30, "x", "\u2603"]
ODD += [
    "..",
    ".",
    "-",
    "--",
    "a.csv",
    "a.npz",
    "missing/a.csv",
    "\ud800",
    "[red]",
    "s3://",
    "://",
]
NAMES = sorted({name for options in COMMANDS.values() for name in options})


@st.composite
def options(draw: st.DrawFn, command: str) -> list[str]:
    """Options, mostly of the command, with values that are mostly wrong."""
    given_options = []
    for _ in range(draw(st.integers(0, 4))):
        name = draw(
            st.one_of(st.sampled_from(list(COMMANDS[command]) or NAMES), st.sampled_from(NAMES))
        )
        value = draw(st.one_of(st.sampled_from(ODD), TEXTS))
        form = draw(st.integers(0, 3))
        given_options += {
            0: [f"--{name}"],
            1: [f"--{name}={value}"],
            2: [f"--no-{name}"],
            3: [f"--{name}", value],
        }[form]
    return given_options


def run_command(*arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command in this process; what is no exit is a failure."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["turnover", *arguments])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), fuzzing.limited(60):
            try:
                cli.main()
            except SystemExit as stop:
                return int(stop.code or 0), err.getvalue()
    raise AssertionError("main returned")


def check(arguments: list[str]) -> None:
    code, said = run_command(*arguments)
    assert code in (0, 2), f"{arguments}: {code}\n{said}"
    if code == 2:
        told = [line for line in said.splitlines() if line.startswith("turnover: ")]
        assert told and "Traceback" not in said, f"{arguments}: {said}"
        assert len(told[-1]) > len("turnover: ") + 5


@pytest.fixture(scope="module")
def place(image_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:  # noqa: F811
    """A folder to be in, with a run and data."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(image_run, folder / "run")
    arrays(folder / "images.npz")
    (folder / "texts.csv").write_text("text,label\n" + "a b,x\nc d,y\n" * 10)
    (folder / "list.csv").write_text("key,decision\nblue/000.png,keep\n")
    here = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(here)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("view", "demo")])
def test_any_options_on_what_is_not_there_are_refused(command: str, place: Path) -> None:
    @fuzzing.bounded(20)
    @given(
        drawn=options(command),
        first=st.sampled_from(["missing", "list.csv", "", ".", "s3://"]),
    )
    def any_options(drawn: list[str], first: str) -> None:
        code, said = run_command(command, first, *drawn)
        assert code == 2 or "--help" in drawn, f"{drawn}: {code} {said}"
        assert code == 0 or said.splitlines()[-1].startswith("turnover: "), said

    any_options()


@pytest.mark.parametrize("command", ON_A_RUN)
def test_any_options_on_a_run_are_obeyed_or_refused(command: str, place: Path) -> None:
    @fuzzing.bounded(10)
    @given(drawn=options(command))
    def any_options(drawn: list[str]) -> None:
        check([command, "run", *drawn])

    any_options()


@pytest.mark.long
@pytest.mark.parametrize("command", [*ON_A_RUN, "cleanse", "influence"])
def test_many_options_on_a_run_are_obeyed_or_refused(command: str, place: Path) -> None:
    @fuzzing.bounded(150)
    @given(drawn=options(command))
    def any_options(drawn: list[str]) -> None:
        check([command, "run", *drawn])

    any_options()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--keep", one) for one in ("nan", "inf", "0", "1", "-1", "1e400")),
        *(("--learning-rate", one) for one in ("nan", "inf", "-1", "1e400")),
        *(("--seed", one) for one in ("9" * 30, "-" + "9" * 30, str(2**63))),
        *(("--batch-size", one) for one in ("0", "-1")),
        *(("--width", one) for one in ("0", "9" * 30)),
        *(("--image-size", one) for one in ("0", "31", "9" * 30)),
        *(("--hidden", one) for one in ("0", "9" * 30)),
        ("--site", "none"),
        ("--label-column", "none"),
        ("--test", "missing"),
        ("--out", "list.csv"),
        ("--config", "list.csv"),
        ("--weights", "texts.csv"),
        ("--weights", "."),
    ],
)
def test_values_that_cannot_be_are_named_before_training(
    option: str, value: str, place: Path
) -> None:
    arguments = ["fit", "images.npz", "--test", "images.npz", "--model", "vgg11", "--out", "new"]
    code, said = run_command(*arguments, f"{option}={value}")
    assert code == 2 and said.splitlines()[-1].startswith("turnover: "), said
    assert "training" not in said
    assert not (place / "new").exists() and not (place / ".new.partial").exists()


def test_a_file_of_options_cannot_hold_what_a_command_line_cannot(place: Path) -> None:
    for option in ("out", "test", "weights", "label-column"):
        (place / "fit.toml").write_text(f'{option} = "a\\u0000b"\n')
        code, said = run_command("fit", "images.npz", "--config", "fit.toml", "--model", "vgg11")
        assert code == 2 and "holds a zero character" in said
