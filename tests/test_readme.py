"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_readme_has_python() -> None:
    assert blocks()


@pytest.mark.parametrize("index", range(len(blocks())))
def test_readme_python_runs(index: int, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        exec(compile(blocks()[index], f"README block {index}", "exec"), {})
    assert "(5, 500)" in capsys.readouterr().out


def test_readme_says_what_make_can_do() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\S+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
