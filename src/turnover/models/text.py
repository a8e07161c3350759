"""Texts of a run: through a tokenizer, and back to files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turnover.data.base import Data, Reader, write
from turnover.data.encoded import Encoded, Tokens
from turnover.data.jsonl import read_rows, write_rows
from turnover.data.text import TextData, read
from turnover.errors import InputError
from turnover.models import text_classifier
from turnover.models.base import standardize
from turnover.models.encoders import Limits, check_tokenizer
from turnover.models.text_classifier import ClassifierConfig, TextClassifier


@dataclass(frozen=True)
class TextPipeline:
    """Texts through a tokenizer, as far as the encoder can take them."""

    config: ClassifierConfig
    tokenizer: Any
    limits: Limits = field(default_factory=Limits)

    def reader(self) -> Reader:
        """Function that reads labeled texts."""
        return read

    def encode(self, data: TextData) -> Tokens:
        """Tokenised texts.

        Raises:
            InputError: a text without tokens, or one that the encoder cannot take.
        """
        padding = self.tokenizer.pad_token_id
        tokens = text_classifier.tokenize(self.tokenizer, data.texts, self.config.max_tokens)
        self.limits.check(tokens, data.keys, self.config.max_tokens, self.tokenizer)
        return Tokens(tokens, data.labels, data.ids, 0 if padding is None else int(padding))

    def prepare(self, model: nn.Module, training: Encoded) -> None:
        """Standardise the head's input on the pretrained encoder's features of some instances."""
        assert isinstance(model, TextClassifier)
        standardize(model, model.head, training, lambda inputs: model.features(**inputs))

    @contextmanager
    def pretrained(self, model: nn.Module) -> Iterator[Callable[[Any], Tensor]]:
        """Mean-pooled features without the LoRA components."""
        assert isinstance(model, TextClassifier)
        with text_classifier.without_lora(model):
            yield lambda inputs: model.features(**inputs)

    def save(self, folder: Path, model: nn.Module, classes: int) -> None:
        """Weights (safetensors), shapes (JSON) and tokenizer."""
        assert isinstance(model, TextClassifier)
        text_classifier.save(folder, model, self.tokenizer, self.config, classes)

    def one(self, given: str | Path, label: int, classes: list[str]) -> TextData:
        """A text as data of one row."""
        if isinstance(given, Path):
            raise InputError(f"{given}: this run's model takes texts: use --text")
        if not given.strip():
            raise InputError("the text to explain is empty")
        return TextData([given], [label], torch.zeros(1, dtype=torch.int64), ["text"], classes)

    def export(self, data: TextData, out: Path) -> None:
        """Key, text and label as a table."""
        write(data, out)

    def write(self, folder: Path, name: str, data: TextData) -> None:
        """JSON lines with key, id, label and text."""
        write_rows(folder / f"{name}.jsonl", data, "text")

    def read(self, folder: Path, name: str, classes: list[str]) -> TextData:
        """Texts of a run."""
        labels, ids, keys, texts = read_rows(folder / f"{name}.jsonl", classes, "text")
        return TextData(texts, labels, ids, keys, classes)


def build(config: ClassifierConfig, train_data: Data) -> tuple[TextPipeline, nn.Module]:
    """Build a text classifier on a pretrained encoder, and its pipeline."""
    assert isinstance(train_data, TextData)
    model, tokenizer = text_classifier.build(config, len(train_data.classes))
    check_tokenizer(tokenizer, train_data.texts, config.model)
    return TextPipeline(config, tokenizer, model.limits), model


def load(folder: Path) -> tuple[TextPipeline, nn.Module]:
    """Load what :meth:`TextPipeline.save` wrote."""
    model, tokenizer, config = text_classifier.load(folder)
    return TextPipeline(config, tokenizer, model.limits), model
