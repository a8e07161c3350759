"""The command line: parses, calls, prints."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn, TextIO

from turnover import __version__
from turnover.errors import BindingError, InputError, needing

try:
    with needing("the command line", "turnover[text]", "turnover[images]"):
        import rich  # noqa: F401
        import tomli_w  # noqa: F401
        import typer
except InputError as error:
    sys.stderr.write(f"turnover: {error}\n")
    sys.exit(2)  # bad input, as everywhere

from turnover.cli.attribute import attribute
from turnover.cli.doctor import doctor
from turnover.cli.fairness import fairness
from turnover.cli.labels import cleanse, predict, review
from turnover.cli.output import visible
from turnover.cli.report import demo, report, view
from turnover.cli.scores import explain, groups, influence, memorize
from turnover.cli.training import fit, plan

_SHOW = warnings.showwarning
DONE, BAD_INPUT, INTERRUPTED = 0, 2, 130
"""Exit codes; an unexpected error ends with a traceback and Python's own 1."""

app = typer.Typer(
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    epilog="Every command has an example: turnover COMMAND --help. Exit codes: 0 done, 1 unexpected error, "
    "2 bad input, 130 interrupted.",
)

EXAMPLES: dict[Callable[..., None], str] = {
    attribute: "turnover attribute --model my-bert --train train.csv --test test.csv --out runs/mine",
    fit: "turnover fit train.csv --model bert-base-uncased --test test.csv --out runs/mine",
    plan: "turnover plan train.csv --model bert-base-uncased --pilot",
    influence: "turnover influence runs/mine --method auto --seconds 600",
    explain: "turnover explain runs/mine --show 10 --among predicted",
    memorize: "turnover memorize runs/mine --show 20",
    groups: "turnover groups runs/sources --show 5",
    predict: "turnover predict runs/mine --hidden --out out_of_sample.csv",
    review: "turnover review runs/mine --budget 50 --out doubtful.csv",
    cleanse: "turnover cleanse runs/mine --validation other.csv --out cleaned.csv",
    fairness: "turnover fairness runs/mine --attributes people.csv --positive approved",
    report: "turnover report runs/mine --no-text --out mine.html",
    view: "turnover view runs/mine --port 8765 --no-open",
    demo: "turnover demo --out runs/demo",
    doctor: "turnover doctor",
}
for command, example in EXAMPLES.items():
    app.command(epilog=f"Example: {example}")(command)


@app.callback()
def turnover(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """Which training instances made this network predict that, and how sure is it?"""
    if version:
        sys.stdout.write(f"turnover {__version__}\n")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        sys.stdout.write(f"{ctx.get_help()}\n")


def main() -> NoReturn:
    """Run the command line; bad input is one line on stderr and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show
        try:
            # Not standalone: bad input arrives here as an exception, not as a page of usage.
            code = app(prog_name="turnover", standalone_mode=False) or DONE
        except (InputError, BindingError) as error:
            _stop(str(error), BAD_INPUT)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except Exception as error:
            if not isinstance(error, _USAGE_ERROR):
                raise
            _stop(_usage(error), BAD_INPUT)
    if code == INTERRUPTED:
        _stop("interrupted; the same command resumes where it can", INTERRUPTED)
    sys.exit(code)


# Typer has its own copy of click's exceptions, or click's, by version.
_USAGE_ERROR = typer.BadParameter.__mro__[1]


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    message: str = error.format_message()  # type: ignore[attr-defined]
    return message.replace("Value error, ", "").rstrip(".") + hint


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print our own warnings in one line, as errors; those of libraries with their origin."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        _write(str(message).removeprefix("turnover: "))
    else:
        _SHOW(message, category, filename, lineno, file, line)


def _stop(message: str, code: int) -> NoReturn:
    _write(message)
    sys.exit(code)


def _write(message: str) -> None:
    whole = " ".join(line.strip() for line in message.splitlines())
    sys.stderr.write(f"turnover: {visible(whole)}\n")
