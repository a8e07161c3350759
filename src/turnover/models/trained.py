"""Classifiers that were trained elsewhere: how texts and images reach them, and their files in a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from turnover.data.base import Data, read_rows
from turnover.data.decoding import Ranges
from turnover.data.encoded import Encoded
from turnover.data.text import PairData, PairRow, TextData, Tokens
from turnover.errors import InputError, check_whole
from turnover.io.parsing import convert, read_object
from turnover.io.tensors import read_model, shapes, write_model
from turnover.models.classifiers import (
    ADAPTER,
    Classifier,
    adapter_settings,
    choose_layers,
    new_classifier,
    set_layers,
)
from turnover.models.encoders import check_tokenizer, load_config, load_tokenizer
from turnover.models.limits import Limits, limits_of
from turnover.models.processors import ProcessedImages, Processor, load_processor
from turnover.models.text import Texts, mean_of_tokens
from turnover.models.vision import pooled
from turnover.objectives import logits_of

_MOST_TOKENS = 512
"""Tokens to which longer texts are cut, where the model takes no fewer."""


@dataclass(frozen=True)
class TrainedConfig:
    """A model that was trained elsewhere.

    Attributes:
        model: Hugging Face name or folder.
        kind: ``"text"`` or ``"image"``.
        layers: names of the parameters whose gradients explain its predictions.
        max_tokens: tokens to which longer texts are cut.
        pairs: whether its texts are pairs.
    """

    saved_as: ClassVar[str] = "trained"
    augment: ClassVar[bool] = False
    model: str
    kind: Literal["text", "image"]
    layers: tuple[str, ...]
    max_tokens: int = _MOST_TOKENS
    pairs: bool = False

    def __post_init__(self) -> None:
        check_whole("max_tokens", self.max_tokens, 1)


@dataclass(frozen=True)
class _Saved:
    """What ``classifier.json`` holds."""

    classifier: dict[str, Any]
    classes: int
    positions: int | None = None
    processor: Processor | None = None
    ranges: dict[Literal["integers", "floats"], tuple[float, float]] = field(default_factory=dict)


class _Files:
    """Files of a trained model in a run."""

    config: TrainedConfig
    adapter: Any

    @property
    def keeps_pretrained(self) -> bool:
        """Whether the encoder as it was before training is there: below an adapter."""
        return self.adapter is not None

    def prepare(self, model: nn.Module, training: Encoded) -> None:
        """Nothing: it is trained."""

    @contextmanager
    def pretrained(self, model: nn.Module) -> Iterator[Callable[[Any], Tensor]]:
        """Hidden states under the classifier, without the adapter if it has one: its mean over places."""
        whole: Any = model
        base = whole.get_base_model() if self.adapter is not None else whole
        encoder = getattr(base, base.base_model_prefix, None)
        if not isinstance(encoder, nn.Module):
            raise InputError(
                f"model {self.config.model!r} ({type(base).__name__}) has no encoder under its classifier, "
                f"whose features are needed here"
            )

        def features(inputs: Any) -> Tensor:
            if self.config.kind == "image":
                return pooled(encoder, inputs)
            hidden: Tensor = encoder(**inputs).last_hidden_state
            return mean_of_tokens(hidden, inputs["attention_mask"])

        if self.adapter is None:
            yield features
        else:
            with whole.disable_adapter():
                yield features

    def _save(self, folder: Path, model: nn.Module, saved: _Saved) -> None:
        whole: Any = model
        base = whole.get_base_model() if self.adapter is not None else whole
        base.config.dtype = torch.float32  # of the weights now
        base.config.save_pretrained(folder / "encoder")
        if self.adapter is not None:
            self.adapter.save_pretrained(folder / "encoder")
        values = {"kind": self.config.saved_as, **asdict(saved)}
        (folder / "classifier.json").write_text(json.dumps(values, indent=2) + "\n")
        write_model(folder / "model.safetensors", model)


@dataclass(frozen=True)
class TrainedTexts(_Files, Texts):
    """Takes texts, or pairs of texts, through the model's own tokenizer."""

    config: TrainedConfig
    tokenizer: Any
    limits: Limits = Limits()  # noqa: RUF009 - frozen
    adapter: Any = None

    def encode(self, data: TextData) -> Tokens:
        """Tokenize texts, or refuse those that the model cannot take."""
        longest, tokenizer = self.config.max_tokens, self.tokenizer
        if self.config.pairs != isinstance(data, PairData):
            wanted = "pairs of texts: name the column of the second ones (--second-column)"
            raise InputError(
                f"the model takes {wanted if self.config.pairs else 'single texts, not pairs'}"
            )
        encoded = tokenizer(*_columns(data), truncation=True, max_length=longest)
        tokens = list(encoded["input_ids"])
        self.limits.check(tokens, data.keys, longest, tokenizer)
        more = {
            name: (list(values), _padding_of(tokenizer, name))
            for name, values in encoded.items()
            if name not in ("input_ids", "attention_mask")
        }
        padding = tokenizer.pad_token_id
        left = tokenizer.padding_side == "left"
        return Tokens(tokens, data.labels, data.ids, int(padding or 0), more, left)

    def cut(self, data: TextData, encoded: Tokens) -> int:
        """Number of texts that have more tokens than the model is given."""
        longest = self.config.max_tokens
        full = [row for row, tokens in enumerate(encoded.tokens) if len(tokens) >= longest]
        if not full:
            return 0
        whole = self.tokenizer(*_columns(data.take(full)), verbose=False)["input_ids"]
        return sum(len(tokens) > longest for tokens in whole)

    def save(self, folder: Path, model: nn.Module, classes: int) -> None:
        """Write weights (safetensors), shapes (JSON) and tokenizer."""
        saved = _Saved(asdict(self.config), classes, self.limits.positions)
        self._save(folder, model, saved)
        self.tokenizer.save_pretrained(folder / "encoder")

    def one(self, given: str | Path, label: int, classes: list[str]) -> TextData:
        """Make one row of a text; refuse it where pairs are needed."""
        if self.config.pairs and not isinstance(given, Path):
            raise InputError("this run's model takes pairs of texts: put the pair into a test file")
        return super().one(given, label, classes)

    def read(self, folder: Path, name: str, classes: list[str]) -> TextData:
        """Read texts, or pairs of texts, of a run."""
        if not self.config.pairs:
            return super().read(folder, name, classes)
        rows, labels, ids, keys, groups = read_rows(folder / f"{name}.jsonl", classes, PairRow)
        texts, seconds = [row.text for row in rows], [row.second for row in rows]
        return PairData(texts, labels, ids, keys, classes, seconds, groups=groups)


@dataclass(frozen=True)
class TrainedImages(_Files, ProcessedImages):
    """Brings images to the model as its own image processor does."""

    config: TrainedConfig
    processor: Processor
    ranges: Ranges = field(default_factory=dict)
    adapter: Any = None

    def save(self, folder: Path, model: nn.Module, classes: int) -> None:
        """Write weights (safetensors), shapes and the image processor (JSON)."""
        saved = _Saved(
            asdict(self.config), classes, processor=self.processor, ranges=cast(Any, self.ranges)
        )
        self._save(folder, model, saved)


def pipeline_of(
    classifier: Classifier, source: str, data: Data, layers: str, max_tokens: int | None
) -> TrainedTexts | TrainedImages:
    """Choose the layers of a classifier, and make the pipeline that takes some data to it.

    Args:
        classifier: is changed (:func:`~turnover.models.classifiers.choose_layers`).
        source: its folder or name.
        data: training data.
        layers: as for :func:`~turnover.models.classifiers.choose_layers`.
        max_tokens: ``None``: as many as model and tokenizer take, up to 512.

    Raises:
        InputError: no such layers, or a tokenizer or image processor that cannot be used.
    """
    chosen = tuple(choose_layers(classifier, layers))
    if classifier.takes == "image":
        if max_tokens is not None:
            raise InputError("--max-tokens is for texts, and this model takes images")
        config = TrainedConfig(source, "image", chosen)
        processor = load_processor(classifier.base)
        ranges: Ranges = getattr(data, "ranges", {})
        return TrainedImages(config, processor, ranges, classifier.adapter)
    assert isinstance(data, TextData)
    tokenizer = load_tokenizer(classifier.base)
    check_tokenizer(tokenizer, data.texts, classifier.base)
    longest = min(max_tokens or _MOST_TOKENS, int(min(tokenizer.model_max_length, 2**31)))
    limits = limits_of(classifier.model, longest)
    if max_tokens is None and limits.positions is not None:
        longest = min(longest, limits.positions)
    pairs = isinstance(data, PairData)
    config = TrainedConfig(source, "text", chosen, longest, pairs)
    return TrainedTexts(config, tokenizer, limits, classifier.adapter)


def load(folder: Path) -> tuple[TrainedTexts | TrainedImages, nn.Module]:
    """Load what the pipelines save, from the folder alone."""
    where, path = folder / "classifier.json", folder / "model.safetensors"
    encoder = folder / "encoder"
    try:
        saved = convert(read_object(where), _Saved, where)
        config = convert(saved.classifier, TrainedConfig, where, closed=True)
        shape = load_config(encoder, tensors=len(shapes(path)))
        adapter = None
        if (encoder / ADAPTER).is_file():
            adapter = adapter_settings(read_object(encoder / ADAPTER))
        model = read_model(path, lambda: new_classifier(shape, adapter))
        set_layers(model, list(config.layers))
        if config.kind == "image":
            if saved.processor is None:
                raise InputError(f"{where}: no image processor")
            ranges = {str(kind): ends for kind, ends in saved.ranges.items()}
            return TrainedImages(config, saved.processor, ranges, adapter), model
        limits = Limits(saved.positions, limits_of(model, 1).vocabulary)
        return TrainedTexts(config, load_tokenizer(str(encoder)), limits, adapter), model
    except Exception as error:  # transformers and its libraries raise many kinds
        raise InputError(f"{folder}: the saved model is missing or damaged: {error}") from error


def check_rows_apart(model: nn.Module, data: Encoded, rows: Sequence[int], name: str) -> None:
    """Compare the logits of rows alone with those beside others, and refuse a model where they differ."""
    model.eval()
    try:
        with torch.no_grad():
            alone = torch.cat([logits_of(data.batch([row]).call(model)) for row in rows])
            beside = logits_of(data.batch(list(rows)).call(model))
    except InputError:
        raise
    except Exception as error:  # of any model
        hint = ": set pad_token_id in its config" if "padding token" in str(error) else ""
        raise InputError(
            f"model {name!r} fails on a batch of {len(rows)} rows: {str(error).splitlines()[0]}{hint}"
        ) from error
    if not bool(torch.isfinite(alone).all()):
        raise InputError(f"model {name!r}: its outputs are not finite numbers")
    if (alone - beside).abs().max() > 1e-3 * alone.abs().max().clamp_min(1e-3):
        raise InputError(
            f"model {name!r} gives a row another output beside a longer one: it ignores the padding mask, or "
            f"pads at the wrong side"
        )


def _columns(data: TextData) -> list[list[str]]:
    return [data.texts, data.seconds] if isinstance(data, PairData) else [data.texts]


def _padding_of(tokenizer: Any, name: str) -> int:
    return int(getattr(tokenizer, "pad_token_type_id", 0) or 0) if name == "token_type_ids" else 0
