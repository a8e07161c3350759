"""Builds and loads the model of a run, for every kind of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from turnover.data.base import Data
from turnover.data.image_sources import holds_images
from turnover.errors import InputError
from turnover.io.parsing import read_object
from turnover.models import image, text
from turnover.models.base import Config, Pipeline

KINDS: dict[str, Any] = {"text": text, "image": image}
"""Module that builds and loads the models of each kind of data. To add a kind, add its module here."""


def config_class(model: str, source: str) -> type[Any]:
    """Class of a model's configuration, by its name; refuses a text encoder for a source of images."""
    if model in image.IMAGE_MODELS:
        return image.ImageClassifierConfig
    if holds_images(source):
        raise InputError(f"{source} holds images: give --model {' or '.join(image.IMAGE_MODELS)}")
    return text.ClassifierConfig


def build(config: Config, train_data: Data) -> tuple[Pipeline, nn.Module]:
    """Build a new model for some training data.

    New weights are drawn from torch's default generator: seed it, or fork it, outside.
    """
    built: tuple[Pipeline, nn.Module] = KINDS[config.kind].build(config, train_data)
    return built


def load(folder: Path) -> tuple[Pipeline, nn.Module]:
    """Load a saved model in eval mode, and its pipeline."""
    where = folder / "classifier.json"
    kind = read_object(where).get("kind", "text")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{where}: unknown kind of data {kind!r}; known kinds: {', '.join(KINDS)}")
    loaded: tuple[Pipeline, nn.Module] = KINDS[kind].load(folder)
    return loaded
