"""Image classifiers of a run: a VGG from scratch, or pretrained convolutions below a wide masked head."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from turnover.data.base import Data, Reader, read_rows
from turnover.data.decoding import Ranges, check_ranges
from turnover.data.encoded import Encoded
from turnover.data.images import (
    ImageData,
    ImageReader,
    ImageRow,
    Pixels,
    read_image,
)
from turnover.dropout.head import WideHead
from turnover.errors import InputError, check_whole
from turnover.io.parsing import check_file, convert, damage, read_object
from turnover.io.tensors import opened, read_model, read_weights, write_model
from turnover.models.base import STANDARDIZED_ROWS, standardize
from turnover.models.vgg import SITES, VGG

IMAGE_MODELS = ("vgg11", "vgg13", "vgg16", "vgg19")
_FEATURES = "features."


@dataclass(frozen=True)
class ImageClassifierConfig:
    """Shape of an image classifier.

    Attributes:
        model: ``vgg11``, ``vgg13``, ``vgg16`` or ``vgg19`` (:class:`~turnover.models.vgg.VGG`).
        size: height and width in pixels to which images are resized, a multiple of 32 (VGG).
        width: channels of the first convolution (VGG).
        hidden: units of the two fully connected hidden layers of a network trained from scratch.
        augment: shift and mirror the images in training; a shifted image keeps its instance's mask.
        weights: pretrained weights of such a VGG (safetensors, torchvision's names); its convolutions
            stay frozen below a wide head. Default: the network is trained from scratch.
        head_units: mask units of the wide head.
    """

    kind: ClassVar[str] = "image"
    saved_as: ClassVar[str] = "image"
    epochs: ClassVar[int] = 10
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
                f"unknown image model {self.model!r}; known models: {', '.join(IMAGE_MODELS)}"
            )
        check_whole("head_units", self.head_units, 1)
        try:
            with torch.device("meta"):
                self.network(2)  # raises if it cannot be built
        except InputError:
            raise
        except (TypeError, RuntimeError, OverflowError) as error:
            raise InputError(
                f"no {self.model} of width {self.width}, {self.hidden} hidden units and images of "
                f"{self.size} can be built: {str(error).splitlines()[0]}"
            ) from error

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites masked by default: everything that is trained."""
        return SITES if self.weights is None else ("head",)

    def reader(self) -> Reader:
        """Function that reads labeled images; numbers of more than 8 bits are scaled as in the first set."""
        return ImageReader(self.size)

    def network(self, classes: int) -> nn.Module:
        """Build a network; its weights are drawn from torch's default generator."""
        depth = int(self.model.removeprefix("vgg"))
        whole = VGG(depth, classes, size=self.size, width=self.width, hidden=self.hidden)
        return whole if self.weights is None else ImageClassifier(whole, self.head_units, classes)


class ImageClassifier(nn.Module):
    """Frozen convolutions of a VGG -> mean over the image -> :class:`~turnover.WideHead`.

    ``forward(images)``: float (rows, 3, size, size); logits (rows, classes).
    """

    def __init__(self, whole: VGG, head_units: int, classes: int) -> None:
        super().__init__()
        self.encoder = whole.features.requires_grad_(False)
        channels = [m.out_channels for m in whole.features if isinstance(m, nn.Conv2d)][-1]
        self.head = WideHead(channels, head_units, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (rows, classes)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Means of the last channels, float (rows, channels)."""
        means: Tensor = self.encoder(images).mean(dim=(2, 3))
        return means

    def load_convolutions(self, path: str) -> None:
        """Load the convolutions of a VGG's weights under torchvision's names."""
        wanted = {_FEATURES + name: value for name, value in self.encoder.state_dict().items()}
        with opened(Path(path)):
            pass  # it is a file of tensors, so what is refused next are their shapes
        try:
            taken = read_weights(Path(path), wanted, _FEATURES)
        except InputError as error:
            raise InputError(
                f"{error}; give the --model and --width of these weights, without batch normalization"
            ) from error
        self.encoder.load_state_dict({k.removeprefix(_FEATURES): v for k, v in taken.items()})


@dataclass(frozen=True)
class _Saved:
    """What ``classifier.json`` holds."""

    classifier: dict[str, Any]
    classes: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    ranges: dict[Literal["integers", "floats"], tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(0 <= one <= 1 for one in self.mean):
            raise InputError(f"mean cannot be {self.mean}")
        if not all(1e-6 <= one <= 1 for one in self.deviation):
            raise InputError(f"deviation cannot be {self.deviation}")


class Images:
    """Takes images to a model's batches, and from a run's files.

    Attributes:
        size: height and width of the images.
        mean: of red, green and blue, subtracted from colors in [0, 1].
        deviation: by which the difference is divided.
        ranges: numbers that became 0 and 255 in the training images.
        framing: how an image becomes pixels, as for :func:`~turnover.data.images.read_images`.
    """

    config: Any
    size: Any
    mean: Any
    deviation: Any
    ranges: Ranges
    framing: Any = None

    def reader(self) -> Reader:
        """Function that reads labeled images to compare with the training images."""
        return ImageReader(self.size, self.ranges, self.framing)

    def encode(self, data: ImageData) -> Pixels:
        """Standardize images, batch by batch."""
        check_ranges(data.ranges, self.ranges)
        standard = self.mean, self.deviation
        augment = self.config.augment
        return Pixels(data.pixels, data.rows, data.labels, data.ids, *standard, augment)

    def one(self, given: str | Path, label: int, classes: list[str]) -> ImageData:
        """Make one row of an image file."""
        if isinstance(given, str):
            raise InputError("this run's model takes images: use --image")
        pixels = read_image(given, self.size, self.ranges, self.framing)[None]
        ids, name = torch.zeros(1, dtype=torch.int64), given.name
        return ImageData(pixels, [0], [name], [label], ids, [name], classes, self.ranges)

    def read(self, folder: Path, name: str, classes: list[str]) -> ImageData:
        """Read images of a run; their pixels stay on disk."""
        found, labels, ids, keys, groups = read_rows(folder / f"{name}.jsonl", classes, ImageRow)
        path, size, rows = folder / f"{name}.npy", self.size, list(range(len(found)))
        check_file(path)
        try:
            pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy evaluates the header as Python
            raise InputError(f"{path}: missing or damaged ({error})") from error
        if pixels.shape != (len(rows), size, size, 3) or pixels.dtype != np.uint8:
            raise InputError(f"{path}: damaged, not {len(rows)} images of {size} x {size}")
        names = [row.image for row in found]
        return ImageData(
            *(pixels, rows, names, labels, ids, keys, classes, self.ranges), groups=groups
        )


@dataclass(frozen=True)
class ImagePipeline(Images):
    """Standardizes images by the mean and standard deviation of the training images' colors."""

    config: ImageClassifierConfig
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    ranges: Ranges = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Height and width of the images."""
        return self.config.size

    def prepare(self, model: nn.Module, training: Encoded) -> None:
        """Standardize the input of a wide head, if the model has one."""
        if isinstance(model, ImageClassifier):
            standardize(model, model.head, training, model.features)

    @property
    def keeps_pretrained(self) -> bool:
        """Whether the convolutions were trained on other images, and stay frozen."""
        return self.config.weights is not None

    @contextmanager
    def pretrained(self, model: nn.Module) -> Iterator[Callable[[Any], Tensor]]:
        """Means of the frozen convolutions' last channels."""
        if not isinstance(model, ImageClassifier):
            raise InputError(
                "this needs features that were trained on other images, and the run's network was "
                "trained from scratch: fit with --weights"
            )
        yield model.features

    def save(self, folder: Path, model: nn.Module, classes: int) -> None:
        """Write weights (safetensors) and shapes (JSON)."""
        shape = {
            "kind": self.config.saved_as,
            "classifier": asdict(self.config),
            "classes": classes,
            "mean": self.mean,
            "deviation": self.deviation,
            "ranges": self.ranges,
        }
        (folder / "classifier.json").write_text(json.dumps(shape, indent=2) + "\n")
        write_model(folder / "model.safetensors", model)


def build(config: ImageClassifierConfig, train_data: Data) -> tuple[ImagePipeline, nn.Module]:
    """Build an image classifier, and a pipeline that standardizes by the training images' colors."""
    assert isinstance(train_data, ImageData)
    rows = torch.randperm(len(train_data), generator=torch.Generator().manual_seed(0))
    chosen = [train_data.rows[row] for row in rows[:STANDARDIZED_ROWS].tolist()]
    values = train_data.pixels[chosen].reshape(-1, 3) / 255.0
    mean, deviation = values.mean(axis=0), np.maximum(values.std(axis=0), 1 / 255)
    standard = tuple(mean.tolist()), tuple(deviation.tolist())
    pipeline = ImagePipeline(config, *standard, train_data.ranges)
    model = config.network(len(train_data.classes))
    if config.weights is not None:
        assert isinstance(model, ImageClassifier)
        model.load_convolutions(config.weights)
    return pipeline, model


def load(folder: Path) -> tuple[ImagePipeline, nn.Module]:
    """Load what :meth:`ImagePipeline.save` wrote, from the folder alone."""
    where, path = folder / "classifier.json", folder / "model.safetensors"
    try:
        saved = convert(read_object(where), _Saved, where)
        config = convert(saved.classifier, ImageClassifierConfig, where, closed=True)
        with damage(where):
            model = read_model(path, lambda: config.network(saved.classes))
    except InputError as error:
        raise InputError(f"{folder}: the saved model is missing or damaged: {error}") from error
    ranges = {str(kind): ends for kind, ends in saved.ranges.items()}
    return ImagePipeline(config, saved.mean, saved.deviation, ranges), model
