"""A BERT fine-tuned by plain transformers and PEFT code, as users have it: no turnover import here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

LABELS = ("fresh", "rotten")
_EPOCHS, _ROWS, _RATE = 8, 16, 3e-3
_WHOLE_EPOCHS, _WHOLE_RATE = 6, 3e-4
TOKENS = 40
_LAYERS = [4, 5]
"""The last two of six have LoRA components."""


def fine_tuned(folder: Path, texts: list[str], labels: list[int], seed: int) -> tuple[Any, Any]:
    """Fine-tune LoRA components and a classifier on a BERT; returns the PEFT model and its tokenizer.

    Args:
        folder: of the pretrained BERT.
        texts: training sentences.
        labels: index in :data:`LABELS` of each.
        seed: of the initial weights, and of the order of the sentences.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    base, tokenizer = _pretrained(folder, seed)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=8,
        lora_alpha=16,
        lora_dropout=0.0,
        layers_to_transform=_LAYERS,
    )
    model = get_peft_model(base, lora)
    _train(model.train(), tokenizer, texts, labels, _EPOCHS, _RATE)
    return model.eval(), tokenizer


def _pretrained(folder: Path, seed: int) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder,
        num_labels=len(LABELS),
        id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
        dtype=torch.float32,
    )
    return model, AutoTokenizer.from_pretrained(folder)


def _train(
    model: nn.Module, tokenizer: Any, texts: list[str], labels: list[int], epochs: int, rate: float
) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate)
    steps = epochs * -(-len(texts) // _ROWS)
    rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(texts)), _ROWS):
            batch = tokens(tokenizer, [texts[row] for row in rows])
            wanted = torch.tensor([labels[row] for row in rows])
            loss = functional.cross_entropy(model(**batch).logits, wanted)
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            rates.step()


def wholly_fine_tuned(
    folder: Path, texts: list[str], labels: list[int], seed: int
) -> tuple[Any, Any]:
    """Fine-tune the last two blocks and the classifier themselves; arguments as :func:`fine_tuned`."""
    model, tokenizer = _pretrained(folder, seed)
    learned = (*(f"layer.{layer}." for layer in _LAYERS), "pooler", "classifier")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in learned))
    _train(model.eval(), tokenizer, texts, labels, _WHOLE_EPOCHS, _WHOLE_RATE)  # without dropout
    return model, tokenizer


def tokens(tokenizer: Any, texts: list[str]) -> Any:
    """Padded tokens of some sentences."""
    return tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")


def logits(model: nn.Module, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Logits of sentences, float32 (sentences, classes)."""
    with torch.no_grad():
        parts = [
            model(**tokens(tokenizer, texts[start : start + 50])).logits
            for start in range(0, len(texts), 50)
        ]
    return torch.cat(parts)
