"""Classifiers as their users train them, by plain transformers, PEFT and torch code in a process of its own.

python plain.py bert|adapter BASE TRAIN_CSV OUT
python plain.py vit TRAIN_NPZ OUT
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

LABELS = ("fresh", "rotten")
ROWS = 16


def fit(
    call: Callable[[Any], torch.Tensor], model: Any, labels: Any, epochs: int, rate: float
) -> None:
    """Train what requires a gradient; ``call`` takes rows to their logits."""
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate)
    targets = torch.as_tensor(labels)
    steps = epochs * -(-len(targets) // ROWS)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(targets)), ROWS):
            functional.cross_entropy(call(rows), targets[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
    model.eval()


def texts(kind: str, base: str, train: str, out: str) -> None:
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with Path(train).open(encoding="utf-8", newline="") as file:
        data = list(csv.DictReader(file))
    labels = [LABELS.index(one["label"]) for one in data]
    tokenizer = AutoTokenizer.from_pretrained(base)
    named = {"id2label": dict(enumerate(LABELS)), "label2id": {"fresh": 0, "rotten": 1}}
    options: dict[str, Any] = named if kind == "bert" else {"num_labels": 2}
    model = AutoModelForSequenceClassification.from_pretrained(base, **options)
    if kind == "bert":
        model.get_input_embeddings().requires_grad_(False)
    else:
        lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, layers_to_transform=[4, 5])
        model = get_peft_model(model, lora)

    def call(rows: torch.Tensor) -> torch.Tensor:
        some = [data[row]["text"] for row in rows]
        return model(**tokenizer(some, padding=True, return_tensors="pt")).logits

    epochs, rate = (2, 3e-4) if kind == "bert" else (4, 5e-3)
    fit(call, model, labels, epochs, rate)
    model.save_pretrained(out)
    if kind == "bert":
        tokenizer.save_pretrained(out)


def images(train: str, out: str) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    with np.load(train) as data:
        pixels, labels = data["image"], data["label"]
    processor = ViTImageProcessor(size={"height": 28, "width": 28})
    config = ViTConfig(
        image_size=28,
        patch_size=14,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    inputs = processor(images=list(pixels), return_tensors="pt")["pixel_values"]
    fit(lambda rows: model(inputs[rows]).logits, model, labels, epochs=20, rate=1e-3)
    model.save_pretrained(out)
    processor.save_pretrained(out)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if sys.argv[1] == "vit":
        images(*sys.argv[2:])
    else:
        texts(*sys.argv[1:])
