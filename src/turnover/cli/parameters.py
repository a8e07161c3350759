"""Command-line parameters from signatures, docstrings and dataclasses.

:func:`command` turns a function into one that Typer can run: a docstring's ``Args`` become the help, and
:class:`Fields` turn a dataclass into options. :func:`build` makes the dataclass from their values.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from copy import copy
from dataclasses import MISSING, dataclass, field, fields
from inspect import Parameter, Signature
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.models import ParameterInfo

from turnover.cli.output import Output
from turnover.runs.remote import mirrored

RUN = "Run and output"
_JSON_HELP = "Print one JSON document on stdout; tables, notes and progress go to stderr."
_OTHER_NAMES = {"size": "image_size", "sites": "site", "classes": "class_name"}
"""Options that are not called like their field."""
_LEAST = {
    **dict.fromkeys(("epochs", "batch_size", "head_units", "lora_rank", "max_tokens"), 1),
    **dict.fromkeys(("width", "hidden"), 1) | {"size": 32, "ghosts": 10},
    **dict.fromkeys(("learning_rate", "head_learning_rate", "seconds"), 0),
}
"""Smallest values of fields that are numbers."""
_ENTRY = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Fields:
    """The fields of a dataclass as options.

    Attributes:
        of: the dataclass; its docstring gives the help.
        panel: heading of the options in the help.
        only: names of the fields; empty: all.
        types: types by field, in place of the dataclass's: choices, or another help. One that allows
            ``None`` makes that the default, with which :func:`build` keeps the field's own.
    """

    of: Any
    panel: str | None = None
    only: tuple[str, ...] = ()
    types: Mapping[str, Any] = field(default_factory=dict)

    def parameters(self) -> Iterator[Parameter]:
        """A parameter for each field."""
        hints = get_type_hints(self.of, include_extras=True) | dict(self.types)
        texts = _descriptions(self.of)
        for one in fields(self.of):
            if self.only and one.name not in self.only:
                continue
            hint = hints[one.name]
            bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
            default = Parameter.empty if one.default is MISSING else one.default
            if NoneType in get_args(bare):
                default = None
            name, text = option_of(one.name), texts.get(one.name)
            yield _parameter(name, hint, default, text, self.panel, _LEAST.get(one.name))


def option_of(field_name: str) -> str:
    """Name of the option for a dataclass's field."""
    return _OTHER_NAMES.get(field_name, field_name)


def build(of: type[_Made], options: Mapping[str, Any], **others: Any) -> _Made:
    """Make a dataclass from options; what is not given, or ``None``, keeps its default.

    Args:
        of: the dataclass.
        options: values by the options' names; those of other dataclasses are left out.
        others: values by the fields' names.
    """
    values = {}
    for one in fields(of):  # type: ignore[arg-type]
        value = options.get(option_of(one.name))
        if value is not None:
            value = tuple(value) if isinstance(value, list) else value
            values[one.name] = str(value) if isinstance(value, Path) else value
    return of(**values | others)


def command(
    *groups: Fields, config: Any = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a function as a command with the options of its own parameters and of dataclasses.

    The function gets an :class:`~turnover.cli.output.Output` as ``output`` (of ``--json``). Where ``run``
    or ``out`` is a URL, it works on a copy of that run, and what it wrote is copied back.

    Args:
        groups: options that the function takes as keywords.
        config: what ``--config`` is (:func:`~turnover.cli.config.config_option`); ``None``: there is none.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints, texts = get_type_hints(function, include_extras=True), _descriptions(function)
        own = {
            name: _parameter(name, hints[name], one.default, texts.get(name))
            for name, one in inspect.signature(function).parameters.items()
            if one.kind is not Parameter.VAR_KEYWORD and name != "output"
        }
        found = [one for one in own.values() if one.default is Parameter.empty]
        found += [one for group in groups for one in group.parameters()]
        found += own.values()
        if config is not None:
            found.append(_parameter("config", Annotated[Path | None, config], None, None, RUN))
        as_json = Annotated[bool, typer.Option("--json", help=_JSON_HELP)]
        found.append(_parameter("as_json", as_json, False, None, RUN))
        parameters: dict[str, Parameter] = {}
        for one in found:  # the function's own goes before a field, and the first field of a name
            parameters.setdefault(one.name, own.get(one.name, one))

        def run(*, as_json: bool, **given: Any) -> None:
            given.pop("config", None)  # its callback has read it
            urls = {
                name: given[name] for name in ("run", "out") if isinstance(given.get(name), str)
            }
            with ExitStack() as copies:
                for name, url in urls.items():
                    given[name] = copies.enter_context(mirrored(url, new=name == "out"))
                output, device = Output(as_json=as_json), given.get("device", "cpu")
                if device != "cpu":
                    output.say(f"device: {device}")
                function(output=output, **given)
            for url in urls.values():
                sys.stderr.write(f"what was written in the run is in {url}\n")

        run.__name__, run.__module__ = function.__name__, function.__module__
        run.__doc__ = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:\n")[0]
        run.__annotations__ = {name: one.annotation for name, one in parameters.items()}
        run.__signature__ = Signature([*parameters.values()])  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(
    name: str,
    hint: Any,
    default: Any,
    text: str | None,
    panel: str | None = None,
    least: float | None = None,
) -> Parameter:
    bare, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    info = copy(next((one for one in marks if isinstance(one, ParameterInfo)), typer.Option()))
    info.help = info.help or text
    info.rich_help_panel = info.rich_help_panel or panel
    info.min = info.min if least is None else least
    hint = Annotated[bare, info]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _descriptions(of: Any) -> dict[str, str]:
    """Sentences by name, of the ``Args`` or ``Attributes`` in a docstring."""
    entries = _ENTRY.findall(inspect.cleandoc(of.__doc__ or ""))
    plain = {name: " ".join(text.replace("``", "").split()) for name, text in entries}
    return {name: text[0].upper() + text[1:] for name, text in plain.items()}
