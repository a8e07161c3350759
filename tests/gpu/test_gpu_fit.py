"""``turnover fit`` on the GPU: its training loop, and whole fits where the packages for files are there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import turnover
from problems import CPU
from turnover.data.encoded import Encoded
from turnover.data.images import ImageData, Pixels
from turnover.data.text import TextData, Tokens
from turnover.models.image import ImageClassifierConfig
from turnover.models.text import ClassifierConfig, TextClassifier
from turnover.models.vgg import SITES, VGG
from turnover.runs.run import Run
from turnover.tasks.fit import FitConfig, fit
from turnover.tasks.training import TrainingConfig, evaluate, train, under_masks

pytest.importorskip("safetensors")

ROWS = 48
IDS = torch.arange(ROWS) * 3
LABELS = [row % 3 for row in range(ROWS)]


def bert() -> tuple[nn.Module, list[str], Encoded]:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from peft import LoraConfig, inject_adapter_in_model

    encoder = tiny_bert().requires_grad_(False)
    lora = LoraConfig(r=4, target_modules=["query", "value"], lora_dropout=0.0)
    inject_adapter_in_model(lora, encoder)
    model = TextClassifier(encoder, turnover.WideHead(32, 64, 3))
    tokens = [[2, *(4 + label * 5 + i % 5 for i in range(3 + label)), 3] for label in LABELS]
    return model, ["lora", "head"], Tokens(tokens, LABELS, IDS, 0)


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    encoders = pytest.importorskip("encoders")
    without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertModel(BertConfig(**encoders.SHAPE, **without))


def pixels() -> np.ndarray:
    """Images of three colors."""
    colors = np.eye(3)[LABELS][:, None, None] * 150
    noise = np.random.default_rng(0).integers(0, 100, (ROWS, 32, 32, 3))
    return (colors + noise).astype(np.uint8)


def vgg() -> tuple[nn.Module, list[str], Encoded]:
    model = VGG(11, 3, size=32, width=4, hidden=32)
    standard = (0.4,) * 3, (0.2,) * 3
    return model, list(SITES), Pixels(pixels(), list(range(ROWS)), LABELS, IDS, *standard, True)


@pytest.mark.parametrize("make", [bert, vgg])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_training(device, make, bfloat16, tmp_path):
    """Batches made ahead in pinned memory, and losses that fall as the CPU's do."""

    def losses(device):
        torch.manual_seed(0)
        model, sites, data = make()
        network = turnover.attach(model.to(device), sites)

        def loss():
            bind = under_masks(network, data, None, hidden=False)
            return evaluate(model, data, range(ROWS), bind).loss

        before, out = loss(), tmp_path / device.type
        config = TrainingConfig(4, 8, 2e-3, 5e-3)
        train(
            model,
            data,
            config,
            network.exposed,
            name="x",
            checkpoint=out,
            identity="",
            bfloat16=bfloat16,
        )
        return before, loss()

    (start, end), (before, after) = losses(CPU), losses(device)
    torch.testing.assert_close(before, start, rtol=1e-4, atol=1e-5)
    assert after.mean() < 0.9 * before.mean()
    assert abs(after.mean() - end.mean()) < (0.1 if bfloat16 else 0.02) * before.mean()


def check_fit(config, training, test, out, device):
    pytest.importorskip(
        "msgspec", reason="fit loads what it saves by msgspec, which is not installed"
    )
    metrics = fit(config, training, test, out, device=str(device))
    assert metrics["device"] == str(device)
    assert metrics["loss"]["train_exposed"] < metrics["curves"]["losses"]["train_exposed"][0][0]
    loss = []
    for one in (CPU, device):
        run = Run.load(out, device=one)
        encoded = run.encode(run.test)
        found = evaluate(
            run.model, encoded, range(len(encoded)), lambda _, run=run: run.network.mean()
        )
        loss.append(found.loss)
    torch.testing.assert_close(loss[1], loss[0], rtol=1e-3, atol=1e-4)


def texts(start: int) -> TextData:
    encoders = pytest.importorskip("encoders")
    words = [
        " ".join(encoders.WORDS[label * 5 + i % 5] for i in range(3 + label)) for label in LABELS
    ]
    keys = [str(row) for row in range(ROWS)]
    return TextData(words, LABELS, IDS + start, keys, ["a", "b", "c"])


def test_fit_of_a_bert(device, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    encoders = pytest.importorskip("encoders")
    encoders.folder(tiny_bert(), tmp_path / "encoder")
    classifier = ClassifierConfig(str(tmp_path / "encoder"), 64, 4, 16)
    config = FitConfig(classifier, TrainingConfig(3, 8, 2e-3, 5e-3), compare=False)
    check_fit(config, texts(0), texts(1000), tmp_path / "run", device)


def test_fit_of_a_vgg(device, tmp_path):
    def data(start):
        names = [str(row) for row in range(ROWS)]
        rows = list(range(ROWS))
        return ImageData(pixels(), rows, names, LABELS, IDS + start, names, ["r", "g", "b"])

    classifier = ImageClassifierConfig(width=4, hidden=32)
    config = FitConfig(classifier, TrainingConfig(3, 8, 2e-3, 5e-3), compare=False)
    check_fit(config, data(0), data(1000), tmp_path / "run", device)
