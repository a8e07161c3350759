"""The guides' commands run as they stand, page by page, on small data with a small BERT."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from documents import PAGES, ROOT, blocks, commands, name_of

pytest.importorskip("transformers")
pytest.importorskip("typer")

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from test_cli import encoder, sentences, turnover, write_csv  # noqa: F401 - a fixture
from turnover.runs.run import Run

QUICKSTART = ROOT / "docs" / "quickstart.md"
SMALL = ["--head-units", 64, "--lora-rank", 4, "--batch-size", 8, "--head-learning-rate", 0.01]


def run_page(page: Path, encoder: Path) -> None:  # noqa: F811
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).write_text(block.code, encoding="utf-8")
    for name, *arguments in commands(page, to_run=True):
        if name == "view" or name.startswith(
            "-"
        ):  # serves until it is stopped; writes to the shell
            continue
        if name in ("fit", "plan"):
            if "--model" in arguments:
                at = arguments.index("--model")
                del arguments[at : at + 2]
            arguments += ["--model", encoder, *SMALL, "--epochs", 2]
            arguments += ["--overwrite"] if name == "fit" else []
        if name == "cleanse":
            arguments += ["--seeds", 1, "--fraction", 0.1]
        turnover(name, *arguments)


@pytest.fixture(scope="module")
def after_quickstart(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:  # noqa: F811
    """A folder with the files that the guides name, and what the quickstart makes of them."""
    desk = tmp_path_factory.mktemp("desk")
    names = {0: "neg", 1: "pos"}
    model = AutoModelForSequenceClassification.from_pretrained(encoder, id2label=names)
    model.save_pretrained(desk / "my-bert")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(desk / "my-bert")
    rows = [(*row, f"vendor {i % 8}") for i, row in enumerate(sentences(120))]
    write_csv(desk / "train.csv", rows, header="id,text,label,source")
    for number, name in enumerate(("test", "validation", "other_domain"), start=1):
        rows = [
            (text, "neg" if i < 4 else label)
            for i, (_, text, label) in enumerate(sentences(24, 500 * number))
        ]
        write_csv(desk / f"{name}.csv", rows, header="text,label")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        run_page(QUICKSTART, encoder)
        keys = Run.load(Path("runs/mine")).train.keys
    people = [(row, "fm"[row % 2]) for row in range(1, 25)]
    write_csv(desk / "people.csv", people, header="key,sex")
    write_csv(desk / "mine.csv", [(key, i) for i, key in enumerate(keys)], header="key,score")
    for copy in ("review.csv", "runs/mine/results/decisions.csv"):
        shutil.copy(desk / "runs/mine/results/review.csv", desk / copy)
    return desk


def test_quickstart_makes_what_it_promises(after_quickstart: Path) -> None:
    made = ["mine/report.html", "mine/results/explanations.json", "sources/results/groups.json"]
    assert all((after_quickstart / "runs" / name).is_file() for name in made)
    assert (after_quickstart / "cleaned.csv").is_file()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.long if page.stem == "cleanse" else ())
        for page in PAGES
        if any(one not in commands(QUICKSTART) for one in commands(page, to_run=True))
    ],
    ids=name_of,
)
def test_commands_of_a_guide_run(
    page: Path,
    after_quickstart: Path,
    encoder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(after_quickstart, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run_page(page, encoder)
