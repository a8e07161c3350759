"""Options of commands from signatures, docstrings and dataclasses."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import pytest

pytest.importorskip("typer")

import typer
from typer.testing import CliRunner

from turnover.cli.output import Output
from turnover.cli.parameters import Fields, build, command


@dataclass(frozen=True)
class Shape:
    """A toy configuration.

    Attributes:
        epochs: passes over the training data, which
            may take long.
        sites: names; ``None`` takes all.
        kind: of two.
        deep: whether it is deep.
        inside: no option.
    """

    epochs: int = 3
    sites: tuple[str, ...] = ("head",)
    kind: str = "round"
    deep: bool = False
    inside: float = 1.0


SHAPE = Fields(
    Shape,
    "Toys",
    ("epochs", "sites", "kind", "deep"),
    {"sites": list[str] | None, "kind": Literal["round", "flat"]},
)


@command(SHAPE)
def make(
    name: Annotated[str, typer.Argument()],
    output: Output,
    loud: bool = False,
    **options: Any,
) -> None:
    """Make a toy.

    Second paragraph.

    Args:
        name: of the toy.
        loud: play
            a sound.
    """
    output.document({"name": name, "loud": loud, **asdict(build(Shape, options))})


APP = typer.Typer()
APP.command()(make)


def made(*arguments: str) -> dict[str, Any]:
    finished = CliRunner().invoke(APP, [*arguments, "--json"])
    assert finished.exit_code == 0, finished.output
    found: dict[str, Any] = json.loads(finished.stdout)
    return found


def test_a_dataclass_becomes_options_and_comes_back() -> None:
    default = {"name": "car", "loud": False, **asdict(Shape(sites=["head"]))}  # type: ignore[arg-type]
    assert made("car") == default
    given = ("--epochs", "5", "--site", "a", "--site", "b", "--kind", "flat", "--deep", "--loud")
    assert made("car", *given) == {
        "name": "car",
        "loud": True,
        "epochs": 5,
        "sites": ["a", "b"],
        "kind": "flat",
        "deep": True,
        "inside": 1.0,
    }


def test_help_is_that_of_the_docstrings() -> None:
    options = {one.name: one for one in typer.main.get_command(APP).params}
    assert list(options)[:6] == ["name", "epochs", "site", "kind", "deep", "loud"]
    assert options["epochs"].help == "Passes over the training data, which may take long."
    assert options["site"].help == "Names; None takes all."
    assert options["loud"].help == "Play a sound."
    assert options["epochs"].rich_help_panel == "Toys" and options["loud"].rich_help_panel is None
    assert typer.main.get_command(APP).help == "Make a toy.\n\nSecond paragraph."


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--epochs", "0"), "--epochs"),
        (("--kind", "square"), "--kind"),
        (("--inside", "1"), "--inside"),
    ],
)
def test_values_out_of_range_and_unknown_options_are_refused(
    arguments: tuple[str, ...], said: str
) -> None:
    finished = CliRunner().invoke(APP, ["car", *arguments], env={"TERM": "dumb"})
    assert finished.exit_code == 2 and said in finished.output
