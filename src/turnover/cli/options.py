"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from turnover.cli.parameters import RUN, Fields
from turnover.dropout.masks import MaskSpec
from turnover.dropout.modules import choose_device
from turnover.models.image import ImageClassifierConfig
from turnover.models.text import ClassifierConfig
from turnover.tasks.training import TrainingConfig

DATA = "Data"
MODEL = "Model"
IMAGES = "Images"
TRAINING = "Training and masks"

Positive = Annotated[int, typer.Option(min=1)]
Count = Annotated[int, typer.Option(min=0)]
Objective = Literal["margin", "cross_entropy"]


def folder_or_url(given: str) -> Path | str:
    """A folder's path; a URL as it is."""
    return given if "://" in given else Path(given)


RunFolder = Annotated[
    Path,
    typer.Argument(
        help="Folder of a run, as written by `turnover fit`, or its URL on a store (s3://...).",
        parser=folder_or_url,
        metavar="RUN",
    ),
]
HeadUnits = Annotated[
    int, typer.Option(min=1, help="Mask units of the wide head.", rich_help_panel=MODEL)
]
Seed = Annotated[
    int,
    typer.Option(
        help="Seed of masks, new weights, order and ordinary dropout.", rich_help_panel=TRAINING
    ),
]
Device = Annotated[
    str,
    typer.Option(
        # Before anything is read: a missing card must not be noticed after minutes.
        callback=lambda given: str(choose_device(given)),
        metavar="DEVICE",
        help="Where networks run: cpu, cuda, cuda:1 (a card by its number) or mps; auto: cuda if there is "
        "one, else cpu.",
        rich_help_panel=RUN,
    ),
]
_CLASS_WEIGHTS = typer.Option(
    help="Weight of a row in the training loss, by its class: balanced (all classes weigh the same in "
    "total), or NAME=WEIGHT (repeatable; the other classes weigh 1). Reported losses and scores are not "
    "weighted."
)
_KEEP = typer.Option(help="Share of units that an instance trains, strictly between 0 and 1.")
TEXT_MODEL = Fields(ClassifierConfig, MODEL)
IMAGE_MODEL = Fields(ImageClassifierConfig, IMAGES, types={"weights": Path | None})
TRAIN = Fields(
    TrainingConfig,
    TRAINING,
    types={"seed": Seed, "class_weights": Annotated[list[str] | None, _CLASS_WEIGHTS]},
)
MASKS = Fields(MaskSpec, TRAINING, ("keep",), {"keep": Annotated[float, _KEEP]})
