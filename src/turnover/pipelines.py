"""What differs between texts and images: how a model is built, fed and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from turnover.data import Data, TextData, write
from turnover.dropout.modules import device_of
from turnover.encoded import Encoded, Pixels, Tokens, batches
from turnover.errors import InputError
from turnover.images import ImageData, read_image, write_images
from turnover.integrations import transformers, vgg
from turnover.integrations.encoders import Limits, check_tokenizer
from turnover.integrations.transformers import ClassifierConfig, TextClassifier
from turnover.integrations.vgg import VGG, ImageClassifier
from turnover.io import parsing
from turnover.io.files import write_array
from turnover.io.parsing import check_file, damage, read_object
from turnover.io.tensors import check_shapes, read_weights
from turnover.rows import read_rows, write_rows
from turnover.scaling import Ranges, check_ranges, colors, saved_ranges

_STANDARDISED_ROWS = 1000
_WRITTEN_ROWS = 1000
IMAGE_MODELS = ("vgg11", "vgg13", "vgg16", "vgg19")


@dataclass(frozen=True)
class ImageClassifierConfig:
    """Shape of an image classifier.

    Attributes:
        model: ``vgg11``, ``vgg13``, ``vgg16`` or ``vgg19`` (:class:`~turnover.integrations.vgg.VGG`).
        size: height and width of the images, a multiple of 32.
        width: channels of the first convolution.
        hidden: units of the two fully connected hidden layers of a network trained from scratch.
        augment: shift and mirror the images in training; a shifted image keeps its instance's mask.
        weights: safetensors file with the pretrained weights of such a VGG, of which the convolutions
            are taken and kept frozen below a wide head; ``None``: trained from scratch.
        head_units: mask units of the wide head.
    """

    model: str = "vgg11"
    size: int = 32
    width: int = 64
    hidden: int = 4096
    augment: bool = True
    weights: str | None = None
    head_units: int = 8192

    def __post_init__(self) -> None:
        if self.model not in IMAGE_MODELS:
            raise InputError(
                f"unknown image model {self.model!r}; there are {', '.join(IMAGE_MODELS)}"
            )
        if self.head_units < 1:
            raise InputError(f"head_units must be >= 1, got {self.head_units}")
        try:
            with torch.device("meta"):
                self.network(2)  # raises what cannot be
        except InputError:
            raise
        except (TypeError, RuntimeError, OverflowError) as error:
            raise InputError(
                f"no {self.model} of width {self.width}, {self.hidden} hidden units and images of "
                f"{self.size} can be built: {str(error).splitlines()[0]}"
            ) from error

    @property
    def sites(self) -> tuple[str, ...]:
        """What is masked by default: everything that is trained."""
        return vgg.SITES if self.weights is None else ("head",)

    def network(self, classes: int) -> nn.Module:
        """A new network, nothing loaded; its weights are drawn from torch's default generator."""
        depth = int(self.model.removeprefix("vgg"))
        whole = VGG(depth, classes, size=self.size, width=self.width, hidden=self.hidden)
        return whole if self.weights is None else ImageClassifier(whole, self.head_units, classes)


Config = ClassifierConfig | ImageClassifierConfig


class Pipeline(Protocol):
    """From data to a model's batches, and both to files."""

    @property
    def config(self) -> Config:
        """Shape of the model."""

    def encode(self, data: Any) -> Encoded:
        """Data as the model takes them.

        Raises:
            InputError: data that it cannot take.
        """

    def prepare(self, model: nn.Module, training: Encoded) -> None:
        """What is done once before training."""

    def pretrained(self, model: nn.Module) -> AbstractContextManager[Callable[[Any], Tensor]]:
        """From a batch's inputs to the features (rows, width) of the encoder as it was pretrained.

        Raises:
            InputError: there is none, as the network was trained from scratch.
        """

    def save(self, folder: Path, model: nn.Module, classes: int) -> None:
        """Write the model, and all that this pipeline is, into a folder."""

    def one(self, given: str | Path, label: int, classes: list[str]) -> Data:
        """A text, or the file of an image, as data of one row.

        Raises:
            InputError: an empty text, an unreadable image, or the other of the two.
        """

    def export(self, data: Any, out: Path) -> None:
        """Write data for the user, in a format that can be read again, atomically.

        Raises:
            InputError: another format, or a folder that does not exist.
        """

    def write(self, folder: Path, name: str, data: Any) -> None:
        """Write data into a run's folder."""

    def read(self, folder: Path, name: str, classes: list[str]) -> Data:
        """Read what :meth:`write` wrote.

        Raises:
            InputError: a missing or damaged file.
        """


@dataclass(frozen=True)
class TextPipeline:
    """Texts through a tokenizer, as far as the encoder can take them."""

    config: ClassifierConfig
    tokenizer: Any
    limits: Limits = field(default_factory=Limits)

    def encode(self, data: TextData) -> Tokens:
        """Tokenised texts.

        Raises:
            InputError: a text without tokens, or one that the encoder cannot take.
        """
        padding = self.tokenizer.pad_token_id
        tokens = transformers.tokenize(self.tokenizer, data.texts, self.config.max_tokens)
        self.limits.check(tokens, data.keys, self.config.max_tokens, self.tokenizer)
        return Tokens(tokens, data.labels, data.ids, 0 if padding is None else int(padding))

    def prepare(self, model: nn.Module, training: Encoded) -> None:
        """Standardise the head's input on the pretrained encoder's features of some instances."""
        assert isinstance(model, TextClassifier)
        _standardise(model, training, lambda inputs: model.features(**inputs))

    @contextmanager
    def pretrained(self, model: nn.Module) -> Iterator[Callable[[Any], Tensor]]:
        """Mean-pooled features without the LoRA components."""
        assert isinstance(model, TextClassifier)
        with transformers.without_lora(model):
            yield lambda inputs: model.features(**inputs)

    def save(self, folder: Path, model: nn.Module, classes: int) -> None:
        """Weights (safetensors), shapes (JSON) and tokenizer."""
        assert isinstance(model, TextClassifier)
        transformers.save(folder, model, self.tokenizer, self.config, classes)

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


@dataclass(frozen=True)
class ImagePipeline:
    """Images standardised by the mean and standard deviation of the training images' colours."""

    config: ImageClassifierConfig
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    ranges: Ranges = field(default_factory=dict)

    def encode(self, data: ImageData) -> Pixels:
        """Pixels, standardised batch by batch.

        Raises:
            InputError: numbers of more than 8 bits were scaled by another range than the training images'.
        """
        check_ranges(data.ranges, self.ranges)
        return Pixels(
            data.pixels,
            data.rows,
            data.labels,
            data.ids,
            self.mean,
            self.deviation,
            self.config.augment,
        )

    def prepare(self, model: nn.Module, training: Encoded) -> None:
        """Standardise the input of a wide head, where there is one."""
        if isinstance(model, ImageClassifier):
            _standardise(model, training, model.features)

    @contextmanager
    def pretrained(self, model: nn.Module) -> Iterator[Callable[[Any], Tensor]]:
        """Means of the frozen convolutions' last channels."""
        if not isinstance(model, ImageClassifier):
            raise InputError(
                "this takes features that were trained on other images, and the run's network was "
                "trained from scratch: fit with --weights"
            )
        yield model.features

    def save(self, folder: Path, model: nn.Module, classes: int) -> None:
        """Weights (safetensors) and shapes (JSON)."""
        from safetensors.torch import save_file

        shape = {
            "kind": "image",
            "classifier": asdict(self.config),
            "classes": classes,
            "mean": self.mean,
            "deviation": self.deviation,
            "ranges": self.ranges,
        }
        (folder / "classifier.json").write_text(json.dumps(shape, indent=2) + "\n")
        tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")

    def one(self, given: str | Path, label: int, classes: list[str]) -> ImageData:
        """An image as data of one row."""
        if isinstance(given, str):
            raise InputError("this run's model takes images: use --image")
        pixels = read_image(given, self.config.size, self.ranges)[None]
        ids, name = torch.zeros(1, dtype=torch.int64), given.name
        return ImageData(pixels, [0], [name], [label], ids, [name], classes, self.ranges)

    def export(self, data: ImageData, out: Path) -> None:
        """Images with keys and labels as ``.npz``, or keys, names and labels as a table."""
        write_images(data, out)

    def write(self, folder: Path, name: str, data: ImageData) -> None:
        """JSON lines with key, id, label and name, and the pixels beside them."""
        write_rows(folder / f"{name}.jsonl", data, "image")
        shape = (len(data), *data.pixels.shape[1:])
        starts = range(0, len(data), _WRITTEN_ROWS)
        parts = (data.pixels[data.rows[start : start + _WRITTEN_ROWS]] for start in starts)
        write_array(folder / f"{name}.npy", shape, np.uint8, parts)

    def read(self, folder: Path, name: str, classes: list[str]) -> ImageData:
        """Images of a run; their pixels stay on disk."""
        labels, ids, keys, names = read_rows(folder / f"{name}.jsonl", classes, "image")
        path, size = folder / f"{name}.npy", self.config.size
        check_file(path)
        try:
            pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy reads the header as Python does
            raise InputError(f"{path}: missing or damaged ({error})") from error
        if pixels.shape != (len(names), size, size, 3) or pixels.dtype != np.uint8:
            raise InputError(f"{path}: damaged, not {len(names)} images of {size} x {size}")
        rows = list(range(len(names)))
        return ImageData(pixels, rows, names, labels, ids, keys, classes, self.ranges)


def build(config: Config, train_data: Data) -> tuple[Pipeline, nn.Module]:
    """A new model for some training data.

    New weights are drawn from torch's default generator: seed it, or fork it, outside.

    Raises:
        InputError: the model cannot be loaded.
    """
    classes = len(train_data.classes)
    if isinstance(config, ClassifierConfig):
        text_model, tokenizer = transformers.build(config, classes)
        assert isinstance(train_data, TextData)
        check_tokenizer(tokenizer, train_data.texts, config.model)
        return TextPipeline(config, tokenizer, text_model.limits), text_model
    assert isinstance(train_data, ImageData)
    rows = torch.randperm(len(train_data), generator=torch.Generator().manual_seed(0))
    chosen = [train_data.rows[row] for row in rows[:_STANDARDISED_ROWS].tolist()]
    values = train_data.pixels[chosen].reshape(-1, 3) / 255.0
    mean, deviation = values.mean(axis=0), np.maximum(values.std(axis=0), 1 / 255)
    standard = tuple(mean.tolist()), tuple(deviation.tolist())
    pipeline = ImagePipeline(config, *standard, train_data.ranges)
    model = config.network(classes)
    if config.weights is not None:
        assert isinstance(model, ImageClassifier)
        model.load_convolutions(config.weights)
    return pipeline, model


def load(folder: Path) -> tuple[Pipeline, nn.Module]:
    """A saved model in eval mode, and its pipeline.

    Raises:
        InputError: a missing or damaged file, or weights that do not fit the shapes.
    """
    shape = read_object(folder / "classifier.json")
    if shape.get("kind") != "image":
        text_model, tokenizer, text_config = transformers.load(folder)
        return TextPipeline(text_config, tokenizer, text_model.limits), text_model
    where, path = folder / "classifier.json", folder / "model.safetensors"
    try:
        with damage(where):
            config = ImageClassifierConfig(**parsing.field(shape, "classifier", dict, where))
            mean, deviation = (colors(shape, name, where) for name in ("mean", "deviation"))
            classes = parsing.field(shape, "classes", int, where)
            ranges = saved_ranges(shape, where)
            with torch.device("meta"):  # no memory is taken for what the file does not hold
                check_shapes(path, config.network(classes).state_dict())
            image_model = config.network(classes)
        image_model.load_state_dict(read_weights(path, image_model.state_dict()))
    except InputError as error:
        raise InputError(f"{folder}: the saved model is missing or damaged: {error}") from error
    return ImagePipeline(config, mean, deviation, ranges), image_model.eval()


def _standardise(
    model: TextClassifier | ImageClassifier, training: Encoded, features: Callable[[Any], Tensor]
) -> None:
    device = device_of(model)
    rows = torch.randperm(len(training), generator=torch.Generator().manual_seed(0))
    some = batches(training, rows[:_STANDARDISED_ROWS].tolist())
    model.eval()
    with torch.no_grad():
        found = [features(batch.to(device).inputs) for batch in some]
    model.head.standardise(torch.cat(found))
