"""Image processors of pretrained models: how an image becomes the pixels that a model was trained on.

A processor's settings are loaded without code, and compared with what it does to two images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from turnover.data.decoding import load_pillow
from turnover.data.images import Framing, ImageReader, resized, standardized
from turnover.errors import InputError, check_whole, needing
from turnover.models.encoders import first_line
from turnover.models.image import Images

FILE = "preprocessor_config.json"
_LARGEST_SIDE = 4096
_SQUASHED_SIDE = 384
"""ConvNeXT's processor cuts images of a shorter side alone."""
_BACKEND_SINCE = 5
"""Release of transformers in which ``backend`` replaced ``use_fast``."""
_LEVELS = 2
"""Most difference in 256 levels between Pillow's resizing, as here, and other libraries'."""


@dataclass(frozen=True)
class Processor:
    """Resizes an image, takes its middle, and standardizes its colors.

    Attributes:
        size: height and width of the result in pixels.
        side: length to which sides are resized before the middle is taken; ``None``: not resized.
        both: both sides are resized to ``side``, whatever the image's shape; otherwise the shorter.
        resample: Pillow's number of the filter, from 0 to 5.
        mean: of red, green and blue, subtracted from values in [0, 1].
        deviation: by which the difference is divided.
    """

    size: int
    side: int | None
    both: bool
    resample: int
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name, value in (("size", self.size), ("side", self.side)):
            if value is not None:
                check_whole(name, value, 1)
                if value > _LARGEST_SIDE:
                    raise InputError(f"{name} must be at most {_LARGEST_SIDE}, got {value}")
        if self.resample not in range(6):
            raise InputError(
                f"resample must be one of Pillow's filters 0 to 5, got {self.resample}"
            )
        if not np.isfinite(self.mean).all():
            raise InputError(f"mean must be finite, got {self.mean}")
        if not all(1e-6 <= one < np.inf for one in self.deviation):
            raise InputError(f"deviation must be positive and finite, got {self.deviation}")

    def pixels(self, image: Any, where: str) -> NDArray[np.uint8]:
        """Resize an RGB Pillow image and take its middle, as uint8 (size, size, 3).

        Raises:
            InputError: the image is too long and narrow to be resized; ``where`` names it.
        """
        if self.side is not None:
            shorter = min(image.size)
            width, height = (
                self.side if self.both or one == shorter else int(self.side * one / shorter)
                for one in image.size
            )
            image = resized(image, (width, height), where, resample=self.resample)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        return np.asarray(image.crop((left, top, left + self.size, top + self.size)))

    def encode(self, pixels: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Standardize images, uint8 (size, size, 3) each, as float32 (images, 3, size, size)."""
        return standardized(pixels, self.mean, self.deviation)


class ProcessedImages(Images):
    """Takes images to a model's batches as its image processor does."""

    processor: Processor

    @property
    def size(self) -> int:
        """Height and width of the images."""
        return self.processor.size

    @property
    def mean(self) -> tuple[float, ...]:
        """Colors that become 0."""
        return self.processor.mean

    @property
    def deviation(self) -> tuple[float, ...]:
        """Differences of colors that become 1."""
        return self.processor.deviation

    @property
    def framing(self) -> Framing:
        """How an image becomes pixels."""
        return self.processor.pixels


def image_reader(source: str) -> ImageReader:
    """Function that reads labeled images as the image processor of a pretrained model frames them."""
    processor = load_processor(source)
    return ImageReader(processor.size, framing=processor.pixels)


def load_processor(source: str) -> Processor:
    """Load the image processor of a pretrained model; no code of the model is run.

    Args:
        source: folder or Hugging Face name of the model.

    Raises:
        InputError: the model has no image processor, it cannot be loaded, its images are not squares of
            three colors, or it does more than resize an image, take its middle and standardize colors.

    Example:
        >>> processor = load_processor("google/vit-base-patch16-224")  # doctest: +SKIP
        >>> processor.size  # doctest: +SKIP
        224
    """
    with needing("a pretrained image model", "turnover[images,text]"):
        import transformers
    load_pillow()
    if Path(source).is_dir() and not (Path(source) / FILE).is_file():
        raise InputError(
            f"model {source!r} has no image processor ({FILE}): save it beside the model with "
            f"image_processor.save_pretrained"
        )
    recent = int(transformers.__version__.split(".")[0]) >= _BACKEND_SINCE
    backend = {"backend": "pil"} if recent else {"use_fast": False}
    where = f"the image processor of {source!r}"
    try:
        loaded = transformers.AutoImageProcessor.from_pretrained(
            source, trust_remote_code=False, **backend
        )
        found = _read(loaded)
    except InputError as error:
        raise InputError(f"{where} cannot be used: {error}") from error
    except Exception as error:  # transformers raises many kinds for files that are not its own
        raise InputError(f"{where} cannot be loaded: {first_line(error)}") from error
    _compare(loaded, found, where)
    return found


def _read(loaded: Any) -> Processor:
    """Settings of a processor of transformers."""
    sides = {key: value for key, value in dict(loaded.size or {}).items() if value is not None}
    side: int | None = None
    both = False
    if loaded.do_resize:
        lengths = set(sides.values())
        if len(lengths) != 1 or sides.keys() not in ({"shortest_edge"}, {"height", "width"}):
            raise InputError(f"images of one size are needed, and it resizes to {sides}")
        side, both = lengths.pop(), "height" in sides
    size = side
    cut = getattr(loaded, "crop_pct", None)
    if cut and side is not None:
        both = side >= _SQUASHED_SIDE
        side = side if both else int(side / cut)
    elif getattr(loaded, "do_center_crop", False):
        crop = dict(loaded.crop_size)
        if crop["height"] != crop["width"]:
            raise InputError(f"square images are needed, and it takes the middle {crop}")
        size = crop["height"]
    elif not both:
        raise InputError("square images are needed, and it takes no middle of them")
    assert size is not None
    # (factor x - mean) / deviation, with x / 255 in place of factor x
    factor = 255 * (loaded.rescale_factor if loaded.do_rescale else 1)
    mean, deviation = (
        np.broadcast_to(np.asarray(values, dtype=np.float64) / factor, 3).tolist()
        for values in ((loaded.image_mean, loaded.image_std) if loaded.do_normalize else (0.0, 1.0))
    )
    return Processor(size, side, both, int(loaded.resample or 0), tuple(mean), tuple(deviation))


def _compare(loaded: Any, found: Processor, where: str) -> None:
    """Refuse a processor whose output differs from that of the settings read."""
    side = found.side or found.size
    random = np.random.default_rng(0)
    for height, width in ((side + 7, side * 3 // 2 + 1), (side // 2 + 5, side // 3 + 2)):
        values = random.integers(256, size=(height, width, 3), dtype=np.uint8)
        image = load_pillow().fromarray(values)
        try:
            output = np.asarray(loaded(images=[image], return_tensors="np")["pixel_values"])
        except Exception as error:  # of any kind
            raise InputError(f"{where} fails on an image: {first_line(error)}") from error
        wanted = found.encode([found.pixels(image, where)]).numpy()
        levels = 255 * np.asarray(found.deviation)[:, None, None]
        if output.shape != wanted.shape or (np.abs(output - wanted) * levels > _LEVELS).any():
            raise InputError(
                f"{where} ({type(loaded).__name__}) does more than resize an image, take its middle and "
                f"standardize its colors, so it cannot be used"
            )
