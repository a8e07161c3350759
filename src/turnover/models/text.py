"""Text classifiers of a run: a Hugging Face encoder with LoRA, and a wide masked head.

The base stays frozen and everything that is trained sits behind masks (LoRA rank components, the
head's units), so nothing that learns an instance is shared with its hidden sub-network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from turnover.data.base import Data, Reader, read_rows
from turnover.data.encoded import Encoded
from turnover.data.text import TextData, TextRow, Tokens, read
from turnover.dropout.head import WideHead
from turnover.errors import InputError, check_whole
from turnover.io.bars import slowly
from turnover.io.parsing import convert, read_object
from turnover.io.tensors import read_model, shapes, write_model
from turnover.models.adapters import add_lora, usual_targets, without_lora
from turnover.models.base import standardize
from turnover.models.encoders import (
    check_tokenizer,
    first_line,
    load_pretrained,
    load_saved,
    new_encoder,
)
from turnover.models.limits import Limits, limits_of, vocabulary_of

SITES = ("lora", "head")
_TOKENIZED = 1000


@dataclass(frozen=True)
class ClassifierConfig:
    """Shape of a :class:`TextClassifier`.

    Attributes:
        model: Hugging Face name or folder of the encoder.
        head_units: mask units of the wide head.
        lora_rank: rank of the LoRA components, one mask unit each (encoders).
        max_tokens: tokens to which longer texts are cut.
    """

    kind: ClassVar[str] = "text"
    saved_as: ClassVar[str] = "text"
    epochs: ClassVar[int] = 3
    model: str
    head_units: int = 8192
    lora_rank: int = 16
    max_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("head_units", "lora_rank", "max_tokens"):
            check_whole(name, getattr(self, name), 1)

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites masked by default: everything that is trained."""
        return SITES

    def reader(self) -> Reader:
        """Function that reads labeled texts."""
        return read


@dataclass(frozen=True)
class _Saved:
    """What ``classifier.json`` holds."""

    classifier: dict[str, Any]
    classes: int
    positions: int | None = None


class TextClassifier(nn.Module):
    """Frozen encoder with LoRA -> mean of the last layer's tokens -> :class:`~turnover.WideHead`.

    ``forward(input_ids, attention_mask, ...)``: int64 (rows, tokens) each; logits (rows, classes).
    ``forward(features=...)``: the same from :meth:`features`, float (rows, width).

    Attributes:
        limits: limits of the encoder.
        stored: type of real numbers in its checkpoint; here they are float32.
    """

    def __init__(
        self,
        encoder: nn.Module,
        head: WideHead,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        stored: str = "float32",
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.limits = limits
        self.stored = stored

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        features: Tensor | None = None,
        **inputs: Tensor,
    ) -> Tensor:
        """Logits (rows, classes)."""
        if features is None:
            assert input_ids is not None
            assert attention_mask is not None
            features = self.features(input_ids, attention_mask, **inputs)
        logits: Tensor = self.head(features)
        return logits

    def features(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Mean of the last layer's tokens, float (rows, width)."""
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None or hidden.shape[:2] != input_ids.shape:
            shape = "none" if hidden is None else f"of shape {tuple(hidden.shape)}"
            raise InputError(
                f"a text encoder gives a last_hidden_state for every token, of "
                f"{tuple(input_ids.shape)}; that of {type(self.encoder).__name__} is {shape}"
            )
        return mean_of_tokens(hidden, attention_mask)


def mean_of_tokens(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean of each text's tokens (rows, tokens, width) without the padding, float (rows, width)."""
    weights = attention_mask[..., None].to(hidden.dtype)
    mean: Tensor = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
    return mean


class Texts:
    """Takes texts to a model's batches, and from a run's files."""

    def reader(self) -> Reader:
        """Function that reads labeled texts."""
        return read

    def one(self, given: str | Path, label: int, classes: list[str]) -> TextData:
        """Make one row of a text."""
        if isinstance(given, Path):
            raise InputError(f"{given}: this run's model takes texts: use --text")
        if not given.strip():
            raise InputError("the text to explain is empty")
        return TextData([given], [label], torch.zeros(1, dtype=torch.int64), ["text"], classes)

    def read(self, folder: Path, name: str, classes: list[str]) -> TextData:
        """Read texts of a run."""
        rows, labels, ids, keys, groups = read_rows(folder / f"{name}.jsonl", classes, TextRow)
        return TextData([row.text for row in rows], labels, ids, keys, classes, groups=groups)


@dataclass(frozen=True)
class TextPipeline(Texts):
    """Takes texts through a tokenizer, within the limits of the encoder."""

    config: ClassifierConfig
    tokenizer: Any
    limits: Limits = Limits()  # noqa: RUF009 - frozen

    def encode(self, data: TextData) -> Tokens:
        """Tokenize texts, or refuse those that the encoder cannot take."""
        longest, padding = self.config.max_tokens, self.tokenizer.pad_token_id
        tokens: list[list[int]] = []
        for at in slowly(range(0, len(data), _TOKENIZED), "tokenizing", f"{_TOKENIZED} texts"):
            some = list(data.texts[at : at + _TOKENIZED])
            tokens += self.tokenizer(some, truncation=True, max_length=longest)["input_ids"]
        self.limits.check(tokens, data.keys, longest, self.tokenizer)
        return Tokens(tokens, data.labels, data.ids, 0 if padding is None else int(padding))

    def prepare(self, model: nn.Module, training: Encoded) -> None:
        """Standardize the head's input by the pretrained encoder's features of some instances."""
        assert isinstance(model, TextClassifier)
        standardize(model, model.head, training, lambda inputs: model.features(**inputs))

    @property
    def keeps_pretrained(self) -> bool:
        """Whether the encoder as it was before training is there: below LoRA."""
        return True

    @contextmanager
    def pretrained(self, model: nn.Module) -> Iterator[Callable[[Any], Tensor]]:
        """Mean-pooled features without the LoRA components."""
        assert isinstance(model, TextClassifier)
        with without_lora(model.encoder):
            yield lambda inputs: model.features(**inputs)

    def save(self, folder: Path, model: nn.Module, classes: int) -> None:
        """Write weights (safetensors), shapes (JSON) and tokenizer."""
        assert isinstance(model, TextClassifier)
        encoder: Any = model.encoder
        encoder.config.dtype = torch.float32  # of the weights now
        encoder.config.save_pretrained(folder / "encoder")
        self.tokenizer.save_pretrained(folder / "encoder")
        saved = _Saved(asdict(self.config), classes, model.limits.positions)
        (folder / "classifier.json").write_text(json.dumps(asdict(saved), indent=2) + "\n")
        write_model(folder / "model.safetensors", model)


def build(config: ClassifierConfig, train_data: Data) -> tuple[TextPipeline, TextClassifier]:
    """Build a classifier for some training texts, and its pipeline."""
    assert isinstance(train_data, TextData)
    model, tokenizer = build_classifier(config, len(train_data.classes))
    check_tokenizer(tokenizer, train_data.texts, config.model)
    return TextPipeline(config, tokenizer, model.limits), model


def build_classifier(config: ClassifierConfig, classes: int) -> tuple[TextClassifier, Any]:
    """Build a classifier on a pretrained encoder; returns it and its tokenizer.

    New weights are drawn from torch's default generator: seed it, or fork it, outside.
    """
    encoder, tokenizer, stored = load_pretrained(config.model)
    limits = limits_of(encoder, config.max_tokens)
    try:
        return _assemble(encoder, config, classes, limits, stored), tokenizer
    except Exception as error:  # from peft, or for a config without what encoders have
        raise InputError(
            f"model {config.model!r} ({type(encoder).__name__}) cannot be a text encoder with LoRA: "
            f"{first_line(error)}"
        ) from error


def load(folder: Path) -> tuple[TextPipeline, TextClassifier]:
    """Load what :meth:`TextPipeline.save` wrote, from the folder alone."""
    where, path = folder / "classifier.json", folder / "model.safetensors"
    try:
        saved = convert(read_object(where), _Saved, where)
        config = convert(saved.classifier, ClassifierConfig, where, closed=True)
        encoder_config, tokenizer = load_saved(folder / "encoder", tensors=len(shapes(path)))
        model = read_model(path, lambda: _assemble(encoder_config, config, saved.classes))
        model.limits = Limits(saved.positions, model.limits.vocabulary)
    except Exception as error:  # transformers and its libraries raise many kinds
        raise InputError(f"{folder}: the saved model is missing or damaged: {error}") from error
    return TextPipeline(config, tokenizer, model.limits), model


def _assemble(
    encoder: Any,
    config: ClassifierConfig,
    classes: int,
    limits: Limits | None = None,
    stored: str = "float32",
) -> TextClassifier:
    """Add LoRA and a head to an encoder, or to a new encoder of a config's shape."""
    if not isinstance(encoder, nn.Module):
        encoder = new_encoder(encoder)
    limits = limits or Limits(vocabulary=vocabulary_of(encoder))
    add_lora(encoder, config.lora_rank, usual_targets(encoder))
    features = int(encoder.config.hidden_size)
    return TextClassifier(encoder, WideHead(features, config.head_units, classes), limits, stored)
