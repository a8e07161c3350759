"""Decisions on labels as people and spreadsheets write them, and the lists they are written in."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from turnover import InputError, string_ids
from turnover.data.text import TextData
from turnover.tasks.cleanse import read_scores
from turnover.tasks.predict import id_of
from turnover.tasks.review import Flagged, read_decisions, write_decisions, write_review
from turnover.view.decisions import Decisions


def run_of(
    folder: Path, keys: list[str], classes: list[str], texts: list[str] | None = None
) -> Any:
    """What reading decisions takes of a run."""
    labels = [row % len(classes) for row in range(len(keys))]
    data = TextData(
        texts or [f"text {key}" for key in keys], labels, string_ids(keys), keys, classes
    )
    return SimpleNamespace(train=data, folder=folder)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    return run_of(tmp_path, ["7", "38", "0038", "x"], ["neg", "pos"])


def written(run: Any, raw: str) -> dict[int, str]:
    path = run.folder / "d.csv"
    path.write_bytes(raw.encode())
    return read_decisions(run, path)


@pytest.mark.parametrize(
    ("raw", "decisions"),
    [
        ("key,decision\n38,remove\n", {1: "remove"}),
        ("key;decision\r\n38;REMOVE\r\n7;Keep \r\n;\r\n", {1: "remove", 0: "keep"}),
        ("\ufeffkey;label;decision\n38,0;pos;pos\n", {1: "pos"}),
        ("key,decision\n38.0, POS\n7.00,neg\n", {1: "pos", 0: "neg"}),
        ("key\tdecision\n 38 \tremove\nx\t\n", {1: "remove"}),
        ('"decision","key"\n"remove","0038"\n', {2: "remove"}),
        ("Nr,key,decision,note\n1,'0038,remove,\n2,38,keep,\n", {2: "remove", 1: "keep"}),
        ('key,influencers,decision,text\n7,"3 pos, 1 neg",keep,"a\nb"\n', {0: "keep"}),
        (f"key,decision,text\n7,remove,{'long ' * 40_000}\n", {0: "remove"}),
        ("key; decision\n7; keep\n", {0: "keep"}),
        ("key,decision\n\n\n", {}),
    ],
)
def test_decisions_are_read_as_a_spreadsheet_saves_them(
    raw: str, decisions: dict[int, str], run: Any
) -> None:
    assert written(run, raw) == decisions


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("key,decision\n38,remove\n38.0,keep\n", "line 3: a second decision of '38'"),
        ("key;decision\n7.000;remove\n", "line 2: no training row has the key '7.000'"),
        ("key,decision\n007,remove\n", "no training row has the key '007'$"),
        ("key,decision\n,remove\n", "no training row has the key ''"),
        (
            "key,decision\n7,maybe\n",
            "line 2: unknown decision 'maybe'; use keep, remove or a class",
        ),
        ("key,decision,decision\n7,keep,remove\n", "the header has 'decision' twice"),
        ("key,label,decision\n7,a, b,keep\n", r"row 1 \(line 2\) has 4 fields, the header has 3"),
        ('key,decision\n7,"keep\n', r"row 1 \(line 2\): a quote mark"),
        ('key,text,decision\n7,"a\nb",keep\n9,c,keep\n', "line 4: no training row has the key '9'"),
        ("key,label\n7,pos\n", "lacks a column: key and decision are needed; it has key, label"),
        ("key;label\n7;a, b\n", "lacks a column: key and decision are needed; it has key;label"),
        ("", "the header lacks a column: .* the file is empty"),
        ("key,decision\n7\n", "line 2 lacks a column"),
    ],
)
def test_decisions_that_cannot_be_meant_are_named(raw: str, said: str, run: Any) -> None:
    with pytest.raises(InputError, match=said):
        written(run, raw)


def test_the_key_of_a_command_is_the_text_of_the_id(tmp_path: Path) -> None:
    train = run_of(tmp_path, ["0007", "7", "1e5"], ["a", "b"]).train
    assert [id_of(train, key) for key in ("0007", "7", "1e5")] == train.ids.tolist()
    with pytest.raises(InputError, match="no training row has the key '07'; closest: 7, 0007"):
        id_of(train, "07")


def test_a_key_that_lost_its_zeros_is_named_with_the_row_meant(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no training row has the key '7'; did you mean '0007'"):
        written(run_of(tmp_path, ["0007", "0038"], ["a", "b"]), "key,decision\n7,remove\n")


@pytest.mark.parametrize(
    ("classes", "decision", "meant"),
    [
        (["1", "2"], "1.0", "1"),
        (["1", "1.0"], "1.0", "1.0"),
        (["False", "True"], "TRUE", "True"),
        (["Pos", "pos"], "Pos", "Pos"),
        (["pos ", "neg"], "pos ", "pos "),
        (["Remove", "x"], "Remove", "Remove"),
        (["Remove", "x"], "remove", "remove"),
        (["Pos", "pos"], "POS", None),
        (["Remove", "x"], "REMOVE", None),
        (["remove", "x"], "remove", None),
        (["remove", "x"], "X", "x"),
    ],
)
def test_a_decision_is_the_one_name_it_can_mean(
    classes: list[str], decision: str, meant: str | None, tmp_path: Path
) -> None:
    run = run_of(tmp_path, ["7", "8"], classes)
    (tmp_path / "results").mkdir()
    if meant is None:
        with pytest.raises(InputError, match=r"line 2: decision .* is ambiguous"):
            written(run, f"key,decision\n7,{decision}\n")
        with pytest.raises(InputError, match="is ambiguous"):
            Decisions(run, {}).set(0, decision)
        return
    assert written(run, f"key,decision\n7,{decision}\n") == {0: meant}
    assert Decisions(run, {}).set(0, decision) == {0: meant}


KEYS = ["0007", "7", "1e5", "100000", "1-2", "-5", "=a", "'0007", "12345678901234567890", "a,b"]
KEYS += ['"', " 7", "a\r\nb", "1.50", "2020-01-01"]
TEXTS = ["long " * 40_000, "a\rb", "a\r\nb;c", '"q"', "=1+1", "0007", *map(str, range(9))]


def test_lists_that_are_written_are_read_again(tmp_path: Path) -> None:
    run = run_of(tmp_path, KEYS, ["01", "-", "1", "=x"], TEXTS)
    (tmp_path / "results").mkdir()
    decisions = {row: ["01", "1", "remove", "=x", "keep", "-"][row % 6] for row in range(len(KEYS))}
    write_decisions(run.train, decisions, tmp_path / "results" / "decisions.csv", {})
    assert read_decisions(run, tmp_path / "results" / "decisions.csv") == decisions
    assert Decisions(run, {}).set(0, "01") == {**decisions, 0: "01"}
    flagged = [
        Flagged(key, run.train.texts[row], "01", "1", 0.1, 0.2, None, None, {"01": 3})
        for row, key in enumerate(KEYS)
    ]
    write_review(flagged, tmp_path / "review.csv")
    with (tmp_path / "review.csv").open(newline="") as file:
        csv.field_size_limit(2**28)
        rows = list(csv.DictReader(file))
    shown = dict(zip(KEYS, (row["key"] for row in rows), strict=True))
    # What a spreadsheet would take for a number or a date has an apostrophe; other keys are bare.
    assert shown["0007"] == "'0007" and shown["1e5"] == "'1e5" and shown["1-2"] == "'1-2"
    assert shown["7"] == "7" and shown["100000"] == "100000" and shown["-5"] == "-5"
    assert rows[0]["probability_wrong"] == "0.1000"
    text = (tmp_path / "review.csv").read_bytes().decode()
    assert written(run, text) == {}
    for row in rows:
        row["decision"] = "remove"
    with (tmp_path / "back.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    assert read_decisions(run, tmp_path / "back.csv") == dict.fromkeys(range(len(KEYS)), "remove")


@pytest.mark.parametrize("score", ["0,5", "1_000", "1,000", "inf", "nan", "", "٣", "0x1"])
def test_a_score_that_is_no_number_is_named(score: str, run: Any) -> None:
    path = run.folder / "s.csv"
    path.write_text(f'key;score\n7;1.5\n38;"{score}"\n')
    with pytest.raises(InputError, match=r"line 3: .* is not a finite number"):
        read_scores(run, path)


def test_scores_of_a_spreadsheet_are_read(run: Any) -> None:
    path = run.folder / "s.csv"
    path.write_text(
        "\ufeffkey;score;note\r\n7.0; 1.5;\r\n38;-2e-3;\r\n'0038;+.5;\r\nx;3;\r\n;;\r\n"
    )
    assert read_scores(run, path).tolist() == [1.5, -0.002, 0.5, 3.0]


def test_a_key_that_a_spreadsheet_would_make_another_key_is_protected(tmp_path: Path) -> None:
    keys = [
        "+7",
        "7",
        "=22",
        "22",
        "-07",
        "-7",
        ".5",
        "0.5",
        "-1.0",
        "-1",
        "-0",
        "0",
        "+1e3",
        "1000",
    ]
    stay = {"7", "22", "-7", "-1", "0", "1000"}
    run, path = run_of(tmp_path, keys, ["a", "b"]), tmp_path / "d.csv"
    write_decisions(run.train, dict.fromkeys(range(len(keys)), "keep"), path, {})
    with path.open(newline="") as file:
        found = [line["key"] for line in csv.DictReader(file)]
    assert found == [key if key in stay else f"'{key}" for key in keys]
    assert list(read_decisions(run, path)) == list(range(len(keys)))
