"""What all commands keep to: help, completion, JSON, exit codes, and runs that can be made again."""

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
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("transformers")
typer = pytest.importorskip("typer")

from test_cli import (  # noqa: F401 - fixtures
    ENVIRONMENT,
    copy_of_run,
    data,
    encoder,
    fit_arguments,
    noisy_run,
    run,
    sentences,
    turnover,
    turnover_process,
    write_csv,
)

from turnover.cli import EXAMPLES, app

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
    from turnover.tasks.cleanse import RANKINGS
    from turnover.tasks.explain import AMONG
    from turnover.tasks.score import OBJECTIVES, PAIR_METHODS

    def choices(command: str, option: str) -> set[str]:
        return set(completed(f"turnover {command} --{option} "))

    assert choices("influence run", "method") == set(PAIR_METHODS)
    assert choices("influence run", "objective") == set(OBJECTIVES)
    assert choices("groups run", "objective") == set(OBJECTIVES)
    assert choices("cleanse run", "ranking") == set(RANKINGS)
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
