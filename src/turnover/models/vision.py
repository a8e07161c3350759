"""Image classifiers of a run on a Hugging Face encoder with LoRA, below a wide masked head.

The base stays frozen, batch norms included, and everything that is trained sits behind masks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from turnover.data.base import Data, Reader
from turnover.data.decoding import Ranges
from turnover.data.encoded import Encoded
from turnover.data.images import ImageData
from turnover.dropout.head import WideHead
from turnover.errors import InputError, check_whole
from turnover.io.parsing import convert, read_object
from turnover.io.tensors import read_model, shapes, write_model
from turnover.models.adapters import add_lora, usual_targets, without_lora
from turnover.models.base import standardize
from turnover.models.encoders import (
    config_of,
    first_line,
    load_config,
    load_encoder,
    new_encoder,
)
from turnover.models.processors import (
    ProcessedImages,
    Processor,
    image_reader,
    load_processor,
)

_ATTENTION = ("query", "value", "q_proj", "v_proj")
"""Ends of the names of layers that LoRA is usually added to."""
_ROWS = 3


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Shape of an :class:`ImageEncoderClassifier`.

    Attributes:
        model: Hugging Face name or folder of the encoder.
        head_units: mask units of the wide head.
        lora_rank: rank of the LoRA components, one mask unit each; convolutions get none.
        augment: shift and mirror the images in training; a shifted image keeps its instance's mask.
    """

    kind: ClassVar[str] = "image"
    saved_as: ClassVar[str] = "image encoder"
    epochs: ClassVar[int] = 3
    model: str
    head_units: int = 8192
    lora_rank: int = 16
    augment: bool = True

    def __post_init__(self) -> None:
        for name in ("head_units", "lora_rank"):
            check_whole(name, getattr(self, name), 1)

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites masked by default: everything that is trained."""
        with torch.device("meta"):  # without its weights
            encoder = new_encoder(config_of(self.model))
        return ("lora", "head") if _has_linears(encoder) else ("head",)

    def reader(self) -> Reader:
        """Function that reads labeled images as the encoder's image processor frames them."""
        return image_reader(self.model)


class ImageEncoderClassifier(nn.Module):
    """Frozen encoder with LoRA -> mean over the last layer's places -> :class:`~turnover.WideHead`.

    ``forward(images)``: float (rows, 3, size, size); logits (rows, classes).
    ``forward(features=...)``: the same from :meth:`features`, float (rows, width).

    Attributes:
        stored: type of real numbers in the encoder's checkpoint; here they are float32.
    """

    def __init__(self, encoder: nn.Module, head: WideHead, stored: str = "float32") -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.stored = stored

    def train(self, mode: bool = True) -> ImageEncoderClassifier:
        """Batch norms keep their pretrained statistics: those of a batch would mix its rows."""
        super().train(mode)
        for module in self.encoder.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, images: Tensor | None = None, *, features: Tensor | None = None) -> Tensor:
        """Logits (rows, classes)."""
        if features is None:
            assert images is not None
            features = self.features(images)
        logits: Tensor = self.head(features)
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Mean of the last layer's tokens, or over its map, float (rows, width)."""
        return pooled(self.encoder, images)


@dataclass(frozen=True)
class _Saved:
    """What ``classifier.json`` holds."""

    classifier: dict[str, Any]
    classes: int
    features: int
    targets: list[str]
    processor: Processor
    ranges: dict[Literal["integers", "floats"], tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageEncoderPipeline(ProcessedImages):
    """Brings images to an encoder as its own image processor does."""

    config: ImageEncoderConfig
    processor: Processor
    targets: tuple[str, ...]
    ranges: Ranges = field(default_factory=dict)

    def prepare(self, model: nn.Module, training: Encoded) -> None:
        """Standardize the head's input by the pretrained encoder's features of some instances."""
        assert isinstance(model, ImageEncoderClassifier)
        standardize(model, model.head, training, model.features)

    @property
    def keeps_pretrained(self) -> bool:
        """Whether the encoder as it was before training is there: below LoRA."""
        return True

    @contextmanager
    def pretrained(self, model: nn.Module) -> Iterator[Callable[[Any], Tensor]]:
        """Mean features without the LoRA components."""
        assert isinstance(model, ImageEncoderClassifier)
        with without_lora(model.encoder):
            yield model.features

    def save(self, folder: Path, model: nn.Module, classes: int) -> None:
        """Write weights (safetensors), shapes and the image processor (JSON)."""
        assert isinstance(model, ImageEncoderClassifier)
        encoder: Any = model.encoder
        encoder.config.dtype = torch.float32  # of the weights now
        encoder.config.save_pretrained(folder / "encoder")
        values = {
            "kind": self.config.saved_as,
            "classifier": asdict(self.config),
            "classes": classes,
            "features": model.head.spread.in_features,
            "targets": self.targets,
            "processor": asdict(self.processor),
            "ranges": self.ranges,
        }
        (folder / "classifier.json").write_text(json.dumps(values, indent=2) + "\n")
        write_model(folder / "model.safetensors", model)


def takes_images(model: str) -> bool:
    """Whether a model is an encoder of images, by its config alone.

    Raises:
        InputError: the model cannot be loaded, or transformers is not installed.
    """
    kind = _class_of(config_of(model))
    return bool(getattr(kind, "main_input_name", "") == "pixel_values")


def build(
    config: ImageEncoderConfig, train_data: Data
) -> tuple[ImageEncoderPipeline, ImageEncoderClassifier]:
    """Build a classifier on a pretrained encoder, and its pipeline.

    New weights are drawn from torch's default generator: seed it, or fork it, outside.
    """
    assert isinstance(train_data, ImageData)
    processor = load_processor(config.model)
    images = torch.zeros(_ROWS, 3, processor.size, processor.size)
    encoder, stored = load_encoder(config.model, lambda _: {"pixel_values": images[:1]})
    try:
        linears, width = _traced(encoder, images)
        targets = _chosen(encoder, linears)
        model = _assemble(encoder, config, len(train_data.classes), width, targets, stored)
    except InputError:
        raise
    except Exception as error:  # from the encoder, or from peft
        raise InputError(
            f"model {config.model!r} ({type(encoder).__name__}) cannot be an image encoder with images of "
            f"{processor.size} x {processor.size}, as its image processor makes them: {first_line(error)}"
        ) from error
    if not targets and _has_linears(encoder):
        raise InputError(
            f"model {config.model!r} ({type(encoder).__name__}) has no linear layer that runs on each row by "
            f"itself, as LoRA needs here: give another encoder"
        )
    return ImageEncoderPipeline(config, processor, targets, train_data.ranges), model


def load(folder: Path) -> tuple[ImageEncoderPipeline, ImageEncoderClassifier]:
    """Load what :meth:`ImageEncoderPipeline.save` wrote, from the folder alone."""
    where, path = folder / "classifier.json", folder / "model.safetensors"
    try:
        saved = convert(read_object(where), _Saved, where)
        config = convert(saved.classifier, ImageEncoderConfig, where, closed=True)
        encoder_config = load_config(folder / "encoder", tensors=len(shapes(path)))
        targets = tuple(saved.targets)
        model = read_model(
            path,
            lambda: _assemble(
                new_encoder(encoder_config), config, saved.classes, saved.features, targets
            ),
        )
    except Exception as error:  # transformers and its libraries raise many kinds
        raise InputError(f"{folder}: the saved model is missing or damaged: {error}") from error
    ranges = {str(kind): ends for kind, ends in saved.ranges.items()}
    return ImageEncoderPipeline(config, saved.processor, targets, ranges), model


def _assemble(
    encoder: nn.Module,
    config: ImageEncoderConfig,
    classes: int,
    width: int,
    targets: tuple[str, ...],
    stored: str = "float32",
) -> ImageEncoderClassifier:
    """Add LoRA and a head to an encoder."""
    encoder.requires_grad_(False)
    if targets:
        add_lora(encoder, config.lora_rank, targets)
    return ImageEncoderClassifier(encoder, WideHead(width, config.head_units, classes), stored)


def pooled(encoder: nn.Module, images: Tensor) -> Tensor:
    """Mean of an encoder's last layer over the places of each image, float (rows, width)."""
    hidden = getattr(encoder(pixel_values=images), "last_hidden_state", None)
    if hidden is None or hidden.dim() not in (3, 4) or len(hidden) != len(images):
        shape = "none" if hidden is None else f"of shape {tuple(hidden.shape)}"
        raise InputError(
            f"an image encoder gives a last_hidden_state (rows, tokens, width) or (rows, width, height, "
            f"width); that of {type(encoder).__name__} is {shape}"
        )
    mean: Tensor = hidden.mean(dim=1 if hidden.dim() == 3 else (2, 3))
    return mean


def _traced(encoder: nn.Module, images: Tensor) -> tuple[dict[str, bool], int]:
    """Linear layers that the features depend on, and whether they run row by row; width of the features.

    Layers inside windows of an image get the windows as rows, which no mask of an instance fits.
    """
    by_row: dict[str, bool] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            by_row[name] = by_row.get(name, True) and len(inputs[0]) == len(images)
            outputs[name] = output

        return hook

    hooks = [
        module.register_forward_hook(record(name))
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        with torch.enable_grad():
            features = pooled(encoder, images)
            given = list(outputs.values())
            found = torch.autograd.grad(features.sum(), given, allow_unused=True) if given else ()
    finally:
        for one in hooks:
            one.remove()
    used = [name for name, gradient in zip(outputs, found, strict=True) if gradient is not None]
    return {name: by_row[name] for name in used}, features.shape[1]


def _chosen(encoder: nn.Module, linears: dict[str, bool]) -> tuple[str, ...]:
    """Layers for LoRA: query and value of the attention if all run row by row; otherwise all that do."""
    ends = usual_targets(encoder) or _ATTENTION
    usual = tuple(name for name in linears if name.rpartition(".")[2] in ends)
    if usual and all(linears[name] for name in usual):
        return usual
    return tuple(name for name, by_row in linears.items() if by_row)


def _class_of(config: Any) -> Any:
    """Class of transformers that a config builds; ``None`` if there is none."""
    from transformers import MODEL_MAPPING

    found = MODEL_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _has_linears(encoder: nn.Module) -> bool:
    return any(isinstance(module, nn.Linear) for module in encoder.modules())
