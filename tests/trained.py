"""Small classifiers that plain transformers code trained and saved: no turnover in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

import encoders

GOOD, BAD = encoders.WORDS[:5], encoders.WORDS[5:10]
NAMES = ("neg", "pos")


def rows(count: int, seed: int) -> list[tuple[str, int]]:
    """Texts whose class is mostly that of their first word; some are the other way round."""
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    found = []
    for _ in range(count):
        label = draw(2)
        words = [(BAD, GOOD)[label][draw(5)], *(encoders.WORDS[draw(15)] for _ in range(draw(8)))]
        found.append((" ".join(words), label if draw(8) else 1 - label))
    return found


def write(path: Path, data: list[tuple[str, int]], names: Any = NAMES, **columns: Any) -> Path:
    """A CSV file with the columns id, text and label, and further ones."""
    header = ",".join(["id", "text", "label", *columns])
    lines = [
        ",".join([f"r{row}", text, str(names[label]), *(str(one[row]) for one in columns.values())])
        for row, (text, label) in enumerate(data)
    ]
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def texts(
    folder: Path,
    data: list[tuple[str, int]],
    kind: str = "bert",
    side: str = "right",
    **changes: Any,
) -> Path:
    """A classifier of texts, trained on some and saved with its tokenizer, which pads at a side."""
    import transformers

    shape = encoders.SHAPE | {"num_labels": 2, "id2label": dict(enumerate(NAMES))} | changes
    config = transformers.AutoConfig.for_model(kind, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        train(model, encoders.tokenizer(padding_side=side), data)
    model.save_pretrained(folder)
    encoders.tokenizer(padding_side=side).save_pretrained(folder)
    return folder


def desk() -> None:
    """The files that the guides name, in the current folder: a model, and what it was trained on."""
    data = rows(60, 0)
    texts(Path("my-bert"), data)
    write(Path("train.csv"), data)
    write(Path("test.csv"), rows(20, 1))


def train(model: Any, tokenizer: Any, data: list[tuple[str, int]], steps: int = 60) -> None:
    batch = tokenizer([text for text, _ in data], padding=True, return_tensors="pt")
    labels = torch.tensor([label for _, label in data])
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-3)
    model.train()
    for _ in range(steps):
        functional.cross_entropy(model(**batch).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def adapter(folder: Path, base: Path, data: list[tuple[str, int]]) -> Path:
    """LoRA and a classifier on a base, trained by PEFT; saved without the base."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(1)
        whole = AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=2, ignore_mismatched_sizes=True
        )
        model = get_peft_model(whole, LoraConfig(task_type=TaskType.SEQ_CLS, r=4))
        train(model, encoders.tokenizer(), data)
    model.save_pretrained(folder)
    return folder


def images(folder: Path, pixels: Any, labels: Any, *, classes: int = 3, steps: int = 30) -> Path:
    """A ViT, trained on images uint8 (rows, 16, 16, 3) and saved with its image processor."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_labels=classes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(config)
    inputs = processor(images=list(pixels), return_tensors="pt")["pixel_values"]
    targets = torch.as_tensor(labels)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model.train()
    for _ in range(steps):
        functional.cross_entropy(model(inputs).logits, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
