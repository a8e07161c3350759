"""The structure of the package: layers, sizes of files, and a light import."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "turnover"
MOST_LINES = 400
OPTIONAL = (
    "datasets",
    "fsspec",
    "jinja2",
    "msgspec",
    "pandas",
    "peft",
    "PIL",
    "plotly",
    "ray",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "starlette",
    "transformers",
    "typer",
    "xarray",
    "zarr",
)


def layers() -> set[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = [one for one in settings["contracts"] if one["type"] == "layers"]
    names = {name.strip(" ()") for line in contract["layers"] for name in line.split("|")}
    return names | set(contract["exhaustive_ignores"])


def test_rooms_import_only_from_below_and_have_no_cycles():
    command = pytest.importorskip("importlinter") and Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_file_is_too_long_to_read():
    lengths = {
        str(path.relative_to(PACKAGE)): len(path.read_text().splitlines())
        for path in PACKAGE.rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_every_module_at_the_top_has_a_layer():
    modules = {path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert modules | packages <= layers()


def test_import_loads_no_optional_package():
    program = (
        "import sys, torch; before = set(sys.modules); import turnover; "
        f"print(*sorted(({{name.partition('.')[0] for name in sys.modules}} - before) & {set(OPTIONAL)}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
