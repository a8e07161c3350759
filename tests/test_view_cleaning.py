"""Cleaning labels in the view: doubts, the effect of decisions, and fifty of them by keys in a browser."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("PIL")

from test_cli import encoder, fit_arguments, sentences, turnover, write_csv  # noqa: F401
from test_images import folders  # noqa: F401 - a fixture
from test_images import run as image_run  # noqa: F401 - a fixture
from test_view_browser import until, visit  # noqa: F401 - a fixture
from turnover.errors import InputError
from turnover.runs.run import Run
from turnover.tasks.label_errors import doubts
from turnover.tasks.review import read_decisions
from turnover.tasks.stored_doubts import open_doubts, read_doubts
from turnover.view.effect import Effect
from viewing import Server, serving

ROWS, WRONG, DECIDED = 240, 60, 50
OTHER = {"pos": "neg", "neg": "pos"}


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:  # noqa: F811
    """A run with a wrong label on every fourth training row, and on some test rows."""
    folder = tmp_path_factory.mktemp("noisy")
    every = {"train": (ROWS, 0, ROWS // WRONG), "test": (40, 500, 5)}
    for name, (count, start, step) in every.items():
        rows = [
            (i, text, OTHER[label] if (i // 2) % step == 0 else label)
            for i, text, label in sentences(count, start)
        ]
        write_csv(folder / f"{name}.csv", rows)
    out = folder / "run"
    more = ("--test", folder / "test.csv", "--id-column", "id", "--no-compare")
    turnover(*fit_arguments(folder / "train.csv", encoder, out, *more))
    turnover("influence", out, "--ghosts", 100, "--no-gram")
    return out


@pytest.fixture
def run(noisy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(noisy, tmp_path / "run"))


def wrong(row: int) -> bool:
    return (row // 2) % (ROWS // WRONG) == 0
