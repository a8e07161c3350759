"""Texts and lists that anybody may have written: read as they are, or refused by name."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("datasets")

import fuzzing
from turnover import InputError
from turnover.data.base import Columns
from turnover.data.delimited import read_table
from turnover.data.text import TextData, read
from turnover.evaluation.subsets import Subsets, draw_subsets
from turnover.io.parsing import (
    DEPTH,
    convert,
    damage,
    parse_json,
    read_json,
    read_objects,
    read_toml,
    write_json,
)

ROWS = [
    {"text": f"sentence {i}, \u00fcber \u2603", "label": "ab"[i % 2], "n": i, "id": 7 * i}
    for i in range(8)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
LIST = json.dumps(ROWS).encode()
CSV = "text,label,n,id\n" + "".join(
    f'"{row["text"]}",{row["label"]},{row["n"]},{row["id"]}\n' for row in ROWS
)
COLUMNS = Columns("text", "label", "id")
pytestmark = pytest.mark.filterwarnings("ignore:.*are kept apart")


def table(path: Path, raw: bytes) -> str | None:
    path.write_bytes(raw)
    return fuzzing.refused(lambda: check(read(str(path), COLUMNS)), str(path))


def check(data: TextData) -> None:
    """What everything after it takes for granted."""
    assert len(data) == len(data.labels) == len(data.ids) == len(data.keys) > 0
    assert all(isinstance(text, str) and text.encode() for text in (*data.texts, *data.keys))
    assert all(0 <= label < len(data.classes) for label in data.labels)
    assert int(data.ids.min()) >= 0 and len(data.classes) >= 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@fuzzing.bounded(150)
@given(raw=st.one_of(fuzzing.damaged(LINES), fuzzing.damaged(LIST)))
def test_damaged_json_of_texts_is_read_or_refused(folder: Path, raw: bytes) -> None:
    table(folder / "a.jsonl", raw)
    table(folder / "a.json", raw)


@fuzzing.bounded(150)
@given(rows=fuzzing.changed(ROWS))
def test_json_of_other_rows_is_read_or_refused(folder: Path, rows: Any) -> None:
    table(folder / "b.json", fuzzing.json_text(rows))


@fuzzing.bounded(60)
@given(raw=fuzzing.damaged(CSV.encode()))
def test_damaged_csv_is_read_or_refused(folder: Path, raw: bytes) -> None:
    table(folder / "a.csv", raw)
    table(folder / "a.tsv", raw.replace(b",", b"\t"))


@fuzzing.bounded(60)
@given(raw=fuzzing.damaged(gzip.compress(CSV.encode(), mtime=0)))
def test_damaged_gzip_is_read_or_refused(folder: Path, raw: bytes) -> None:
    table(folder / "a.csv.gz", raw)


@fuzzing.bounded(60)
@given(given_data=st.data())
def test_a_damaged_data_set_is_read_or_refused(folder: Path, given_data: st.DataObject) -> None:
    import datasets

    saved = folder / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(saved)
    name = given_data.draw(st.sampled_from(sorted(one.name for one in saved.iterdir())))
    raw = (saved / name).read_bytes()
    (saved / name).unlink()
    (saved / name).write_bytes(given_data.draw(fuzzing.damaged(raw)))
    fuzzing.refused(lambda: check(read(str(saved), COLUMNS)), str(saved))


def parquet(folder: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    path = folder / "whole.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@fuzzing.bounded(60)
@given(given_data=st.data())
def test_damaged_parquet_is_read_or_refused(folder: Path, given_data: st.DataObject) -> None:
    raw = given_data.draw(fuzzing.damaged(parquet(folder).read_bytes()))
    table(folder / "a.parquet", raw)


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_json_is_read_as_it_stands(ending: str, tmp_path: Path) -> None:
    for raw in (LINES, LIST, b"\xef\xbb\xbf" + LINES, LINES.replace(b"\n", b"\r\n\n")):
        path = tmp_path / f"a{ending}"
        path.write_bytes(raw)
        data = read(str(path), COLUMNS)
        assert data.texts == [row["text"] for row in ROWS]
        assert data.ids.tolist() == [row["id"] for row in ROWS]
    dates = [{"text": f"2020-01-0{i + 1}", "label": i % 2} for i in range(4)]
    path.write_bytes(fuzzing.json_text(dates))
    assert read(str(path), Columns()).texts[0] == "2020-01-01"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[" * 100_000, "nested more than"),
        ('{"text":' * 100_000, "nested more than"),
        ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), "nested more than"),
        ('{"text": NaN}', "NaN is not a finite number"),
        ('{"text": 1e999}', "1e999 is not a finite number"),
        ('{"text": "\\ud800"}', "lone surrogate"),
        ('{"text": 1} {"text": 2}', "Extra data"),
        ("[1]", "not a JSON object"),
        ('{"text": ' + "1" * 5000 + "}", "line 2: missing or damaged"),
    ],
)
def test_what_is_no_json_is_named_with_its_line(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' + line + "\n")
    with pytest.raises(InputError, match=said) as refused:
        read_objects(path)
    assert str(refused.value).startswith(f"{path}: line 2: ")


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv"])
def test_bytes_that_are_no_utf8_are_named_with_their_line(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(b'{"text": "a"}\n{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(InputError, match=r"line 3: not UTF-8 .* write it as UTF-8"):
        read(str(path), Columns())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": 2**63}, "does not fit 64 signed bits"),
        ({"id": -1}, "is negative"),
        ({"id": [1]}, "row 3 has no id"),
        ({"label": 1}, "mixes texts and numbers"),
        ({"label": True}, "mixes texts and numbers"),
        ({"label": ["a"]}, "multi-label"),
        ({"text": None}, "row 3 has no text"),
        ({"text": 1}, "row 3 has no text"),
    ],
)
def test_rows_of_another_kind_are_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*ROWS[:2], ROWS[2] | change, *ROWS[3:]]))
    with pytest.raises(InputError, match=said):
        read(str(path), COLUMNS)


def test_a_class_index_that_is_no_class_is_named(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    for label in (-1, None):  # what data sets without labels hold
        rows = {"text": ["x", "y", "z"], "label": [0, 1, label]}
        path = tmp_path / "a.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
        with pytest.raises(InputError, match=f"row 3 has no label in column 'label': {label} is"):
            read(str(path), Columns())


def test_a_file_that_never_ends_is_not_begun(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    readers: list[Callable[[Path], object]] = [read_json, read_objects, read_toml, Subsets.read]
    for reader in (*readers, lambda path: list(read_table(path))):
        for path in (tmp_path / "pipe.json", Path("/dev/zero"), tmp_path):
            assert "not a file" in (fuzzing.refused(lambda r=reader, p=path: r(p), str(path)) or "")


@fuzzing.bounded(150)
@given(raw=fuzzing.damaged(json.dumps({"a": [1, 2.5, "x"], "b": {"c": None}}).encode()))
def test_damaged_objects_are_read_or_refused(folder: Path, raw: bytes) -> None:
    path = folder / "metrics.json"
    path.write_bytes(raw)
    fuzzing.refused(lambda: read_json(path), str(path))


def test_numbers_that_are_not_finite_are_read_in_what_we_measured(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"loss": float("nan")}, sealed=True)
    assert read_json(tmp_path / "a.json")["loss"] != read_json(tmp_path / "a.json")["loss"]
    with pytest.raises(InputError, match="NaN"):
        parse_json('{"loss": NaN}', "here")


@fuzzing.bounded(100)
@given(raw=fuzzing.damaged(b'epochs = 3\nsite = ["head"]\n[made]\ncommand = ["a"]\n'))
def test_damaged_toml_is_read_or_refused(folder: Path, raw: bytes) -> None:
    path = folder / "fit.toml"
    path.write_bytes(raw)
    fuzzing.refused(lambda: read_toml(path), str(path))


def test_toml_that_is_nested_or_huge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.toml"
    for text, said in (("a = " + "[" * 50_000, "nested more than"), ("#" * 2**21, "1 MiB")):
        path.write_text(text)
        assert said in (fuzzing.refused(lambda: read_toml(path), str(path)) or "")


@fuzzing.bounded(100)
@given(raw=fuzzing.damaged(b'key,decision,text\r\n1,keep,"a\nb"\r\n2,remove,\r\n'))
def test_damaged_lists_are_read_or_refused(folder: Path, raw: bytes) -> None:
    path = folder / "decisions.csv"
    path.write_bytes(raw)
    fuzzing.refused(lambda: list(read_table(path)), str(path))


SUBSETS = draw_subsets(12, 4).manifest()


@fuzzing.bounded(150)
@given(values=fuzzing.changed(SUBSETS))
def test_damaged_subsets_are_the_same_or_refused(folder: Path, values: Any) -> None:
    path = folder / "subsets.json"
    path.write_bytes(fuzzing.json_text(values))
    found: list[Subsets] = []
    if fuzzing.refused(lambda: found.append(Subsets.read(path)), str(path)) is None:
        assert found[0].sha256 == SUBSETS["sha256"]


@dataclass(frozen=True)
class Point:
    name: str
    x: float
    at: tuple[int, int] = (0, 0)
    more: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.x >= 0:
            raise InputError("x must be >= 0")


@fuzzing.bounded(300)
@given(values=fuzzing.changed({"name": "a", "x": 1.5, "at": [1, 2], "more": {"b": 2.5}}))
def test_values_are_of_their_types_or_refused_by_file(values: Any) -> None:
    found: list[Point] = []
    if fuzzing.refused(lambda: found.append(convert(values, Point, "a.json")), "a.json") is None:
        (point,) = found
        assert type(point.name) is str and type(point.x) is float and point.x >= 0
        assert len(point.at) == 2 and all(type(one) is int for one in point.at)
        assert all(type(one) is float for one in point.more.values())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"x": 1.5}, "`name`"),
        ({"name": 1, "x": 1}, r"\$\.name"),
        ({"name": "a", "x": True}, r"\$\.x"),
        ({"name": "a", "x": 1, "at": [1]}, r"\$\.at"),
        ({"name": "a", "x": -1}, "x must be >= 0"),
        ({"name": "a", "x": 1, "z": 1}, "unknown fields 'z'"),
        ([1, 2], "object"),
    ],
)
def test_the_field_of_another_type_is_named(values: Any, said: str) -> None:
    with pytest.raises(InputError, match=rf"^a\.json: damaged.*{said}"):
        convert(values, Point, "a.json", closed=True)


@fuzzing.bounded(100)
@given(value=fuzzing.VALUES)
def test_values_of_any_kind_are_taken_or_named(value: Any) -> None:
    def take() -> None:
        with damage("file.json"):
            assert value["a"][0] + 1

    fuzzing.refused(take, "file.json")
