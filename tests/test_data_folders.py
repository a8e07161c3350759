"""Folders that hold a data set, and what the commands say of the data they read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets")

import datasets

from turnover import InputError
from turnover.data.base import Columns
from turnover.data.text import TextData, read

ROWS = {"id": ["007", "7"], "text": ["a", "b"], "label": ["pos", "neg"]}
IDS = Columns(id="id")


def csv_text(rows: dict[str, list[str]] = ROWS, separator: str = ",") -> str:
    lines = [list(rows), *zip(*rows.values(), strict=True)]
    return "".join(separator.join(line) + "\n" for line in lines)


def check(data: TextData) -> None:
    assert data.keys == ["007", "7"]
    assert data.texts == ["a", "b"]
    assert data.classes == ["neg", "pos"]


@pytest.mark.parametrize("ending", ["csv", "tsv", "CSV.gz"])
def test_a_folder_of_splits_in_files_is_read(ending: str, tmp_path: Path) -> None:
    raw = csv_text(separator="\t" if ending == "tsv" else ",").encode()
    name = f"train.{ending}"
    (tmp_path / name).write_bytes(gzip.compress(raw) if ending.endswith("gz") else raw)
    (tmp_path / "test.csv").write_text("id,text,label\n9,c,pos\n")
    check(read(str(tmp_path), IDS))
    assert read(str(tmp_path), IDS, split="test", classes=["neg", "pos"]).texts == ["c"]
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "pos"}')
    with pytest.raises(InputError, match=r"holds train.*train.*: give the path of one"):
        read(str(tmp_path), IDS)


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict(ROWS)
    one.with_format("numpy").save_to_disk(tmp_path / "one")
    check(read(str(tmp_path / "one"), IDS))
    check(read(str(tmp_path / "one"), IDS, split="test"))
    datasets.DatasetDict({"train": one, "dev": one.select([0])}).save_to_disk(tmp_path / "both")
    check(read(str(tmp_path / "both"), IDS))
    assert read(str(tmp_path / "both"), IDS, split="dev", classes=["neg", "pos"]).texts == ["a"]
    with pytest.raises(InputError, match="no split 'test'; it has train, dev"):
        read(str(tmp_path / "both"), IDS, split="test")


def test_saved_folders_that_are_damaged_or_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    def saved(name: str) -> Path:
        datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / name)
        return tmp_path / name

    def state_of(folder: Path, **values: Any) -> None:
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | values))

    folder = saved("elsewhere")
    state_of(folder, _data_files=[{"filename": "../one/data-00000-of-00001.arrow"}])
    with pytest.raises(InputError, match="is not a file of the folder"):
        read(str(folder), IDS)
    folder = saved("linked")
    (file,) = folder.glob("*.arrow")
    file.rename(tmp_path / "outside.arrow")
    file.symlink_to(tmp_path / "outside.arrow")
    with pytest.raises(InputError, match="leads out of"):
        read(str(folder), IDS)
    folder = saved("cut")
    (file,) = folder.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="cannot be read as a data set"):
        read(str(folder), IDS)
    folder = saved("list")
    state_of(folder, _data_files=7)
    with pytest.raises(InputError, match=r"state.json: damaged.*_data_files"):
        read(str(folder), IDS)


def test_texts_of_an_arrow_file_are_not_taken_from_elsewhere_in_memory(tmp_path: Path) -> None:
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "one")
    (file,) = (tmp_path / "one").glob("*.arrow")
    raw = bytearray(file.read_bytes())
    ends = b"\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00"  # where each text of "a", "b" ends
    at = raw.index(ends)
    raw[at + 4 : at + 12] = b"\xff\xff\xff\x7f\xff\xff\xff\x7f"
    file.write_bytes(raw)
    with pytest.raises(InputError, match="cannot be read as a data set"):
        read(str(tmp_path / "one"), IDS)


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the hub has it, which the library reads as a data set."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "shards"
    (folder / "data").mkdir(parents=True)
    for number in range(2):
        rows = {name: [one[number]] for name, one in ROWS.items()}
        (folder / "data" / f"train-0000{number}-of-00002.csv").write_text(csv_text(rows))
    return folder


def test_csv_files_of_a_data_set_are_read_as_texts(shards: Path) -> None:
    check(read(str(shards), IDS))
    for file in (shards / "data").iterdir():
        file.with_suffix(".csv.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    check(read(str(shards), IDS))
    part = read(str(shards), IDS, split="train[1:]", classes=["neg", "pos"])
    assert part.keys == ["7"]
    file = shards / "data" / "train-00001-of-00002.csv.gz"
    file.write_bytes(gzip.compress(b"id,text,label\n1,a,x,more\n"))
    with pytest.raises(InputError, match=r"00001-of-00002.csv.gz: row 1 \(line 2\) has 4 fields"):
        read(str(shards), IDS)


def test_a_folder_without_data_says_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither a folder with a file such as train\.csv"):
        read(str(tmp_path), IDS)


def test_images_that_save_to_disk_wrote_are_read(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    from turnover.data.images import read_images

    rows = {
        "image": [pillow.new("RGB", (40, 40), color) for color in ("red", "blue")],
        "label": ["x", "y"],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "one")
    data = read_images(str(tmp_path / "one"), 32)
    assert data.classes == ["x", "y"]
    assert data.image(0)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_folder_is_not_taken_for_another_that_its_name_is_a_pattern_of(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data [1]"
    (folder / "train").mkdir(parents=True)
    file = folder / "train" / f"a.{ending}"
    if ending == "csv":
        file.write_text(csv_text())
    else:
        datasets.Dataset.from_dict(ROWS).to_json(str(file))
    for beside in ("data 2", "data 1"):  # none that fits the pattern, and one that does
        other = tmp_path / beside
        (other / "train").mkdir(parents=True)
        (other / "train" / file.name).write_text(file.read_text().replace("007", "9"))
        with pytest.raises(InputError, match=r"its path contains one of \[ \] \* \?.*rename it"):
            read(str(folder), IDS)
    alone = (tmp_path / "what").resolve().with_name("what?")
    folder.rename(alone)
    check(read(str(alone), IDS))
