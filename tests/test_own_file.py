"""A user's file comes back with other labels and fewer rows, and as it was in all else."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("datasets")
pytest.importorskip("transformers")
pytest.importorskip("typer")

import test_cli
from test_cli import fit_arguments, sentences, turnover
from turnover import InputError
from turnover.data.base import Columns, Data, hold_out
from turnover.data.images import COLUMNS, ImageReader
from turnover.data.text import read
from turnover.io.parsing import write_json
from turnover.runs.run import Run
from turnover.runs.source import usual_ending, write_changed, write_source

encoder = test_cli.encoder
MINE = Columns("words", "mood", id="uid")
PIECES = ["a", "B", " ", ",", ";", '"', "'", "\n", "\r\n", "é", "ß", "€", "=", "0"]
CELLS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)


def run_on(source: Path, columns: Columns, *, held_out: bool = False, reader: Any = read) -> Any:
    """What writing a file again takes of a run that was trained on it."""
    train: Data = reader(str(source), columns)
    train, test = hold_out(train) if held_out else (train, train.take([]))
    folder = source.parent / "run"
    folder.mkdir(exist_ok=True)
    write_source(folder, train)
    return SimpleNamespace(
        folder=folder, train=train, test=test, pipeline=SimpleNamespace(reader=lambda: reader)
    )


def changed(
    run: Any, labels: Mapping[str, str], removed: Collection[str], out: Path
) -> tuple[Path, int]:
    """The file written, with classes by key and the keys removed."""
    keys, classes = run.train.keys, run.train.classes
    by_row = {keys.index(key): classes.index(label) for key, label in labels.items()}
    return out, write_changed(run, by_row, [keys.index(key) for key in removed], out)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_csv_file_keeps_everything_but_labels_and_rows(
    tmp_path: Path, data: st.DataObject
) -> None:
    encoding = data.draw(st.sampled_from(["utf-8", "utf-8-sig", "cp1252", "utf-16", "utf-16-be"]))
    separator, ending = data.draw(st.sampled_from([(",", ".csv"), (";", ".csv"), ("\t", ".tab")]))
    count = data.draw(st.integers(4, 9))
    labels = [
        "glad",
        'not "glad"',
        *data.draw(
            st.lists(st.sampled_from(["glad", "1,5"]), min_size=count - 2, max_size=count - 2)
        ),
    ]
    notes, words = (data.draw(st.lists(CELLS, min_size=count, max_size=count)) for _ in "ab")
    rows = [[f"0{i}", notes[i], f"x{words[i]}", labels[i], f"{i}.50"] for i in range(count)]
    header = ["uid", "a note", "words", "mood", "confidence"]
    text = io.StringIO(newline="")
    quoting = (
        csv.QUOTE_ALL
        if ending == ".tab"
        else data.draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
    )
    end = data.draw(st.sampled_from(["\n", "\r\n"]))
    csv.writer(text, delimiter=separator, lineterminator=end, quoting=quoting).writerows(
        [header, *rows]
    )
    whole = (
        end + text.getvalue().replace(end, end * 2, 1)
        if data.draw(st.booleans())
        else text.getvalue()
    )
    path = tmp_path / f"mine{ending}"
    path.write_bytes(whole.encode(encoding))
    given_encoding = "utf-8" if encoding == "utf-8-sig" else encoding
    columns = Columns("words", "mood", "uid", encoding=given_encoding)
    run = run_on(path, columns)
    assume(len(run.train) == count)
    out = tmp_path / f"out{ending}"
    changed(run, {}, [], out)
    assert out.read_bytes().decode(encoding) == whole
    keys = st.sampled_from([row[0] for row in rows])
    removed = data.draw(st.sets(keys, max_size=2))
    relabeled = data.draw(st.dictionaries(keys, st.sampled_from(labels)))
    changed(run, relabeled, removed, out)
    expected = [
        [*row[:3], relabeled.get(row[0], row[3]), row[4]] for row in rows if row[0] not in removed
    ]
    lines = csv.reader(
        io.StringIO(out.read_bytes().decode(encoding), newline=""), delimiter=separator
    )
    assert [line for line in lines if line] == [header, *expected]


def test_only_the_cell_of_a_changed_label_differs(tmp_path: Path) -> None:
    raw = (
        'uid;words;mood;more\r\n7;"a; b";"glad";\r\n\r\n8;say "hi";sad; 1,50 \r\n'
        '9;"two\nlines";"glad";"x"\r\n10;last;sad;'
    )
    path = tmp_path / "mine.csv"
    path.write_bytes(raw.encode())
    out, _ = changed(run_on(path, MINE), {"8": "glad", "10": "glad"}, ["7"], tmp_path / "o.csv")
    assert out.read_bytes().decode() == (
        'uid;words;mood;more\r\n\r\n8;say "hi";"glad"; 1,50 \r\n9;"two\nlines";"glad";"x"\r\n'
        '10;last;"glad";'
    )


@pytest.mark.parametrize("order", ["le", "be"])
@pytest.mark.parametrize("width", ["utf-16", "utf-32"])
def test_the_order_of_bytes_stays(width: str, order: str, tmp_path: Path) -> None:
    text = "text,label\nné,a\nb,b\nc,a\n"
    (tmp_path / "mine.csv").write_bytes(f"\ufeff{text}".encode(f"{width}-{order}"))
    run = run_on(tmp_path / "mine.csv", Columns(encoding=width))
    out, _ = changed(run, {}, [run.train.keys[1]], tmp_path / "cleaned.csv")
    kept = text.replace("b,b\n", "")
    assert out.read_bytes() == f"\ufeff{kept}".encode(f"{width}-{order}")


def test_tabs_without_quoting_and_gzip_stay_as_they_are(tmp_path: Path) -> None:
    raw = 'uid\twords\tmood\n1\t"good film\tglad\n2\tbad "film"\tsad\n3\tdull\tsad\n'
    path = tmp_path / "mine.tsv.gz"
    path.write_bytes(gzip.compress(raw.encode()))
    out, _ = changed(run_on(path, MINE), {"1": "sad"}, ["3"], tmp_path / "o.tab")
    assert out.read_text() == 'uid\twords\tmood\n1\t"good film\tsad\n2\tbad "film"\tsad\n'


def test_a_file_whose_quote_marks_would_be_read_otherwise_is_not_written(tmp_path: Path) -> None:
    path, out = tmp_path / "mine.tsv", tmp_path / "o.tsv"
    path.write_text('uid\twords\tmood\n1\t"good film\tglad\n2\t"the end"\tsad\n3\tx\tglad\n')
    run = run_on(path, MINE)
    with pytest.raises(InputError, match=r"o.tsv: without the removed rows .* write \.csv"):
        changed(run, {}, ["1"], out)
    assert sorted(tmp_path.glob("*o.*")) == []
    changed(run, {}, ["1"], tmp_path / "o.csv")
    assert read(str(tmp_path / "o.csv"), MINE).texts == ['"the end"', "x"]


@pytest.mark.parametrize(
    ("name", "ending"), [("a.csv.gz", ".csv"), ("a.TAB", ".tab"), ("a.json", ".json")]
)
def test_the_usual_ending_is_that_of_the_file(name: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = [{"words": "a", "mood": "x", "uid": 1}, {"words": "b", "mood": "y", "uid": 2}]
    separator = "\t" if ending == ".tab" else ","
    lines = [separator.join(map(str, one)) for one in (rows[0], *(row.values() for row in rows))]
    raw = (json.dumps(rows) if ending == ".json" else "\n".join(lines)).encode()
    path.write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    run = run_on(path, MINE)
    assert usual_ending(run) == ending
    path.unlink()
    assert usual_ending(run) == ending
    where = run.folder / "source.json"
    for act in (lambda: where.write_text("{"), where.unlink):
        act()
        assert usual_ending(run) == ".csv"


LINES = [
    r'{"uid": 1, "words": "gl\u00fccklich", "mood": 0, "score": 1.50}',
    '{"mood" :1,"words":"traurig","uid":2}',
    '{"uid": 3, "words": "so, so", "nested": {"mood": 5}, "mood": 1, "tags": ["a", null]}',
    '{"uid": 4, "words": "naja", "mood": 0, "score": 1e3}',
]
CHANGED = [LINES[1].replace("1,", "0,", 1), LINES[2].replace('"mood": 1', '"mood": 0')]


@pytest.mark.parametrize(
    ("before", "between", "after"),
    [("", "\n", "\n"), ("\n", "\r\n\r\n", ""), ("[\n  ", ",\n  ", "\n]")],
)
def test_json_keeps_its_fields_types_and_layout(
    before: str, between: str, after: str, tmp_path: Path
) -> None:
    path, out = tmp_path / "mine.json", tmp_path / "o.json"
    whole = before + between.join(LINES) + after
    path.write_bytes(whole.encode("latin-1"))
    columns = Columns("words", "mood", "uid", encoding="latin-1")
    run = run_on(path, columns)
    changed(run, {}, [], out)
    assert out.read_bytes() == path.read_bytes()
    changed(run, {"2": "0", "3": "0"}, ["4"], out)
    kept = between.join([LINES[0], *CHANGED])
    assert out.read_text("latin-1").split() == (before + kept + after).split()
    lines = tmp_path / "o.jsonl"
    changed(run, {}, ["4"], lines)
    rows = [json.loads(line) for line in lines.read_text("latin-1").splitlines()]
    assert [row["uid"] for row in rows] == [1, 2, 3]


def test_parquet_keeps_its_schema(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    moods = pa.array(["glad", "sad", "sad", "glad"]).dictionary_encode()
    table = pa.table(
        {
            "uid": pa.array([5, 6, 7, 8], pa.int16()),
            "words": pa.array(["a", "b", "c", "d"], pa.large_string()),
            "mood": pa.array([3, 4, 4, 3], pa.int8()),
            "at": pa.array([1, None, 3, 4], pa.timestamp("ms", "UTC")),
            "tags": [["x"], [], None, ["y", "z"]],
            "said": moods,
        }
    ).replace_schema_metadata({"mine": "yes"})
    path, out = tmp_path / "mine.parquet", tmp_path / "o.parquet"
    parquet.write_table(table, path, row_group_size=2)
    table = parquet.read_table(path)
    for label, names in (("mood", ("3", "4")), ("said", ("glad", "sad"))):
        run = run_on(path, Columns("words", label, "uid"))
        changed(run, {"8": names[1], "6": names[0]}, ["7"], out)
        again = parquet.read_table(out)
        assert again.schema.equals(table.schema, check_metadata=True)
        index = table.column_names.index(label)
        labels = table[label].take([0, 0, 2])
        assert again.equals(
            table.take([0, 1, 3]).set_column(index, table.schema.field(label), labels)
        )


def test_arrays_of_images_keep_their_names_types_and_pixels(tmp_path: Path) -> None:
    arrays = {
        "pictures": np.random.default_rng(0).integers(0, 256, (5, 40, 36), dtype=np.uint8),
        "kind": np.array([1, 2, 2, 1, 1], np.int16),
        "uid": np.array(["a", "b", "c", "d", "e"]),
        "lens": np.arange(10.0).reshape(5, 2),
        "scale": np.array(0.5),
    }
    path, out = tmp_path / "mine.npz", tmp_path / "o.npz"
    np.savez(path, **arrays)
    columns = Columns("pictures", "kind", "uid")
    run = run_on(path, columns, reader=ImageReader(32))
    changed(run, {"d": "2"}, ["b"], out)
    with np.load(out) as again:
        assert again.files == [*arrays]
        for name, values in arrays.items():
            expected = values if name == "scale" else values[[0, 2, 3, 4]]
            if name == "kind":
                expected = np.array([1, 2, 2, 1], np.int16)
            assert again[name].dtype == values.dtype
            assert np.array_equal(again[name], expected)
    with pytest.warns(UserWarning, match="has the columns key, image, label: .* two formats"):
        changed(run, {}, ["b"], tmp_path / "o.csv")
    assert (tmp_path / "o.csv").read_text().splitlines()[0] == "key,image,label"


def test_a_table_of_images_keeps_the_files_in_it(tmp_path: Path) -> None:
    import datasets
    from PIL import Image
    from pyarrow import parquet

    images = [Image.new("RGB", (40, 40), (60 * i, 0, 0)) for i in range(4)]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    path, out = tmp_path / "mine.parquet", tmp_path / "o.parquet"
    datasets.Dataset.from_dict(
        {"image": images, "label": [0, 1, 0, 1]}, features=datasets.Features(features)
    ).to_parquet(path)
    changed(run_on(path, COLUMNS, reader=ImageReader(32)), {"4": "cat"}, ["1"], out)
    whole, again = parquet.read_table(path), parquet.read_table(out)
    assert again.schema.equals(whole.schema)
    assert again.schema.metadata[b"huggingface"] == whole.schema.metadata[b"huggingface"]
    assert again["image"].to_pylist() == whole["image"].to_pylist()[1:]
    assert again["label"].to_pylist() == [1, 0, 0]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet", ".tsv", ".tab", ".csv"])
def test_another_ending_writes_another_format_with_the_same_columns(
    ending: str, tmp_path: Path
) -> None:
    path, out = tmp_path / "mine.csv", tmp_path / f"o{ending}"
    lines = ["uid;words;mood;note", "01;süß, so;glad;1.50", "02;€ b;sad;", "03;c;sad;x"]
    path.write_bytes("\n".join(lines).encode("cp1252"))
    columns = Columns("words", "mood", "uid", encoding="cp1252")
    changed(run_on(path, columns), {"03": "glad"}, [], out)
    again = read(str(out), columns)
    assert again.keys == ["01", "02", "03"] and again.texts == ["süß, so", "€ b", "c"]
    assert [again.classes[label] for label in again.labels] == ["glad", "sad", "glad"]
    notes = read(str(out), Columns("words", "uid", "words", encoding="cp1252"))
    assert notes.classes == ["01", "02", "03"]


def test_classes_of_a_data_set_in_parquet_have_their_names_in_csv(tmp_path: Path) -> None:
    import datasets

    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    path = tmp_path / "mine.parquet"
    rows = {"text": ["a", "b", "c"], "label": [0, 1, 1]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)
    out, _ = changed(run_on(path, Columns()), {"3": "no"}, ["1"], tmp_path / "o.csv")
    assert out.read_text() == "text,label\nb,yes\nc,no\n"


def test_pairs_of_texts_keep_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("one,two,same\na,b,no\nc,c,yes\nd,e,no\n")
    run = run_on(path, Columns("one", "same", second="two"))
    out, _ = changed(run, {"3": "yes"}, ["1"], tmp_path / "o.csv")
    assert out.read_text() == "one,two,same\nc,c,yes\nd,e,yes\n"


def test_rows_held_out_for_testing_stay_in_the_file(tmp_path: Path) -> None:
    path, columns = tmp_path / "mine.csv", Columns("words", "mood", id="uid")
    lines = [f"u{i},text {i},{'glad' if i % 2 else 'sad'},{i}" for i in range(60)]
    path.write_text("\n".join(["uid,words,mood,more", *lines, ""]))
    run = run_on(path, columns, held_out=True)
    first, second = run.train.keys[:2]
    out, unchanged = changed(run, {}, [first], tmp_path / "o.csv")
    assert unchanged == len(run.test) > 0
    assert out.read_text().splitlines()[1:] == [
        line for line in lines if not line.startswith(f"{first},")
    ]
    train, test = hold_out(read(str(out), columns))
    assert train.keys == run.train.keys[1:] and test.keys == run.test.keys
    assert second in train.keys


def _delete(path: Path, folder: Path) -> None:
    path.unlink()


def _change(path: Path, folder: Path) -> None:
    path.write_text(path.read_text().replace("a b", "a c"))


def _extend(path: Path, folder: Path) -> None:
    with path.open("a") as file:
        file.write("4,new,sad\n")


def _forget(path: Path, folder: Path) -> None:
    (folder / "source.json").unlink()


def _damage(path: Path, folder: Path) -> None:
    (folder / "source.json").write_text('{"source": ["a"]}')


def _is_on_the_hub(path: Path, folder: Path) -> None:
    columns = {"input": "text", "label": "label"}
    write_json(folder / "source.json", {"source": "imdb", "columns": columns, "split": "train"})


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            _delete,
            "mine.csv is not there any more; put it back, or write its path into .*source.json",
        ),
        (_change, "mine.csv is not as it was when the run was trained"),
        (_extend, "mine.csv is not as it was when the run was trained"),
        (_forget, "run does not say which file its training rows are from"),
        (_damage, "source.json: damaged, or of another version"),
        (_is_on_the_hub, "'imdb' is a Hugging Face data set, and no file"),
    ],
)
def test_where_the_file_is_not_what_was_trained_on_other_columns_are_written_and_named(
    harm: Callable[[Path, Path], None], said: str, tmp_path: Path
) -> None:
    path, out = tmp_path / "mine.csv", tmp_path / "o.csv"
    path.write_text("uid,words,mood\n1,a b,glad\n2,b,sad\n3,c,sad\n")
    run = run_on(path, MINE)
    harm(path, run.folder)
    with pytest.warns(UserWarning, match=f"o.csv has the columns key, text, label: .*{said}"):
        changed(run, {"3": "glad"}, ["1"], out)
    assert out.read_text() == "key,text,label\n2,b,sad\n3,c,glad\n"


def test_a_file_that_moved_is_found_where_the_run_is_told(tmp_path: Path) -> None:
    path, moved = tmp_path / "mine.csv", tmp_path / "moved.csv"
    path.write_text("uid,words,mood\n1,a b,glad\n2,b,sad\n3,c,sad\n")
    run = run_on(path, MINE)
    path.rename(moved)
    where = run.folder / "source.json"
    where.write_text(where.read_text().replace("mine.csv", "moved.csv"))
    out, _ = changed(run, {}, ["1"], tmp_path / "o.csv")
    assert out.read_text() == "uid,words,mood\n2,b,sad\n3,c,sad\n"


def test_rows_made_in_memory_have_no_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("uid,words,mood\n1,a b,glad\n2,b,sad\n")
    made = read(str(path), MINE).relabeled([1, 0])
    assert made.provenance is not None  # changed rows are still of that file, which then differs
    write_source(tmp_path, SimpleNamespace(provenance=None))  # type: ignore[arg-type]
    assert not (tmp_path / "source.json").exists()


def test_an_encoding_that_is_wrong_or_unknown_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes("text,label\nplain,a\nnaïve,b\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"line 3: not UTF-8 .* --encoding cp1252\)$"):
        read(str(path), Columns())
    assert read(str(path), Columns(encoding="CP1252")).texts == ["plain", "naïve"]
    for name in ("cp99999", "hex", "", "a\0b", "undefined"):
        with pytest.raises(InputError, match=r"unknown encoding .* such as utf-8, cp1252"):
            read(str(path), Columns(encoding=name))
    path.write_text("text,label\nplain,a\nnaïve,b\n", "utf-8")
    with pytest.warns(UserWarning, match="looks like UTF-8, and is read as cp1252"):
        assert read(str(path), Columns(encoding="cp1252")).texts == ["plain", "naÃ¯ve"]
    path.write_bytes(b"text,label\nplain,a\nb\x81,b\n")
    with pytest.raises(InputError, match=r"line 3: not cp1252 \(.*\); write it as UTF-8, or"):
        read(str(path), Columns(encoding="cp1252"))
    lines = path.with_suffix(".jsonl")
    lines.write_bytes('{"text": "naïve", "label": 0}\n{"text": "b", "label": 1}'.encode("utf-16"))
    with pytest.raises(InputError, match=r"line 1: not UTF-8 .* --encoding"):
        read(str(lines), Columns())
    assert read(str(lines), Columns(encoding="utf-16")).texts == ["naïve", "b"]


def test_files_that_are_read_are_not_written_over(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["uid,text,label", *(f'u{i},"{text}",{label}' for i, text, label in sentences(60))]
    mine = tmp_path / "mine.csv"
    mine.write_text("\n".join([*lines, ""]), "utf-8")
    turnover(*fit_arguments(mine, encoder, tmp_path / "run", "--no-compare", "--id-column", "uid"))
    run = Run.load(tmp_path / "run")
    Path("d.csv").write_text(f"key,decision\n{run.train.keys[0]},remove\n", "utf-8")
    Path("s.csv").write_text("key,score\n" + "".join(f"{key},1\n" for key in run.train.keys))
    Path("g.csv").write_text("key,attribute\n" + "".join(f"{key},1\n" for key in run.test.keys))
    Path("v.csv").write_text("text,label\ngood,pos\nbad,neg\n", "utf-8")
    Path("other").mkdir()
    Path("other/validation.csv").write_text("text,label\ngood,pos\nbad,neg\n", "utf-8")
    (tmp_path / "link.csv").symlink_to(mine)
    commands = [
        (("predict", "run", "--hidden"), mine),
        (("review", "run"), mine),
        (("review", "run"), "link.csv"),
        (("review", "run", "--apply", "remove"), "../" + tmp_path.name + "/mine.csv"),
        (("review", "run", "--decisions", "d.csv"), "d.csv"),
        (("cleanse", "run", "--validation", "v.csv"), mine),
        (("cleanse", "run", "--validation", "v.csv"), "v.csv"),
        (("cleanse", "run", "--validation", "other"), "other/validation.csv"),
        (("cleanse", "run", "--validation", "v.csv", "--scores", "s.csv"), "s.csv"),
        (("fairness", "run", "--attributes", "g.csv", "--positive", "pos"), "g.csv"),
    ]
    before = {path: path.read_bytes() for path in tmp_path.glob("**/*.csv")}
    for command, out in commands:
        refused = turnover(*command, "--out", out, expect=2)
        assert "name another file with --out" in refused.stderr, command
        assert refused.stderr.count("\n") == 1, refused.stderr
    assert {path: path.read_bytes() for path in tmp_path.glob("**/*.csv")} == before


def test_the_same_fit_command_runs_on_the_file_after_decisions(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    head = "uid;confidence;sentiment;sentence"
    lines = [f'ü{i};0,{i};{label};"{text}; «{i}»"' for i, text, label in sentences(60)]
    (there / "mine.csv").write_bytes("\r\n".join([head, *lines, ""]).encode("cp1252"))
    monkeypatch.chdir(there)
    columns = ("--text-column", "sentence", "--label-column", "sentiment", "--id-column", "uid")

    def fit(train: object, out: Path, *more: object) -> Any:
        return turnover(*fit_arguments(train, encoder, out, "--no-compare", *columns, *more))

    refused = turnover(*fit_arguments("mine.csv", encoder, there / "r", *columns), expect=2)
    assert "line 2: not UTF-8" in refused.stderr and "--encoding cp1252" in refused.stderr
    assert refused.stderr.count("\n") == 1
    fit("mine.csv", there / "run", "--encoding", "cp1252")
    monkeypatch.chdir(here)
    run = Run.load(there / "run")
    wrong, gone = run.train.keys[:2]
    before = run.train.classes[run.train.labels[0]]
    after = "neg" if before == "pos" else "pos"
    (here / "d.csv").write_text(f"key,decision\n{wrong},{after}\n{gone},remove\n", "utf-8")
    arguments = ("review", there / "run", "--decisions", "d.csv", "--out", "cleaned.csv")
    shown = json.loads(turnover(*arguments, "--json").stdout)
    assert shown["unchanged_test_rows"] == len(run.test) > 0
    said = turnover(*arguments)
    assert not said.stderr
    assert said.stdout == (
        f"{len(run.train) - 2} kept, 1 removed, 1 relabelled, {len(run.test)} unchanged test rows: "
        "cleaned.csv\n"
    )
    expected = [
        line.replace(f";{before};", f";{after};") if line.startswith(f"{wrong};") else line
        for line in lines
        if not line.startswith(f"{gone};")
    ]
    written = (here / "cleaned.csv").read_bytes().decode("cp1252")
    assert written == "\r\n".join([head, *expected, ""])
    fit("cleaned.csv", here / "run", "--encoding", "cp1252")
    again = Run.load(here / "run")
    assert again.train.classes == run.train.classes and again.test.keys == run.test.keys
    assert again.train.keys == [key for key in run.train.keys if key != gone]
    assert again.train.labels[0] == again.train.classes.index(after)
    recipe = tomllib.loads((there / "run" / "fit.toml").read_text("utf-8"))
    assert recipe["encoding"] == "cp1252"
    refused = turnover(
        "fit", "--config", there / "run" / "fit.toml", "--out", "r", "--encoding", "cp0", expect=2
    )
    assert "unknown encoding 'cp0'" in refused.stderr and refused.stderr.count("\n") == 1
    (there / "mine.csv").unlink()
    said = turnover(*arguments)
    assert "cleaned.csv has the columns key, text, label" in said.stderr
    assert (here / "cleaned.csv").read_text("utf-8").startswith("key,text,label\n")
