"""Options from a TOML file, and the file in a run's folder that makes the run again."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w
import typer

from turnover.cli.parameters import RUN
from turnover.errors import InputError
from turnover.io.parsing import read_toml
from turnover.runs.run import versions

_MADE = "made"
"""The table of what made a run: read for a note alone."""
_NOT_OPTIONS = ("config", "as_json")
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "text"}


def config_option(*, passing_over: Callable[..., None] | None = None) -> Any:
    """What ``--config`` of a command is.

    Args:
        passing_over: a command whose options may stand in the file too, and are not read.
    """
    others = set() if passing_over is None else set(options_of(passing_over))

    def read(ctx: typer.Context, config: Path | None) -> Path | None:
        if config is not None and not ctx.resilient_parsing:
            assert ctx.command.callback is not None
            values = read_config(config, options_of(ctx.command.callback), others)
            ctx.default_map = {key.replace("-", "_"): value for key, value in values.items()}
        return config

    return typer.Option(
        callback=read,
        is_eager=True,
        help="TOML file with options under their long names, dashes and all; those on the command "
        "line win.",
        rich_help_panel=RUN,
    )


def read_config(path: Path, options: Mapping[str, Any], others: set[str]) -> dict[str, Any]:
    """Options by their long names.

    Args:
        path: TOML file.
        options: type of each option that there is.
        others: options that may stand in the file and are left out.

    Raises:
        InputError: no such file, not TOML, an unknown option, or a value of another type.
    """
    values = read_toml(path)
    made = values.pop(_MADE, {})
    for key, value in values.items():
        if "\0" in str(value):
            raise InputError(
                f"{path}: {key!r} holds a zero character, and no name may: take it out"
            )
        if key in options:
            if not _fits(value, options[key]):
                raise InputError(
                    f"{path}: {key!r} must be {_said(options[key])}, got {value!r} of the type "
                    f"{type(value).__name__}"
                )
        elif key not in others:
            known = sorted({*options, *others})
            close = difflib.get_close_matches(key.replace("_", "-"), known, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
            raise InputError(f"{path}: unknown option {key!r}{hint}")
    _note_other_versions(path, made)
    return {key: value for key, value in values.items() if key in options}


def recipe(settings: Mapping[str, Any], files: Collection[str]) -> str:
    """TOML text with which ``turnover fit --config`` makes a run again.

    Args:
        settings: values by the parameters' names; those that are ``None`` are left out.
        files: those of them that may name a file or folder here; where they do, the whole path is
            given, so that the text may be read from anywhere.
    """
    options = {}
    for name, value in settings.items():
        if name in files and value is not None and Path(value).exists():
            value = Path(value).resolve()
        if value is not None:
            options[name.replace("_", "-")] = str(value) if isinstance(value, Path) else value
    made: dict[str, Any] = {"command": ["turnover", *sys.argv[1:]], **versions()}
    return tomli_w.dumps({**options, _MADE: made})


def options_of(command: Callable[..., Any]) -> dict[str, Any]:
    """Type of each option of a command that may stand in its file."""
    hints = get_type_hints(command).items()
    return {name.replace("_", "-"): hint for name, hint in hints if name not in _NOT_OPTIONS}


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_fits(one, arguments[0]) for one in value)
    if hint is float:
        return type(value) in (int, float)
    return type(value) is (str if hint is Path else hint)


def _said(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(_said(one) for one in arguments if one is not NoneType)
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is list:
        return f"a list, each {_said(arguments[0])}"
    return _WORDS[hint]


def _note_other_versions(path: Path, made: Any) -> None:
    then = made if isinstance(made, dict) else {}
    other = [
        f"{name} {then[name]} (here {own})"
        for name, own in versions().items()
        if then.get(name, own) != own
    ]
    if other:
        sys.stderr.write(f"turnover: note: {path} was written with {', '.join(other)}\n")
