"""What README and guides show: the Python runs, the commands exist, every page is found."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import turnover
from documents import (
    PAGES,
    ROOT,
    commands,
    inline_commands,
    name_of,
    python_of,
    shell_lines,
    vocabulary,
)

WITH_PYTHON = [page for page in PAGES if python_of(page)]


OPTIONAL = {
    "cleanlab",
    "dattri",
    "gymnasium",
    "lightning",
    "opendataval",
    "quanda",
    "skorch",
    "stable_baselines3",
}
"""Packages whose blocks are left out where they are not installed."""


def option_names(command) -> set[str]:
    names = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    return names | {"--help"}


@pytest.fixture(scope="module")
def command_line():
    typer = pytest.importorskip("typer")
    from turnover import cli

    return typer.main.get_command(cli.app)


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_of_a_page_runs_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"__name__": name_of(page)} if page.name == "README.md" else vocabulary()
    missing = set()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for number, block in enumerate(python_of(page)):
            if block.not_run is None:
                try:
                    for code in (block.setup, block.code):
                        exec(compile(code, f"{name_of(page)}, block {number}", "exec"), names)
                except ModuleNotFoundError as error:
                    if error.name.partition(".")[0] not in OPTIONAL:
                        raise
                    missing.add(error.name)
    if page.name == "README.md":
        assert "(5, 500)" in capsys.readouterr().out
    if missing:
        pytest.skip(f"a part of the page was left out: {', '.join(sorted(missing))} not installed")


def test_blocks_that_are_not_run_are_few_and_say_why() -> None:
    skipped = [block for page in PAGES for block in python_of(page) if block.not_run is not None]
    assert all(len(block.not_run.split()) >= 4 for block in skipped)
    assert len(skipped) <= 6


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name_of)
def test_commands_in_blocks_are_complete(page: Path, command_line) -> None:
    for name, *arguments in commands(page):
        if name.startswith("-"):
            assert name in option_names(command_line), f"turnover {name}"
        elif "--config" in arguments:  # the file says the rest
            check_options(page, command_line, name, arguments)
        else:
            assert name in command_line.commands, f"turnover {name}"
            # Raises where an option is unknown, a value of the wrong type, or a required one missing.
            command_line.commands[name].make_context(name, list(arguments))


def check_options(page: Path, command_line, name: str, arguments: list[str]) -> None:
    assert name in command_line.commands, f"{name_of(page)}: turnover {name}"
    options = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    unknown = options - option_names(command_line.commands[name])
    assert not unknown, f"{name_of(page)}: turnover {name} {unknown}"


def test_commands_in_running_text_exist(command_line) -> None:
    for page in PAGES:
        for name, *arguments in inline_commands(page):
            check_options(page, command_line, name, arguments)


def test_targets_of_make_and_extras_that_pages_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        targets = re.findall(r"`make ([\w-]+)", text)
        targets += [line.split()[1] for line in shell_lines(page) if line.startswith("make ")]
        for target in targets:
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"
        for named in re.findall(r"(?:turnover|'\.)\[([\w,]+)\]'?", text):
            assert set(named.split(",")) <= set(extras), f"{name_of(page)}: {named}"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "README.md"], ids=name_of)
def test_title_of_a_page_has_at_most_five_words(page: Path) -> None:
    title = page.read_text(encoding="utf-8").splitlines()[0]
    assert title.startswith("# ")
    assert len(title.removeprefix("# ").split()) <= 5


def test_modules_that_pages_name_exist() -> None:
    source = ROOT / "src" / "turnover"
    for page in (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md"):
        text = page.read_text()
        for name in re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", text):
            assert (ROOT / name).exists() or (source / name).exists(), f"{name_of(page)}: {name}"


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(
        ["make", "--silent", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    lines = [line.split(maxsplit=1) for line in shown.splitlines()]
    assert [target for target, said in lines if said] == phony.split()


def test_hooks_before_a_commit_are_those_of_make_lint() -> None:
    yaml = pytest.importorskip("yaml")
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.partition("\nlint:")[2].partition("\n\n")[0].splitlines()[1:]
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    commands = [hook["entry"] for hook in local["hooks"]]
    assert commands == [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe]


def test_reference_has_every_public_name() -> None:
    shown = {
        line.removeprefix("::: ").strip()
        for page in (ROOT / "docs" / "api").glob("*.md")
        for line in page.read_text().splitlines()
        if line.startswith("::: ")
    }
    from turnover import evaluation

    wanted = {f"turnover.{name}" for name in turnover.__all__}
    wanted |= {f"turnover.evaluation.{name}" for name in evaluation.__all__}
    tasks = ("cleanse", "explain", "fairness", "fit", "groups", "plan", "review", "score")
    wanted |= {f"turnover.tasks.{task}.{task}" for task in tasks}
    assert wanted <= shown


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{name_of(page)}: {link}"


def test_pictures_are_those_that_the_script_draws() -> None:
    path = ROOT / "docs" / "tools" / "pictures.py"
    spec = importlib.util.spec_from_file_location("pictures", path)
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    for name, content in pictures.drawn().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == content


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    front, reference = site / "index.html", site / "api" / "index.html"
    assert "Which training instances made this network predict that" in front.read_text()
    shown = reference.read_text()
    for name in turnover.__all__:
        assert f'id="turnover.{name}"' in shown, name
    assert ":class:" not in shown and ":meth:" not in shown
