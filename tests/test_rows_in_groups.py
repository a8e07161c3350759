"""Groups share masks, and their rows keep names of their own."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from hypothesis import given
from hypothesis import strategies as st

from test_cli import encoder, fit_arguments, sentences, turnover, write_csv  # noqa: F401
from turnover.data.base import Columns
from turnover.data.text import read
from turnover.errors import InputError
from turnover.runs.run import Run
from turnover.tasks.review import review

OTHER = {"pos": "neg", "neg": "pos"}
SOURCES = 6


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:  # noqa: F811
    """A run of rows with ids and sources, some with wrong labels; its test data have neither."""
    folder = tmp_path_factory.mktemp("both")
    train = [
        (f"r-{i:03}", f"source {i % SOURCES}", text, OTHER[label] if i % 10 == 0 else label)
        for i, text, label in sentences(120)
    ]
    data = write_csv(folder / "train.csv", train, "uid,source,text,label")
    test = write_csv(folder / "test.csv", [one[1:] for one in sentences(30, 500)], "text,label")
    more = ("--id-column", "uid", "--group-column", "source", "--test", test, "--no-compare")
    said = turnover(*fit_arguments(data, encoder, folder / "run", *more)).stdout
    assert f"next: turnover groups {folder / 'run'}, turnover influence" in said
    return folder


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=12).filter(
        lambda rows: len({label for _, label in rows}) == 2
    )
)
def test_ids_are_those_of_groups_and_keys_those_of_rows(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, bool]]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    lines = [(f"k{i}", f"g{group}", f"text {i}", label) for i, (group, label) in enumerate(rows)]
    write_csv(path, lines, "uid,source,text,label")
    both = read(str(path), Columns(id="uid", group="source"))
    grouped, named = read(str(path), Columns(group="source")), read(str(path), Columns(id="uid"))
    assert both.ids.tolist() == grouped.ids.tolist()
    assert both.keys == named.keys == named.groups == [f"k{i}" for i in range(len(rows))]
    assert both.groups == grouped.groups == [f"g{group}" for group, _ in rows]
    assert grouped.keys == [str(i + 1) for i in range(len(rows))]
    groups = len({group for group, _ in rows})
    assert both.count_groups() == (groups if groups < len(rows) else None)
    taken = both.take([len(rows) - 1, 0])
    assert (taken.keys[1], taken.groups[1]) == (both.keys[0], both.groups[0])


def test_what_is_read_is_what_the_run_has(folder: Path) -> None:
    given = read(str(folder / "train.csv"), Columns(id="uid", group="source"))
    kept = Run.load(folder / "run").train
    assert (kept.keys, kept.groups, kept.ids.tolist()) == (
        given.keys,
        given.groups,
        given.ids.tolist(),
    )
    assert json.loads((folder / "run" / "metrics.json").read_text())["n_groups"] == SOURCES


@pytest.mark.slow
def test_groups_are_scored_and_rows_are_reviewed(folder: Path) -> None:
    run = folder / "run"
    said = turnover("influence", run, "--ghosts", 100).stdout
    assert f"{SOURCES} groups of 120 training rows" in said and "instances" not in said
    assert f"next: turnover groups {run}, turnover explain {run}" in said
    groups = json.loads(turnover("groups", run, "--json", "--show", 1).stdout)["groups"]
    names = {f"source {i}" for i in range(SOURCES)}
    assert {one["key"] for one in groups} == names and all(one["rows"] == 20 for one in groups)
    for error in json.loads(turnover("explain", run, "--json").stdout):
        assert {one["key"] for side in ("helpful", "harmful") for one in error[side]} <= names
        by_gram = {one["key"] for side in error["gram"].values() for one in side}
        assert all(key.startswith("r-") for key in by_gram)
    turnover("report", run)
    assert f"in {SOURCES} groups, which share a mask each" in (run / "report.html").read_text()

    turnover("review", run, "--budget", 12)
    listed = table(run / "results" / "review.csv")
    assert len({one["key"] for one in listed}) == 12
    assert all(one["self_influence_z"] == "" and one["influencers"] for one in listed)
    found = np.mean([int(one["key"][2:]) % 10 == 0 for one in listed])
    assert found > 0.5, "wrong labels come first"


@pytest.mark.slow
def test_a_list_with_decisions_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(folder / "run", tmp_path / "run"))
    turnover("review", run, "--budget", 5)
    turnover("review", run, "--budget", 4)
    listed = run / "results" / "review.csv"
    rows = table(listed)
    with listed.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows([rows[0], {**rows[1], "decision": "remove"}, *rows[2:]])
    before = listed.read_bytes()
    refused = turnover("review", run, expect=2).stderr
    assert "has decisions on 1 rows, and a new list would overwrite them" in " ".join(
        refused.split()
    )
    for damaged in (
        before.decode().replace("remove", "remove,caf\u00e9").encode("cp1252"),
        before.decode().encode("utf-16"),
        before + b'"open',
    ):
        listed.write_bytes(damaged)
        refused = " ".join(turnover("review", run, expect=2).stderr.split())
        assert "may hold decisions, and cannot be read" in refused and "--out" in refused
        assert listed.read_bytes() == damaged
    listed.write_bytes(before)
    applied = json.loads(
        turnover("review", run, "--apply", "remove", "--least", 0.5, "--json").stdout
    )
    assert listed.read_bytes() == before
    assert Path(applied["decisions_file"]).name == "applied.csv"
    kept = turnover("review", run, "--decisions", listed, "--out", tmp_path / "out.csv").stdout
    assert "119 kept, 1 removed" in kept


def test_predictions_name_rows_and_groups(folder: Path) -> None:
    run = folder / "run"
    said = turnover("predict", run, "--train").stdout
    assert "on 120 training rows, which it learned" in said
    rows = table(run / "results" / "training_predictions.csv")
    assert [(one["key"], one["group"]) for one in rows[:2]] == [
        ("r-000", "source 0"),
        ("r-001", "source 1"),
    ]
    for one in rows:
        p = float(one["probability_of_label"])
        assert float(one["loss"]) == pytest.approx(-np.log(p), abs=1e-3 + 1e-6 / p)
        assert p == pytest.approx(float(one[f"p({one['label']})"]))
    assert "group" not in table_after("predict", run)[0], "test rows have no groups"
    whole, without = rows, table_after("predict", run, "--train", "--without", "source 2")
    assert [one["key"] for one in without] == [one["key"] for one in whole]
    assert [one["loss"] for one in without] != [one["loss"] for one in whole]
    refused = turnover("predict", run, "--without", "r-002", expect=2).stderr
    assert "shares its mask with its group 'source 2'" in " ".join(refused.split())
    refused = turnover("predict", run, "--without", "source 9", expect=2).stderr
    assert "no training rows are of the group 'source 9'; closest: source" in " ".join(
        refused.split()
    )
    for wrong, said in ((("--train",), "--train"), (("--without", "source 1"), "--without")):
        refused = turnover("predict", run, "--hidden", *wrong, expect=2).stderr
        assert f"and {said} by another network" in " ".join(refused.split())


def table_after(*arguments: object) -> list[dict[str, str]]:
    return table(Path(json.loads(turnover(*arguments, "--json").stdout)["file"]))


def test_runs_of_before_whose_keys_are_groups_are_read(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    lines = [json.loads(line) for line in (folder / "run" / "train.jsonl").open()]
    with path.open("w") as file:
        for line in lines:
            line["key"] = line.pop("group")
            file.write(json.dumps(line) + "\n")
    run = Run.load(folder / "run")
    data = run.pipeline.read(tmp_path, "train", run.train.classes)
    assert data.keys == data.groups == run.train.groups
    with pytest.raises(InputError, match="share the key 'source 0'"):
        review(replace(run, train=data))
