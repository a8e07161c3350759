"""What the commands do with data of every kind, and what they say of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from test_cli import encoder, turnover  # noqa: F401
from turnover import InputError


class Stopped(InputError):
    """What a fit in these tests ends with, its data read."""


@pytest.fixture
def fitted(encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:  # noqa: F811
    """Run fit up to its training: training and test data, or None, and what was said."""
    held: list[Any] = []

    def stop(_: object, *data: Any, **__: object) -> None:
        held[:] = data[:2]
        raise Stopped("stopped")

    monkeypatch.setattr("turnover.tasks.fit.fit", stop)

    def run(data: object, *arguments: object, model: object = encoder) -> tuple[Any, str]:
        held.clear()
        given = ("fit", data, "--model", model, "--out", tmp_path / "run", *arguments)
        said = turnover(*given, expect=2)
        return (held or None), said.stdout + said.stderr

    return run


def texts(path: Path, labels: str = "pos neg", rows: int = 40) -> Path:
    known = labels.split()
    lines = (f"0{i},film {i},{known[i % len(known)]}\n" for i in range(rows))
    path.write_text("id,text,label\n" + "".join(lines))
    return path


def test_the_rows_and_classes_that_were_read_are_said(fitted: Any, tmp_path: Path) -> None:
    path = texts(tmp_path / "train.csv")
    data, said = fitted(path, "--test", texts(tmp_path / "test.csv", rows=6), "--id-column", "id")
    assert "rows read: 40 training and 6 test; 2 classes: 'neg', 'pos'\n" in said
    assert data[0].keys[7] == "07"
    data, said = fitted(texts(path, " ".join(map(str, range(12)))))
    assert "12 classes: '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', ...\n" in said


def test_test_rows_that_are_training_rows_are_said(fitted: Any, tmp_path: Path) -> None:
    train, test = texts(tmp_path / "train.csv"), tmp_path / "test.csv"
    test.write_text("id,text,label\n1,film 3,neg\n2,unseen,pos\n3,film 7,pos\n")
    _, said = fitted(train, "--test", test)
    assert "2 of the 3 test rows are also training rows, such as 'film 3': " in said
    test.write_text("id,text,label\n2,unseen,pos\n")
    _, said = fitted(train, "--test", test)
    assert "also training rows" not in said


def test_classes_that_differ_in_case_are_said_in_a_line(fitted: Any, tmp_path: Path) -> None:
    path = texts(tmp_path / "train.csv", "pos Pos")
    _, said = fitted(path, "--test", path)
    line = f"turnover: {path}: classes of column 'label': 'Pos' and 'pos' are kept apart"
    assert any(one.startswith(line) for one in said.splitlines())
    assert "UserWarning" not in said


def test_a_folder_of_texts_is_not_taken_for_images(fitted: Any, tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    rows = {"text": [f"film {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}
    datasets.Dataset.from_dict(rows).save_to_disk(folder)
    data, _ = fitted(folder)
    assert len(data[0]) + len(data[1]) == 40
    splits = tmp_path / "splits"
    splits.mkdir()
    texts(splits / "train.csv")
    texts(splits / "test.csv", rows=6)
    data, _ = fitted(splits, "--test", splits)
    assert [len(one) for one in data] == [40, 6]
    (tmp_path / "empty").mkdir()
    data, said = fitted(tmp_path / "empty")
    assert data is None
    assert "neither a folder with a file such as train.csv" in said


def test_a_folder_of_images_is_named_as_one(fitted: Any, tmp_path: Path) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "1.PNG").touch()
    _, said = fitted(tmp_path / "images")
    assert "holds images: give --model vgg11" in said


def test_plan_says_the_rows_too(encoder: Path, tmp_path: Path) -> None:  # noqa: F811
    found = turnover("plan", texts(tmp_path / "a.csv"), "--model", encoder, "--json")
    assert "rows read: " in found.stderr and "2 classes: 'neg', 'pos'" in found.stderr
    assert "rows read" not in found.stdout
