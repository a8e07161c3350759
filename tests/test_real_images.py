"""The whole way on real images: handwritten digits, some of them wrongly labelled."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

pytest.importorskip("PIL")
pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("sklearn")

from safetensors.torch import save_file
from sklearn.datasets import load_digits

from test_cli import turnover
from turnover.data.images import read_images
from turnover.models.image import ImageClassifierConfig
from turnover.models.pipeline import build
from turnover.models.vgg import VGG
from turnover.runs.run import Run

pytestmark = pytest.mark.slow

OTHERS, TRAIN, TEST, WRONG = 800, 400, 300, 32
WIDTH = 8


def pretrained(path: Path, images: Path) -> None:
    """Weights of a VGG after other digits than those whose influence is asked for."""
    data = read_images(str(images), 32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline, model = build(ImageClassifierConfig(width=WIDTH, hidden=64), data)
    assert isinstance(model, VGG)
    encoded = pipeline.encode(data)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for rows in encoded.shuffled(40, generator):
            batch = encoded.batch(rows)
            loss = functional.cross_entropy(model(batch.inputs), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    save_file(model.state_dict(), path)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    folder = tmp_path_factory.mktemp("digits")
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels.reshape(-1, 8, 8) * 15.9).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(labels))
    given, wrong = labels.copy(), order[OTHERS : OTHERS + WRONG]
    given[wrong] = (given[wrong] + 3) % 10
    start = 0
    for name, count in (("others", OTHERS), ("train", TRAIN), ("test", TEST)):
        rows = order[start : start + count]
        np.savez(folder / f"{name}.npz", image=pixels[rows], label=given[rows], id=rows)
        start += count
    pretrained(folder / "weights.safetensors", folder / "others.npz")
    turnover(
        *("fit", folder / "train.npz", "--test", folder / "test.npz", "--id-column", "id"),
        *("--model", "vgg11", "--width", WIDTH, "--weights", folder / "weights.safetensors"),
        *(
            "--no-augment",
            "--head-units",
            4096,
            "--head-learning-rate",
            1e-3,
            "--epochs",
            20,
            "--no-compare",
        ),
        *("--out", folder / "run"),
    )
    return folder / "run", {str(row) for row in wrong}


def test_hidden_networks_did_not_learn_their_images(fitted: tuple[Path, set[str]]) -> None:
    metrics = json.loads((fitted[0] / "metrics.json").read_text())
    assert metrics["audit"]["clean"] and metrics["hidden_did_not_learn"]
    assert metrics["exposed_over_hidden"] < 0.6
    assert metrics["accuracy"]["turnover"] > 0.75


def test_wrong_labels_of_real_images_are_listed_first(
    fitted: tuple[Path, set[str]], tmp_path: Path
) -> None:
    run, wrong = fitted
    turnover("influence", run, "--ghosts", 1000)
    turnover("review", run, "--budget", WRONG, "--out", tmp_path / "review.csv")
    with (tmp_path / "review.csv").open(newline="") as file:
        listed = [line["key"] for line in csv.DictReader(file)]
    assert len(wrong & set(listed)) > 0.7 * WRONG  # at random some 3 of 32
    own = Run.load(run).read_result("self")
    highest = own.train_ids[np.argsort(-own.scores)[:WRONG]]
    assert len(wrong & {str(one) for one in highest}) > 0.6 * WRONG
