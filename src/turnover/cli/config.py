"""Options from a TOML file, and the recipe in a run's folder that makes the run again."""

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
"""Table of the command and versions that made a run; only compared with the versions here."""
_NOT_OPTIONS = ("config", "as_json")
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "text"}


def config_option(*, ignoring: Callable[..., None] | None = None) -> Any:
    """Make the option ``--config`` of a command.

    Args:
        ignoring: a command whose other options are allowed in the file and ignored.
    """
    others = set() if ignoring is None else set(options_of(ignoring))

    def read(ctx: typer.Context, config: Path | None) -> Path | None:
        if config is not None and not ctx.resilient_parsing:
            assert ctx.command.callback is not None
            values = read_config(config, options_of(ctx.command.callback), others)
            ctx.default_map = {key.replace("-", "_"): value for key, value in values.items()}
        return config

    return typer.Option(
        callback=read,
        is_eager=True,
        help="TOML file with options under their long names, with dashes; options on the command line "
        "win.",
        rich_help_panel=RUN,
    )


def read_config(path: Path, options: Mapping[str, Any], others: set[str]) -> dict[str, Any]:
    """Read options by their long names.

    Args:
        path: TOML file.
        options: type of each known option.
        others: options that are allowed and ignored.
    """
    values = read_toml(path)
    made = values.pop(_MADE, {})
    known = sorted({*options, *others})
    for key, value in values.items():
        if "\0" in str(value):
            raise InputError(
                f"{path}: {key!r} holds a zero character, which no name may: remove it"
            )
        if key not in known:
            close = difflib.get_close_matches(key.replace("_", "-"), known, n=1, cutoff=0.4)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise InputError(f"{path}: unknown option {key!r}; {hint}")
        if key in options and not _fits(value, options[key]):
            raise InputError(
                f"{path}: {key!r} must be {_said(options[key])}, got {value!r} of the type "
                f"{type(value).__name__}"
            )
    _note_other_versions(path, made)
    return {key: value for key, value in values.items() if key in options}


def recipe(settings: Mapping[str, Any], files: Collection[str]) -> str:
    """Write the TOML text with which ``turnover fit --config`` makes a run again.

    Args:
        settings: values by the parameters' names; ``None`` is left out.
        files: parameters that may name a file or folder: the text has its absolute path.
    """
    options = {}
    for name, value in settings.items():
        if name in files and value is not None and Path(value).exists():
            value = Path(value).resolve()
        if value is not None:
            options[name.replace("_", "-")] = str(value) if isinstance(value, Path) else value
    made = {"command": ["turnover", *sys.argv[1:]], **versions()}
    return tomli_w.dumps({**options, _MADE: made})


def options_of(command: Callable[..., Any]) -> dict[str, Any]:
    """Types of the options that a command's file may hold."""
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
