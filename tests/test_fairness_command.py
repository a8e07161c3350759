"""``turnover fairness`` from outside: planted unfair labels are listed, decided on and taken out."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

import trained
from test_cli import (
    GOOD,
    encoder,  # noqa: F401 - a fixture
    fit_arguments,
    sentences,
    turnover,
    write_csv,
)

ROWS, TESTED, UNFAIR = 160, 60, 22


def of_group(text: object) -> str:
    """Films of one kind of maker; the others' are labeled as they deserve."""
    return "small" if str(text).startswith((GOOD[1], "a dull")) else "large"


def planted() -> list[tuple[object, ...]]:
    """Most good texts on small makers' films are labeled bad."""
    rows, left = [], UNFAIR
    for i, text, label in sentences(ROWS):
        wrong = label == "pos" and of_group(text) == "small" and left > 0
        left -= wrong
        rows.append((i, text, "neg" if wrong else label, of_group(text)))
    assert left == 0
    return rows


UNFAIR_KEYS = {
    str(i)
    for (i, _, label, group), (_, _, true) in zip(planted(), sentences(ROWS), strict=True)
    if label != true and group == "small"
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("unfair")
    data = write_csv(folder / "train.csv", planted(), "id,text,label,maker")
    test = write_csv(folder / "test.csv", sentences(TESTED, 500))
    people = [
        (i, of_group(text), "no use") for i, text, _ in [*sentences(TESTED, 500), (7, "", "")]
    ]
    write_csv(folder / "people.csv", people, "key,maker,other")
    model = ("--test", test, "--no-compare", "--head-units", 1024, "--epochs", 4)
    model += ("--head-learning-rate", 0.001)
    turnover(*fit_arguments(data, encoder, folder / "run", *model, "--id-column", "id"))
    turnover(*fit_arguments(data, encoder, folder / "makers", *model, "--group-column", "maker"))
    return folder


@pytest.fixture
def run(desk: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(desk / "run", tmp_path / "run"))


def given(desk: Path, run: Path, *more: object) -> tuple[object, ...]:
    attributes = ("--attributes", desk / "people.csv", "--column", "maker", "--positive", "pos")
    return ("fairness", run, *attributes, *more)


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("method", ["gram", "linear"])
def test_unfair_labels_are_listed_first(method: str, desk: Path, run: Path) -> None:
    options = ("--gap", "equal_opportunity", "--method", method, "--budget", UNFAIR)
    found: dict[str, Any] = json.loads(turnover(*given(desk, run, *options, "--json")).stdout)
    gap = found["gaps"]["equal_opportunity"]
    assert gap["value"] > 0.3
    assert gap["value"] == pytest.approx(gap["rates"]["large"] - gap["rates"]["small"])
    assert gap["low"] < gap["value"] < gap["high"] and sum(gap["rows"].values()) == TESTED / 2
    listed = lines_of(run / "results" / "fairness.csv")
    assert [one["key"] for one in listed] == [one["key"] for one in found["widening"]]
    # Either holds one group down or the other up; 22 and 53 of 160 rows are of these kinds.
    down = [one for one in listed if one["key"] in UNFAIR_KEYS]
    up = [one for one in listed if one["label"] == "pos" and of_group(one["text"]) == "large"]
    assert down and up and len(down) + len(up) >= 0.75 * len(listed) > 9  # 0.47 by chance
    scores = [float(one["score"]) for one in listed]
    assert scores == sorted(scores) and scores[-1] < 0
    assert all(float(one["z"]) < 0 and 0 <= float(one["q"]) <= 1 for one in listed)
    assert {one["decision"] for one in listed} == {""} and all(one["text"] for one in listed)


def test_decisions_are_applied_by_review(desk: Path, run: Path, tmp_path: Path) -> None:
    out, fairer = tmp_path / "list.csv", tmp_path / "fairer.csv"
    said = turnover(*given(desk, run, "--budget", 10, "--decision", "relabel", "--out", out))
    assert f"turnover review {run} --decisions {out}" in said.stdout
    assert "equal opportunity" in said.stdout and "q <= 0.05" in said.stdout
    listed = lines_of(out)
    assert all({one["label"], one["decision"]} == {"neg", "pos"} for one in listed)
    turnover("review", run, "--decisions", out, "--out", fairer)
    labels = {one["id"]: one["label"] for one in lines_of(fairer)}
    assert [labels[one["key"]] for one in listed] == [one["decision"] for one in listed]
    turnover(*given(desk, run, "--budget", 10, "--decision", "remove", "--out", out))
    turnover("review", run, "--decisions", out, "--out", fairer)
    left = {one["id"] for one in lines_of(fairer)}
    assert len(left) == ROWS - 10 and not left & {one["key"] for one in lines_of(out)}


@pytest.mark.parametrize("method", ["gram", "linear"])
def test_groups_of_a_run_are_listed_without_decisions(
    method: str, desk: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(desk / "makers", tmp_path / "makers"))
    people = [(row, of_group(text)) for row, (_, text, _) in enumerate(sentences(TESTED, 500))]
    keys = [one["key"] for one in lines_of(_predictions(run))]
    assert len(set(keys)) == TESTED
    attributes = write_csv(
        tmp_path / "a.csv",
        [(key, one) for key, (_, one) in zip(keys, people, strict=True)],
        "key,attribute",
    )
    arguments = ("fairness", run, "--attributes", attributes, "--positive", "pos")
    said = turnover(*arguments, "--method", method).stdout
    listed = lines_of(run / "results" / "fairness.csv")
    assert listed and set(listed[0]) == {"key", "rows", "score", "z", "q"}
    assert listed[0]["key"] == "small" or method == "linear"  # two groups are few for masks
    assert "group that widens the gap" in said and "--decisions" not in said
    refused = turnover(*arguments, "--decision", "remove", expect=2).stderr
    assert "has groups, and decisions are on rows" in refused


def _predictions(run: Path) -> Path:
    turnover("predict", run)
    return run / "results" / "predictions.csv"


def test_a_model_that_was_trained_without_masks_is_scored_by_gram(tmp_path: Path) -> None:
    train = trained.write(tmp_path / "train.csv", trained.rows(60, 0))
    test = trained.write(tmp_path / "test.csv", trained.rows(40, 1))
    model, run = trained.texts(tmp_path / "model", trained.rows(60, 0)), tmp_path / "run"
    given = ("--train", train, "--test", test, "--id-column", "id", "--out", run)
    turnover("attribute", "--model", model, *given)
    people = [(f"r{row}", "ab"[row % 2]) for row in range(40)]
    attributes = write_csv(tmp_path / "a.csv", people, "key,attribute")
    asked = ("fairness", run, "--attributes", attributes, "--positive", "pos")
    turnover(*asked, "--budget", 5)
    assert len(lines_of(run / "results" / "fairness.csv")) == 5
    refused = turnover(*asked, "--method", "linear", expect=2).stderr
    assert "needs turn-over training" in refused


def test_what_cannot_be_meant_is_refused_in_one_line(desk: Path, run: Path, tmp_path: Path) -> None:
    def refused(rows: list[tuple[object, ...]], *more: object) -> str:
        path = write_csv(tmp_path / "a.csv", rows, "key,attribute")
        options = ("--attributes", path, "--positive", "pos", *more)
        said = turnover("fairness", run, *options, expect=2).stderr
        assert len([line for line in said.splitlines() if line.startswith("turnover: ")]) == 1
        return said

    good = [(i, of_group(text)) for i, text, _ in sentences(TESTED, 500)]
    assert "no attribute of 1 of 60 test rows, such as '500'" in refused(good[1:])
    assert "no attribute of 1 of 60 test rows" in refused([(500, ""), *good[1:]])
    assert "a second attribute of '500'" in refused([*good, (500, "huge")])
    assert "3 values (large, other, small)" in refused([(500, "other"), *good[1:]])
    assert "1 values (all)" in refused([(key, "all") for key, _ in good])
    assert "unknown class 'good'; the classes are neg, pos" in refused(good, "--positive", "good")
    assert "lacks a column: key and race" in refused(good, "--column", "race")
    assert not (run / "results" / "fairness.csv").exists()
