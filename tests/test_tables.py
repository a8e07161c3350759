"""Tables as people have them: every cell of CSV and TSV is the text it is, or the row is named."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
import torch

from turnover import InputError, content_ids, string_ids
from turnover.data.base import Columns, hold_out
from turnover.data.text import TextData, read

IDS, GROUPS = Columns(id="id"), Columns(group="group")
Table = Callable[..., TextData]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    def read_raw(
        raw: str | bytes,
        columns: Columns | None = None,
        name: str = "a.csv",
        classes: list[str] | None = None,
    ) -> TextData:
        path = tmp_path / name
        path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
        return read(str(path), columns or Columns(), classes=classes)

    return read_raw


def labels(data: TextData) -> list[str]:
    return [data.classes[label] for label in data.labels]


@pytest.mark.parametrize(
    "keys",
    [
        ("0007", "0038"),
        ("007", "7"),
        ("1e5", "100000"),
        ("12345678901234567890", "12345678901234567891"),
        ("12", "abc"),
        ("7", "7.0"),
        ("+7", "7"),
        ("-1", "x"),
        ("TRUE", "True"),
        ("nan", "NA"),
        ("1_000", "1000"),
        ("2020-01-01", "01/02/2020"),
    ],
)
def test_ids_of_csv_are_the_texts_in_it(keys: tuple[str, str], table: Table) -> None:
    raw = f"id,text,label\n{keys[0]},a,pos\n{keys[1]},b,neg\n"
    for columns, name in ((IDS, "a.csv"), (IDS, "a.TSV")):
        data = table(raw if name == "a.csv" else raw.replace(",", "\t"), columns, name)
        assert data.keys == list(keys)
        assert data.ids.tolist() == string_ids(keys).tolist()


@pytest.mark.parametrize("column", ["id", "group"])
def test_integers_stay_the_ids_they_were(column: str, table: Table) -> None:
    data = table(
        f"{column},text,label\n0,a,x\n17,b,y\n{2**63 - 1},c,x\n", Columns(**{column: column})
    )
    assert data.ids.tolist() == [0, 17, 2**63 - 1]
    assert data.groups == ["0", "17", str(2**63 - 1)]
    assert data.keys == (data.groups if column == "id" else ["1", "2", "3"])
    with pytest.raises(InputError, match=r"id -2 .* is negative"):
        table(f"{column},text,label\n1,a,x\n-2,b,y\n", Columns(**{column: column}))


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (("7", "7 "), "'7' and '7 ' in column 'id' differ in blanks alone"),
        (("007", "007"), "duplicate ids in column 'id': 007"),
        (("a", "  "), "row 2 has no id"),
    ],
)
def test_ids_that_may_be_one_are_named(ids: tuple[str, str], said: str, table: Table) -> None:
    with pytest.raises(InputError, match=said):
        table(f"id,text,label\n{ids[0]},a,x\n{ids[1]},b,y\n", IDS)


def test_ids_that_pandas_lost_are_missing(tmp_path: Path) -> None:
    import datasets

    rows = {"group": [1.0, float("nan"), 1.0], "text": ["a", "b", "c"], "label": ["x", "y", "x"]}
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict(rows).to_parquet(path)
    with pytest.raises(InputError, match="row 2 has no id in column 'group'"):
        read(str(path), GROUPS)


def test_groups_written_in_two_ways_are_pointed_out(table: Table) -> None:
    head = "group,text,label\n"
    with pytest.raises(InputError, match="'ann' and 'ann ' differ in blanks alone"):
        table(head + "ann,a,x\nann ,b,y\n", GROUPS)
    for other in ("Ann", "ANN"):
        with pytest.warns(UserWarning, match=f"'{other}' and 'ann' are kept apart"):
            assert table(head + f"ann,a,x\n{other},b,y\n", GROUPS).groups == ["ann", other]
    with pytest.warns(UserWarning, match="'1' and '1.0' are kept apart"):
        assert table(head + "1,a,x\n1.0,b,y\n", GROUPS).groups == ["1", "1.0"]


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (
            "text,label\na,pos,ann1\nb,neg,ann2\n",
            r"row 1 \(line 2\) has 3 fields, the header has 2; .* or give every column a name",
        ),
        ("text,label\na,pos\n\nfun\n", r"row 2 \(line 4\) has 1 field, the header has 2"),
        ('text,label\n"a\nb",pos\nx,y,z\n', r"row 2 \(line 4\) has 3 fields"),
        ('text,label\na,pos\n"b,neg\nc,pos\n', r"row 2 \(line 3\): a quote mark .* none closes it"),
        ('text,label\n"a,pos\nb,neg\n"c",x\n', r"row 1 \(line 2\): .* closes it on line 4"),
        ('text,label\n"a \\"b\\" c",pos\n', r"row 1 \(line 2\): .* within a cell twice"),
        ('"text,label\na,pos\n', r"the header \(line 1\): a quote mark"),
        ("text,label,label\na,pos,x\nb,neg,y\n", "the header has 'label' twice"),
        ("text,label\n", "the file has no rows"),
        ("sentence;label\na, b;pos\n", "no column 'text'; it has sentence;label"),
        ("\n\n", "the file is empty"),
        ("text,label\n ,pos\n", "row 1 has no text"),
        ("text,label\na,pos\nb, \n", "row 2 has no label"),
        ("text\tlabel\na\tpos\nb\tneg\n", r"tabs separate its cells: rename it to end in \.tsv"),
        ("text,label\na,b\n".encode("utf-16-le"), "NUL bytes; .* --encoding utf-16-le"),
        ("text,label\na,b\n".encode("utf-16"), "line 1: not UTF-8"),
        ("text,label\na,0.73\nb,-1\n", "column 'label' holds real numbers such as 0.73"),
        (
            "text,label\n" + "".join(f'{i},"{i},5"\n' for i in range(30)) + "x,NA\n",
            "holds real numbers such as 0,5",
        ),
        ("text,label\na,pos\nb,pos \n", "'pos' and 'pos ' differ in blanks alone"),
    ],
)
def test_what_is_wrong_in_a_csv_file_is_named(raw: str | bytes, said: str, table: Table) -> None:
    with pytest.raises(InputError, match=said):
        table(raw)


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        ("text,label\n12345,a\n007,b\n", ["12345", "007"]),
        ("text,label\n1.50,a\ninf,b\n", ["1.50", "inf"]),
        ("text,label\nTRUE,a\n2020-01-01,b\n", ["TRUE", "2020-01-01"]),
        ("text,label\n#no comment,a\nNA,b\n", ["#no comment", "NA"]),
        ('text,label\n"a ""b"", c",a\n5" disk,b\n', ['a "b", c', '5" disk']),
        ('"text","label"\r\n"a\r\nb",a\r\nc,b\r\n\r\n', ["a\r\nb", "c"]),
        ('\ufeff"text",label\na,a\nb,b\n\n\n', ["a", "b"]),
        ("text,label\ra,a\rb,b\r", ["a", "b"]),
        ("\ntext,label\na,a\n   \nb,b", ["a", "b"]),
        ("label;text\na;x, y\nb;z\n", ["x, y", "z"]),
        ('label,note;text\na,"x;y"\n'.replace("note;text", "text"), ["x;y"]),
        (",text,label\n0,x,a\n1,y,b\n", ["x", "y"]),
        ("text,label\na\0b,a\nc,b\n", ["a\0b", "c"]),
        (f"text,label\n{'long ' * 60_000},a\nc,b\n", ["long " * 60_000, "c"]),
    ],
)
def test_texts_of_csv_are_the_texts_in_it(raw: str, texts: list[str], table: Table) -> None:
    if raw.count("\na") and len(texts) == 1:
        raw += "b,z\n"
        texts = [*texts, "z"]
    assert table(raw).texts == texts


def test_columns_without_a_name_are_called_by_their_place(table: Table) -> None:
    assert table(",text,label\n4,x,a\n5,y,b\n", Columns(id="Unnamed: 0")).ids.tolist() == [4, 5]


def test_endings_of_any_case_and_gzip_are_read(table: Table) -> None:
    raw = b"text,label\na,x\nb,y\n"
    for name in ("a.CSV", "a.csv.gz", "a.CSV.GZ", "a.tsv.gz"):
        one = raw.replace(b",", b"\t") if "tsv" in name else raw
        packed = gzip.compress(one) if name.lower().endswith("gz") else one
        assert table(packed, name=name).texts == ["a", "b"]
    assert table(b'{"text": "a", "label": 1}\n{"text": "b", "label": 2}', name="a.JSONL").texts
    for bad, said in (
        (gzip.compress(raw)[:-6], "end-of-stream"),
        (raw, "Not a gzipped file"),
        (gzip.compress(raw + b"\xff,x\n"), "line 4: not UTF-8"),
        (gzip.compress(raw + b"c\n"), r"row 3 \(line 4\) has 1 field"),
    ):
        with pytest.raises(InputError, match=said):
            table(bad, name="a.csv.gz")


def test_a_gzip_file_that_unpacks_to_a_disk_is_refused(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turnover.data.delimited._UNPACKED", 1000)
    with pytest.raises(InputError, match="unpacks to far more than its size"):
        table(gzip.compress(b"text,label\n" + b"a,x\n" * 100_000), name="a.csv.gz")


GLUE = [('"good film', "pos"), ("bad film", "neg"), ('dull" plot', "neg"), ('the "end"', "pos")]


@pytest.mark.parametrize("last", ["great", 'closed"', '"'])
def test_quote_marks_of_a_tsv_file_without_quoting_are_text(last: str, table: Table) -> None:
    rows = [*GLUE, (last, "pos")]
    raw = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows)
    assert table(raw, name="a.tsv").texts == [text for text, _ in rows]


def test_a_text_may_begin_with_a_quote_mark_that_another_row_closes(table: Table) -> None:
    raw = 'text\tlabel\n"good film\tpos\nbad film\tneg\nthe end"\tneg\n'
    assert table(raw, name="a.tsv").texts == ['"good film', "bad film", 'the end"']


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_tsv_of_a_spreadsheet_is_read_as_it_wrote_it(
    quoting: int, tmp_path: Path, table: Table
) -> None:
    texts = ["plain", 'a "b"', "two\nlines", "a\ttab", "last"]
    path = tmp_path / "written.tsv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t", quoting=quoting)  # type: ignore[call-overload]
        writer.writerows(
            [["text", "label"], *([text, "ab"[i % 2]] for i, text in enumerate(texts))]
        )
    assert table(path.read_bytes(), name="a.tsv").texts == texts


def test_the_row_of_a_damaged_tsv_file_is_named(table: Table) -> None:
    glue = "".join(f"{text}\t{label}\n" for text, label in GLUE)
    with pytest.raises(
        InputError, match=r"row 5 \(line 6\) has 1 field, the header has 2"
    ) as refused:
        table(f"text\tlabel\n{glue}lost\n", name="a.tsv")
    assert type(refused.value) is InputError  # the public one
    with pytest.raises(InputError, match=r"row 2 \(line 4\) has 3 fields"):
        table('text\tlabel\n"two\nlines"\ta\nb\tc\td\n', name="a.tsv")


NASTY = [
    *('a "b"\r\nc', "x\ty\nz", "c\rd", '"q"', " lead", "tail ", "nul\0", "=f", "a,b;c", "'"),
    *("x\tneg\n7\ty", '"', "\ufeffbom", "long " * 40_000, "0007", "1e5"),
]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_what_is_written_is_read_again(ending: str, tmp_path: Path) -> None:
    count = len(NASTY)
    keys = [f"0{i}" for i in range(count - 3)] + ['k"1', "k,2", "12345678901234567890"]
    data = TextData(NASTY, [i % 2 for i in range(count)], string_ids(keys), keys, ["01", "po,s"])
    path = tmp_path / f"a.{ending}"
    data.export(path)
    again = read(str(path), Columns(id="key"))
    assert again.texts == NASTY
    assert again.keys == keys
    assert torch.equal(again.ids, data.ids)
    assert labels(again) == labels(data)


@pytest.mark.parametrize(
    ("written", "classes"),
    [
        (("①", "②", "③"), ["①", "②", "③"]),
        (("²", "³"), ["²", "³"]),
        (("--1", "2"), ["--1", "2"]),
        (("-1", "10", "2"), ["-1", "2", "10"]),
        (("01", "02"), ["01", "02"]),
        (("1.0", "2.0", "10.0"), ["1", "2", "10"]),
        (("1.0", "1", "2"), ["1", "2"]),
        (("nan", "None", "null", "NA", "inf"), ["NA", "None", "inf", "nan", "null"]),
        (("TRUE", "FALSE"), ["FALSE", "TRUE"]),
        (("true", "FALSE", "TRUE"), ["False", "True"]),
        (("1.5", "n/a"), ["1.5", "n/a"]),
        (("1,5", "1,2,3"), ["1,2,3", "1,5"]),
        (("1" * 5000, "2"), ["1" * 5000, "2"]),
        ((*(f"40{i}.9" for i in range(30)), "V58.61"), None),
    ],
)
def test_labels_of_csv_are_the_classes_as_written(
    written: tuple[str, ...], classes: list[str] | None, table: Table
) -> None:
    raw = "text,label\n" + "".join(f'a{i},"{one}"\n' for i, one in enumerate(written))
    assert table(raw).classes == (classes or sorted(written))


@pytest.mark.filterwarnings("ignore:.*are kept apart")
def test_the_order_of_classes_of_one_number_follows_their_names(table: Table) -> None:
    written = ["0" * zeros + "1" for zeros in range(12)]  # a set has them in another order
    raw = "text,label\n" + "".join(f"a,{one}\n" for one in ("2", *written))
    assert table(raw).classes == [*sorted(written), "2"]


def test_classes_that_differ_in_case_alone_are_pointed_out(table: Table) -> None:
    with pytest.warns(UserWarning, match="classes of column 'label': 'Pos' and 'pos' are kept"):
        assert table("text,label\na,pos\nb,Pos\n").classes == ["Pos", "pos"]
    with pytest.warns(UserWarning, match="'01' and '1' are kept apart"):
        assert table("text,label\na,1\nb,01\n").classes == ["01", "1"]


@pytest.mark.parametrize(
    ("classes", "written", "known"),
    [
        (["1", "2"], ("1.0", "2.0"), ["1", "2"]),
        (["1.0", "2.0", "x"], ("1.0", "2.0"), ["1.0", "2.0"]),
        (["False", "True"], ("TRUE", "FALSE"), ["True", "False"]),
        (["FALSE", "TRUE"], ("true", "false"), ["TRUE", "FALSE"]),
        (["01", "02"], ("01", "02"), ["01", "02"]),
    ],
)
def test_test_data_may_write_the_classes_as_another_program_does(
    classes: list[str], written: tuple[str, str], known: list[str], table: Table
) -> None:
    raw = f"text,label\na,{written[0]}\nb,{written[1]}\n"
    assert labels(table(raw, classes=classes)) == known


@pytest.mark.parametrize(
    ("classes", "label", "hint"),
    [
        (["neg", "pos"], "Pos ", "did you mean 'pos'"),
        (["01", "02"], "1", "did you mean '01'"),
        (["1", "x"], "1.0x", "the classes are 1, x$"),
    ],
)
def test_unknown_labels_are_named_with_the_class_meant(
    classes: list[str], label: str, hint: str, table: Table
) -> None:
    with pytest.raises(InputError, match=f"unknown label '{label}' in row 1.*{hint}"):
        table(f"text,label\na,{label}\nb,x\n", classes=classes)


def test_numbers_as_labels_keep_the_ids_of_rows(table: Table) -> None:
    for raw in ("text,label\na,1\nb,2\n", "text,label\na,1.0\nb,2\n"):
        assert torch.equal(table(raw).ids, content_ids("\0".join(one) for one in ("a1", "b2")))


def test_decimal_numbers_are_a_regression_target_too(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = {"text": ["a", "b"], "label": [Decimal("0.73"), Decimal("1.00")]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"holds real numbers such as 0\.73"):
        read(str(tmp_path / "a.parquet"), Columns())


def test_numbers_in_place_of_texts_are_named_as_what_they_are(table: Table) -> None:
    with pytest.raises(
        InputError, match=r"row 1 has no text in column 'text', but '12' of the type int"
    ):
        table('{"text": 12, "label": 1}\n{"text": "a", "label": 2}\n', name="a.jsonl")


def test_the_cause_of_an_error_of_a_library_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + b"x" * 100 + b"PAR1")
    with pytest.raises(InputError, match=r"Parquet|parquet magic|metadata|footer|thrift"):
        read(str(path), Columns())


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ("caf\u00e9", "cafe\u0301", r"'cafe\\u0301' and 'caf\\xe9' look alike"),
        ("pos", "pos\u200b", r"'pos' and 'pos\\u200b' look alike"),
        ("\ufeffpos", "pos", r"'\\ufeffpos' look alike"),
        ("\uac00", "\u1100\u1161", "look alike"),
    ],
)
def test_names_that_look_alike_are_refused(one: str, other: str, said: str, table: Table) -> None:
    with pytest.raises(InputError, match=said):
        table(f"text,label\na,{one}\nb,{other}\nc,neg\n")
    with pytest.raises(InputError, match=said):
        table(f"group,text,label\n{one},a,pos\n{other},b,neg\n", GROUPS)
    with pytest.raises(InputError, match=r"unknown label .* looks like .*, but is written as"):
        table(f"text,label\na,{one}\n", classes=["neg", other])


def test_booleans_among_numbers_are_refused(table: Table) -> None:
    rows = '{"text":"a","label":true}\n{"text":"b","label":%s}\n'
    for number in ("0", "1.0"):
        with pytest.raises(InputError, match="column 'label' mixes True and numbers such as"):
            table(rows % number, name="a.jsonl")
    assert table(rows % "false", name="a.jsonl").classes == ["False", "True"]


def test_where_groups_are_too_few_to_hold_some_out_they_are_named(table: Table) -> None:
    rows = "".join(f"{'ab'[i % 2]},text {i},{'xy'[i % 2]}\n" for i in range(40))
    with pytest.raises(InputError, match="40 rows in 2 groups are too few"):
        hold_out(table(f"group,text,label\n{rows}", GROUPS))
