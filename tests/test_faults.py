"""Damage to a run on disk: it is named, or does no harm. The table is in docs/faults.md."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="pillow is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("typer", reason="typer is not installed")

from documents import ROOT
from test_cli import turnover
from test_images import folders, run  # noqa: F401 - fixtures: a run of images, with its results
from turnover import InputError
from turnover.io.parsing import read_json, write_json
from turnover.runs.run import DIGESTS, Run

FITTED = [
    *(
        "config.json",
        "masks.json",
        "classifier.json",
        "model.safetensors",
        "memorization.safetensors",
    ),
    *("train.jsonl", "test.jsonl", "train.npy", "test.npy", DIGESTS),
]
SCORED = ["metrics.json", "results/targets.json"]


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:  # noqa: F811
    return Path(shutil.copytree(run, tmp_path / "run"))


def flipped(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def refusal(act: Callable[[], object]) -> str | None:
    try:
        act()
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", FITTED)
def test_a_flipped_bit_in_a_file_of_a_fit_is_named(name: str, copy: Path) -> None:
    path, rng = copy / name, random.Random(0)
    whole = path.read_bytes()
    before = read_json(path) if name == DIGESTS else None
    for _ in range(20):
        path.write_bytes(flipped(whole, rng))
        said = refusal(lambda: Run.load(copy))
        if said:
            assert str(path) in said
            assert re.search("restore it|missing or damaged|lists no digests", said)
        else:  # a bit of the word "checksum"
            assert name == DIGESTS and before.items() <= read_json(path).items()
    path.write_bytes(whole)
    Run.load(copy)


@pytest.mark.parametrize("name", [*FITTED, *SCORED])
@pytest.mark.parametrize("keep", [0.5, 0.0], ids=["truncated", "emptied"])
def test_a_cut_file_of_a_run_is_named(name: str, keep: float, copy: Path) -> None:
    path = copy / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert str(path) in turnover("report", copy, expect=2).stderr


@pytest.mark.parametrize("name", SCORED)
def test_a_flipped_bit_in_what_scoring_wrote_is_named_or_changes_no_value(
    name: str, copy: Path
) -> None:
    path, rng = copy / name, random.Random(0)
    whole, values = path.read_bytes(), read_json(path)
    named = 0
    for _ in range(400):
        path.write_bytes(flipped(whole, rng))
        said = refusal(lambda: read_json(path))
        if said:
            assert str(path) in said
            named += 1
        else:
            assert values.items() <= read_json(path).items()
    assert named > 300
    number = re.search(rb"\d(?=[,\n])", whole)
    path.write_bytes(whole[: number.start()] + b"%d" % (9 - int(number[0])) + whole[number.end() :])
    assert "does not match its checksum" in turnover("report", copy, expect=2).stderr


def test_a_deleted_file_of_a_fit_is_named(copy: Path) -> None:
    (copy / "test.npy").unlink()
    with pytest.raises(InputError, match=r"test\.npy: missing"):
        Run.load(copy)


def test_a_run_without_digests_is_loaded_with_a_note(copy: Path) -> None:
    (copy / DIGESTS).unlink()
    with pytest.warns(UserWarning, match=r"has no digests\.json, .* may go unnoticed"):
        old = Run.load(copy)
    assert old.network.digest() == old.read_result("errors").network
    for name in SCORED:
        values = json.loads((copy / name).read_text())
        assert values.pop("checksum")
        (copy / name).write_text(json.dumps(values))
        assert read_json(copy / name) == values


def test_an_empty_list_of_digests_does_not_pass(copy: Path) -> None:
    (copy / DIGESTS).write_text("{}")
    with pytest.raises(InputError, match=r"digests\.json: damaged"):
        Run.load(copy)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/hostname", "encoder/../../elsewhere"])
def test_digests_of_files_outside_the_run_are_refused(name: str, copy: Path) -> None:
    digests = read_json(copy / DIGESTS)["blake2b"]
    write_json(copy / DIGESTS, {"blake2b": {**digests, name: "0" * 32}}, sealed=True)
    with pytest.raises(InputError, match=r"digests\.json: .* leads out of the run"):
        Run.load(copy)


def test_what_is_not_part_of_the_fit_can_change(copy: Path) -> None:
    (copy / "fit.toml").write_text("# mine\n")
    shutil.rmtree(copy / "without_turnover")
    (copy / "notes.txt").write_text("looked at")
    Run.load(copy)


def test_every_line_of_the_table_names_tests_that_exist() -> None:
    lines = (ROOT / "docs" / "faults.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| fault")]
    source = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(rows) > 10
    for row in rows:
        names = re.findall(r"`(test_\w+)`", row.split("|")[3])
        assert names, row
        assert not [name for name in names if f"def {name}(" not in source]
