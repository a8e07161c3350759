"""Image classifiers of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from turnover.data.base import Data, Reader
from turnover.data.encoded import Encoded, Pixels
from turnover.data.images import ImageData, ImageReader, read_image, write_images
from turnover.data.jsonl import read_rows, write_rows
from turnover.data.scaling import Ranges, check_ranges, colors, saved_ranges
from turnover.errors import InputError
from turnover.io import parsing
from turnover.io.files import write_array
from turnover.io.parsing import check_file
from turnover.io.tensors import check_shapes, read_weights
from turnover.models import vgg
from turnover.models.base import STANDARDIZED_ROWS, standardize
from turnover.models.vgg import VGG, ImageClassifier

_WRITTEN_ROWS = 1000
IMAGE_MODELS = ("vgg11", "vgg13", "vgg16", "vgg19")


@dataclass(frozen=True)
class ImageClassifierConfig:
    """Shape of an image classifier.

    Attributes:
        model: ``vgg11``, ``vgg13``, ``vgg16`` or ``vgg19`` (:class:`~turnover.models.vgg.VGG`).
        size: height and width of the images, a multiple of 32.
        width: channels of the first convolution.
        hidden: units of the two fully connected hidden layers of a network trained from scratch.
        augment: shift and mirror the images in training; a shifted image keeps its instance's mask.
        weights: safetensors file with the pretrained weights of such a VGG, of which the convolutions
            are taken and kept frozen below a wide head; ``None``: trained from scratch.
        head_units: mask units of the wide head.
    """

    kind: ClassVar[str] = "image"
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

    def reader(self) -> Reader:
        """Function that reads labeled images; numbers of more than 8 bits as in the first set."""
        return ImageReader(self.size)

    @property
    def sites(self) -> tuple[str, ...]:
        """What is masked by default: everything that is trained."""
        return vgg.SITES if self.weights is None else ("head",)

    def network(self, classes: int) -> nn.Module:
        """A new network, nothing loaded; its weights are drawn from torch's default generator."""
        depth = int(self.model.removeprefix("vgg"))
        whole = VGG(depth, classes, size=self.size, width=self.width, hidden=self.hidden)
        return whole if self.weights is None else ImageClassifier(whole, self.head_units, classes)


@dataclass(frozen=True)
class ImagePipeline:
    """Images standardised by the mean and standard deviation of the training images' colours."""

    config: ImageClassifierConfig
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    ranges: Ranges = field(default_factory=dict)

    def reader(self) -> Reader:
        """Function that reads labeled images which are compared with the training images."""
        return ImageReader(self.config.size, self.ranges)

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
            standardize(model, model.head, training, model.features)

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
    """Load what :meth:`ImagePipeline.save` wrote."""
    where, path = folder / "classifier.json", folder / "model.safetensors"
    shape = parsing.read_object(where)
    try:
        with parsing.damage(where):
            config = ImageClassifierConfig(**parsing.field(shape, "classifier", dict, where))
            mean, deviation = (colors(shape, name, where) for name in ("mean", "deviation"))
            classes = parsing.field(shape, "classes", int, where)
            ranges = saved_ranges(shape, where)
            with torch.device("meta"):  # no memory is taken for what the file does not hold
                check_shapes(path, config.network(classes).state_dict())
            model = config.network(classes)
        model.load_state_dict(read_weights(path, model.state_dict()))
    except InputError as error:
        raise InputError(f"{folder}: the saved model is missing or damaged: {error}") from error
    return ImagePipeline(config, mean, deviation, ranges), model.eval()
