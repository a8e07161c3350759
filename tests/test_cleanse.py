"""Cleansing from outside: planted harm goes first, and what cannot be meant is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from test_cli import (
    GOOD,
    encoder,  # noqa: F401 - a fixture
    fit_arguments,
    sentences,
    turnover,
    write_csv,
)

HARM = GOOD[1]
ROWS, HARMFUL = 160, 22
SHARE = HARMFUL / ROWS


def planted() -> list[tuple[object, ...]]:
    """Of one sentence most copies have the wrong label."""
    rows, left = [], HARMFUL
    for i, text, label in sentences(ROWS):
        wrong = str(text).startswith(HARM) and left > 0
        left -= wrong
        rows.append((i, text, "neg" if wrong else label))
    assert left == 0
    return rows


HARMFUL_KEYS = {
    str(i) for i, text, label in planted() if str(text).startswith(HARM) and label == "neg"
}


@pytest.fixture(scope="module")
def harmed(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("harmed")
    data = write_csv(folder / "train.csv", planted())
    test = write_csv(folder / "test.csv", sentences(60, 500))
    write_csv(folder / "validation.csv", sentences(60, 800))
    out = folder / "run"
    turnover(
        *fit_arguments(data, encoder, out, "--test", test, "--id-column", "id"),
        *("--no-compare", "--head-units", 2048, "--head-learning-rate", 0.001, "--epochs", 4),
    )
    turnover("influence", out, "--ghosts", 100, "--no-gram")
    return out


@pytest.fixture
def run(harmed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(harmed, tmp_path / "run"))


@pytest.fixture
def validation(harmed: Path) -> Path:
    return harmed.parent / "validation.csv"


def keys_of(path: Path, column: str = "key") -> list[str]:
    with path.open(newline="") as file:
        return [row[column] for row in csv.DictReader(file)]


@pytest.mark.parametrize("ranking", ["gram", pytest.param("turn-over", marks=pytest.mark.long)])
def test_harmful_rows_are_taken_out_and_the_test_rows_are_predicted_better(
    ranking: str, run: Path, validation: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cleaned.csv"
    arguments = ("cleanse", run, "--validation", validation, "--out", out, "--seeds", 2)
    shown = turnover(*arguments, "--ranking", ranking, "--fraction", SHARE).stdout
    removed = keys_of(run / "results" / "removed.csv")
    assert len(removed) == HARMFUL
    assert len(HARMFUL_KEYS & set(removed[:10])) >= 6  # 1 by chance
    assert sorted([*removed, *keys_of(out, "id")], key=int) == [str(i) for i in range(ROWS)]
    found = json.loads((run / "results" / "cleanse.json").read_text())
    loss = {one["removal"]: np.mean(one["loss"]) for one in found["test"]}
    accuracy = {one["removal"]: np.mean(one["accuracy"]) for one in found["test"]}
    others = ("none", "random", "loss")
    assert loss[ranking] < 0.9 * min(loss[name] for name in others)
    assert accuracy[ranking] > max(accuracy[name] for name in others)
    assert f"{accuracy[ranking]:.3f}" in shown and f"{HARMFUL} rows removed" in shown
    with (run / "results" / "removed.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert row["reason"] == f"harmful to the validation rows, by {ranking}"
            assert float(row["score"]) < 0 and float(row["z"]) < 0 and 0 <= float(row["q"]) <= 1


def test_what_was_learned_by_heart_can_be_taken_out(run: Path) -> None:
    from turnover.data.base import Columns
    from turnover.data.text import read
    from turnover.runs.run import Run
    from turnover.tasks.cleanse import cleanse

    loaded = Run.load(run)
    held = read(
        str(write_csv(run / "v.csv", sentences(20, 900))), Columns(), classes=["neg", "pos"]
    )
    found = cleanse(loaded, held, ranking="self", fractions=[0.05], seeds=1)
    stored = loaded.read_result("self")
    most = stored.train_ids[stored.scores.argsort()[::-1][:8]]
    assert found.ranking.scores.argsort()[:8].tolist() == most.tolist()
    shutil.rmtree(run / "results" / "self.zarr")
    refused = turnover(
        "cleanse",
        run,
        "--validation",
        run / "v.csv",
        "--out",
        run / "o.csv",
        "--ranking",
        "self",
        expect=2,
    )
    assert "turnover influence" in refused.stderr


def test_a_ranking_of_the_users_own_is_followed(
    run: Path, validation: Path, tmp_path: Path
) -> None:
    lines = [(i, -1.0 if str(i) in HARMFUL_KEYS else i) for i in range(ROWS)]
    scores = write_csv(tmp_path / "scores.csv", lines, "key,score")
    out = tmp_path / "cleaned.jsonl"
    said = turnover(
        *("cleanse", run, "--validation", validation, "--scores", scores, "--out", out),
        *("--fraction", SHARE, "--fraction", 0.01, "--seeds", 1),
    )
    assert "±" not in said.stdout and "one seed" in said.stdout
    assert set(keys_of(run / "results" / "removed.csv")) == HARMFUL_KEYS
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert {one["id"] for one in kept} == {str(i) for i in range(ROWS)} - HARMFUL_KEYS
    found = json.loads((run / "results" / "cleanse.json").read_text())
    assert [one["fraction"] for one in found["validation"]] == [0.0, *([0.01, SHARE] * 3)]
    assert [one["removal"] for one in found["test"]] == ["none", "scores", "random", "loss"]


def test_where_no_removal_helps_nothing_is_taken_out(
    run: Path, validation: Path, tmp_path: Path
) -> None:
    right = {i for i, text, label in planted() if str(text).startswith(HARM) and label == "pos"}
    lines = [(i, -1.0 if i in right else 1.0) for i in range(ROWS)]
    scores = write_csv(tmp_path / "scores.csv", lines, "key,score")
    out = tmp_path / "cleaned.csv"
    turnover(
        *("cleanse", run, "--validation", validation, "--scores", scores, "--out", out),
        *("--fraction", len(right) / ROWS, "--seeds", 1),
    )
    assert keys_of(run / "results" / "removed.csv") == []
    assert out.read_bytes() == (validation.parent / "train.csv").read_bytes()


@pytest.mark.long
def test_the_same_call_gives_the_same_bits_and_leaves_the_run_alone(
    run: Path, validation: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    seen = []
    for name in ("one.csv", "two.csv"):
        arguments = ("--validation", validation, "--out", tmp_path / name, "--seeds", 2)
        turnover("cleanse", run, *arguments, "--fraction", SHARE)
        results = [run / "results" / kept for kept in ("removed.csv", "cleanse.json")]
        seen.append([path.read_bytes() for path in (tmp_path / name, *results)])
    assert seen[0] == seen[1]
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert not list(tmp_path.glob(".*")) + list((run / "results").glob(".*"))


def test_no_global_generator_is_touched(run: Path, validation: Path) -> None:
    from turnover.data.base import Columns
    from turnover.data.text import read
    from turnover.runs.run import Run
    from turnover.tasks.cleanse import cleanse

    loaded = Run.load(run)
    held = read(str(validation), Columns(), classes=loaded.train.classes)
    state, drawn = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    cleanse(loaded, held, fractions=[SHARE], seeds=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == drawn).all()  # noqa: NPY002


def test_features_are_those_of_the_pretrained_encoder(run: Path, encoder: Path) -> None:  # noqa: F811
    from transformers import AutoModel, AutoTokenizer

    from turnover.runs.run import Run
    from turnover.tasks.linear_probe import frozen

    loaded = Run.load(run)
    model, tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
    found = frozen(loaded, loaded.test)
    with torch.no_grad():
        for row in (0, 7):
            tokens = tokenizer(loaded.test.texts[row], return_tensors="pt")
            expected = model(**tokens).last_hidden_state.mean(dim=1)[0]
            torch.testing.assert_close(found.features[row], expected, atol=1e-5, rtol=1e-4)
    inputs = loaded.encode(loaded.test).batch([0]).inputs
    with torch.no_grad():
        assert not torch.allclose(loaded.model.features(**inputs)[0], found.features[0], atol=1e-3)
    assert loaded.network.digest() == Run.load(run).network.digest()
    assert all(p.requires_grad for name, p in loaded.model.named_parameters() if "lora" in name)


def test_calibration_undoes_a_scale_and_a_shift_and_bears_perfect_logits() -> None:
    from turnover.tasks.linear_probe import Calibrated

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]
    shift = torch.tensor([1.0, -2.0, 1.0])
    module = Calibrated(torch.nn.Identity(), 4 * logits + shift, labels)
    torch.testing.assert_close(
        module(4 * logits + shift).softmax(dim=1), logits.softmax(dim=1), atol=0.03, rtol=0
    )
    sure = 100 * torch.nn.functional.one_hot(labels).float()
    assert Calibrated(torch.nn.Identity(), sure, labels)(sure).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--fraction", 0), "strictly between 0 and 1"),
        (("--fraction", 1.5), "strictly between 0 and 1"),
        (("--fraction", "nan"), "strictly between 0 and 1"),
        (("--ranking", "best"), "'gram', 'turn-over', 'self'"),
        (("--seeds", 0), "'--seeds'"),
        (("--ranking", "gram", "--scores", "scores.csv"), "give one of them"),
        (("--scores", "none.csv"), "none.csv: cannot be read"),
        (("--fraction", 0.6, "--scores", "one_class.csv"), "leaves no row of class 'pos'"),
        (("--scores", "scores.csv"), "line 3: no training row has the key 'none'"),
        (("--scores", "twice.csv"), "line 3: a second score of '1'"),
        (("--scores", "few.csv"), "158 training rows have no score, such as '0'"),
        (("--scores", "infinite.csv"), "line 2: 'inf' is not a finite number"),
        (("--scores", "words.csv"), "line 2: 'good' is not a finite number"),
        (("--validation", "one_label.csv"), "all of one class"),
        (("--validation", "other_label.csv"), "unknown label 'mixed'"),
        (("--validation", "no.csv"), "no such file"),
        (("--validation", "test.csv"), "60 validation rows are also among the run's test rows"),
        (("--validation", "train.csv"), "also among the run's training rows"),
        (("--out", "cleaned.xlsx"), "cannot write that format"),
        (("--out", "no/cleaned.csv"), "does not exist"),
        (("--encoding", "cp0"), "unknown encoding 'cp0'"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: tuple[object, ...],
    said: str,
    harmed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.csv", "test.csv", "validation.csv"):
        shutil.copy(harmed.parent / name, name)
    for name, lines in {
        "scores.csv": [(1, 0), ("none", 1)],
        "twice.csv": [(1, 0), (1, 1)],
        "few.csv": [(1, 0), (2, 1)],
        "infinite.csv": [(1, "inf")],
        "words.csv": [(1, "good")],
        "one_class.csv": [(i, -1.0 if label == "pos" else 1.0) for i, _, label in planted()],
    }.items():
        write_csv(Path(name), lines, "key,score")
    write_csv(Path("one_label.csv"), [(i, text, "pos") for i, text, _ in sentences(10, 900)])
    write_csv(Path("other_label.csv"), [(1, "a film", "mixed"), (2, "a dull film", "neg")])
    before = sorted(path.name for path in harmed.rglob("*"))
    given = ("--validation", "validation.csv", "--out", "cleaned.csv", *arguments)
    refused = turnover("cleanse", harmed, *given, expect=2)
    assert said in refused.stderr and "Traceback" not in refused.stderr
    assert not Path("cleaned.csv").exists()
    assert sorted(path.name for path in harmed.rglob("*")) == before


def test_rows_of_groups_are_cleansed_and_not_by_memorization(encoder: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = [(f"source {i % 5}", text, label) for i, text, label in sentences(40)]
    path = write_csv(tmp_path / "grouped.csv", rows)
    test = write_csv(tmp_path / "test.csv", sentences(20, 500))
    out = tmp_path / "run"
    more = ("--group-column", "id", "--test", test, "--no-compare", "--epochs", 1)
    turnover(*fit_arguments(path, encoder, out, *more))
    held = write_csv(tmp_path / "held.csv", sentences(20, 800))
    given = ("--validation", held, "--out", tmp_path / "o.csv")
    refused = turnover("cleanse", out, *given, "--ranking", "self", expect=2).stderr
    assert "has groups, which have no self-influence" in refused
    turnover("cleanse", out, *given, "--fraction", 0.1, "--seeds", 1)
    keys = keys_of(out / "results" / "removed.csv")
    assert len(set(keys)) == len(keys) and set(keys) <= {str(i + 1) for i in range(40)}


def test_logits_that_hardly_differ_are_calibrated_to_numbers() -> None:
    from turnover.tasks.linear_probe import Calibrated

    draw = torch.Generator().manual_seed(268)  # of 300 the one whose line search went astray
    logits = torch.randn(40, 2, generator=draw) * 0.01
    labels = torch.randint(0, 2, (40,), generator=draw)
    fitted = Calibrated(torch.nn.Identity(), logits, labels).of(logits)
    assert torch.nn.functional.cross_entropy(fitted, labels) < torch.nn.functional.cross_entropy(
        logits, labels
    )
