"""The paper's claim on a real BERT and real sentences, small; and a control that must fail it."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from turnover import Influence, InputError, MaskSpec, Network, attach, ghost_ids
from turnover.data.base import Columns
from turnover.data.demo import model_folder, write_sentences
from turnover.data.encoded import Encoded
from turnover.data.text import TextData, read
from turnover.models.pipeline import build
from turnover.models.text import ClassifierConfig
from turnover.tasks.training import TrainingConfig, evaluate, train, under_masks

pytestmark = pytest.mark.slow

TRAIN, TEST = 320, 400


@dataclass(frozen=True)
class Fitted:
    network: Network
    model: torch.nn.Module
    training: Encoded
    test: Encoded

    def loss(self, which: str, *, hidden: bool) -> tuple[float, float]:
        data = self.training if which == "train" else self.test
        ids = None if which == "train" else ghost_ids(len(data), start=10**6)
        bind = under_masks(self.network, data, ids, hidden=hidden)
        return evaluate(self.model, data, range(len(data)), bind).mean()

    def claim_holds(self) -> bool:
        """Exposed learned far more than hidden, and hidden no more than unseen data shows."""
        exposed, hidden = (self.loss("train", hidden=h)[0] for h in (False, True))
        test, half_width = self.loss("test", hidden=True)
        return exposed <= 0.7 * hidden and hidden >= test - half_width


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextData, TextData]:
    try:
        model_folder()
        train_file, test_file = write_sentences(tmp_path_factory.mktemp("sentences"))
    except InputError as error:
        pytest.skip(str(error))
    data = read(str(train_file), Columns(id="id"))
    test = read(str(test_file), Columns(id="id"), classes=data.classes)
    return first_rows(data, TRAIN), first_rows(test, TEST)


def first_rows(data: TextData, count: int) -> TextData:
    return data.take(range(count))


def fitted(
    sentences: tuple[TextData, TextData], folder: Path, sites: list[str], leaky: bool
) -> Fitted:
    torch.manual_seed(0)
    config = ClassifierConfig(str(model_folder()), head_units=4096, lora_rank=8, max_tokens=32)
    pipeline, model = build(config, sentences[0])
    training, test = (pipeline.encode(data) for data in sentences)
    pipeline.prepare(model, training)
    network = attach(model, sites, MaskSpec(seed=1))
    report = network.audit(training.batch(range(8)))
    assert report.clean is not leaky
    train(
        model,
        training,
        TrainingConfig(epochs=5, learning_rate=1e-3, head_learning_rate=2e-4),
        network.exposed,
        name="test",
        checkpoint=folder / "checkpoint",
        identity="test",
    )
    return Fitted(network, model, training, test)


@pytest.fixture(scope="module")
def clean(sentences: tuple[TextData, TextData], tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return fitted(sentences, tmp_path_factory.mktemp("clean"), ["lora", "head"], leaky=False)


def test_hidden_networks_of_a_real_bert_did_not_learn_their_instances(clean: Fitted) -> None:
    assert clean.claim_holds()


@pytest.mark.long
def test_a_leaky_control_fails_the_claim(
    sentences: tuple[TextData, TextData], tmp_path: Path
) -> None:
    # Masks on the LoRA ranks alone: the head is shared, and learns every instance for both sides.
    control = fitted(sentences, tmp_path, ["lora"], leaky=True)
    assert not control.claim_holds()


def test_ghosts_are_not_significant_more_often_than_chance(clean: Fitted) -> None:
    influence = Influence(clean.network, ghosts=2000)
    batches = [clean.test.batch(rows) for rows in clean.test.chunks(range(96), 32)]
    result = influence.estimate(batches, ghost_ids(3000, start=2000))
    assert 0.005 <= (result.p < 0.01).mean() <= 0.02


def test_self_influence_stands_out_and_is_helpful(clean: Fitted) -> None:
    batches = [clean.training.batch(rows) for rows in clean.training.chunks(range(TRAIN), 32)]
    result = Influence(clean.network, sites=["head.*"]).self_influence(batches)
    assert (result.scores > 0).mean() > 0.8
    assert (result.q <= 0.05).mean() > 0.2


def test_linear_scores_rank_like_exact_ones(clean: Fitted) -> None:
    from scipy.stats import spearmanr

    target = [clean.test.batch([0])]
    ids = clean.training.ids[:100]
    linear = Influence(clean.network, ghosts=100).estimate(target, ids)
    exact = Influence(clean.network, method="exact", ghosts=10).estimate(target, ids)
    assert spearmanr(linear.scores[0], exact.scores[0]).statistic > 0.9


def test_the_demo_data_are_distinct_sentences(
    sentences: tuple[TextData, TextData], tmp_path: Path
) -> None:
    train_file, test_file = write_sentences(tmp_path)
    rows = [list(csv.DictReader(path.open(encoding="utf-8"))) for path in (train_file, test_file)]
    assert [len(part) for part in rows] == [3000, 2200]
    texts = [row["text"] for part in rows for row in part]
    assert len(set(texts)) == len(texts)
    assert {row["label"] for part in rows for row in part} == {"fresh", "rotten"}
