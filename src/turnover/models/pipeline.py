"""Builds and loads the model of a run, for every kind of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from turnover.data.base import Data
from turnover.data.image_sources import holds_images
from turnover.errors import InputError
from turnover.io.parsing import read_object
from turnover.models import image, text, trained, vision
from turnover.models.base import Config, Pipeline

KINDS: dict[str, Any] = {"text": text, "image": image, "image encoder": vision, "trained": trained}
"""Module that builds and loads each kind of models. To add a kind, add its module here."""
_TEXTS = (".csv", ".tsv", ".json", ".jsonl")


def config_class(model: str, source: str) -> type[Any]:
    """Class of a model's configuration, by its name or its files.

    Raises:
        InputError: the model takes texts and the source holds images, or the reverse.
    """
    if model in image.IMAGE_MODELS:
        return image.ImageClassifierConfig
    takes_images, why = False, f"{model!r} takes none"
    try:
        takes_images = vision.takes_images(model)
    except InputError as error:  # reported again where a text encoder is loaded
        why = str(error)
    if takes_images and source.lower().removesuffix(".gz").endswith(_TEXTS):
        raise InputError(
            f"{source} holds texts, and {model!r} is an encoder of images: give an encoder of texts"
        )
    if takes_images:
        return vision.ImageEncoderConfig
    if holds_images(source):
        raise InputError(
            f"{source} holds images: give --model {', '.join(image.IMAGE_MODELS)}, or a Hugging Face encoder "
            f"of images; {why}"
        )
    return text.ClassifierConfig


def build(config: Config, train_data: Data) -> tuple[Pipeline, nn.Module]:
    """Build a new model for some training data.

    New weights are drawn from torch's default generator: seed it, or fork it, outside.
    """
    built: tuple[Pipeline, nn.Module] = KINDS[config.saved_as].build(config, train_data)
    return built


def load(folder: Path) -> tuple[Pipeline, nn.Module]:
    """Load a saved model in eval mode, and its pipeline."""
    where = folder / "classifier.json"
    kind = read_object(where).get("kind", "text")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{where}: unknown kind of data {kind!r}; known kinds: {', '.join(KINDS)}")
    loaded: tuple[Pipeline, nn.Module] = KINDS[kind].load(folder)
    return loaded
