"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from turnover.cli.places import place

DATA = "Data"
MODEL = "Model"
IMAGES = "Images"
TRAINING = "Training and masks"
RUN = "Run and output"

RunFolder = Annotated[
    Path,
    typer.Argument(
        help="Folder of a run, as written by `turnover fit`, or its URL on a store (s3://...).",
        parser=place,
        metavar="RUN",
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="One JSON document on stdout; tables, notes and progress go to stderr.",
        rich_help_panel=RUN,
    ),
]

Objective = Annotated[
    Literal["margin", "cross_entropy"],
    typer.Option(
        help="Cost of a prediction in nats: minus the log-odds of the true class, or its loss."
    ),
]

TextFile = Annotated[
    str,
    typer.Argument(
        help="CSV, TSV, JSON(L) or Parquet file of texts, or Hugging Face data set or folder of one."
    ),
]
TestData = Annotated[
    str | None,
    typer.Option(
        help="Test data, likewise; without it a fifth of the data is held out.",
        rich_help_panel=DATA,
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column of the texts.", rich_help_panel=DATA)]
ImageColumn = Annotated[
    str, typer.Option(help="Column or array of the images.", rich_help_panel=DATA)
]
LabelColumn = Annotated[
    str, typer.Option(help="Column or array of the classes.", rich_help_panel=DATA)
]
IdColumn = Annotated[
    str | None,
    typer.Option(
        help="Column of distinct instance ids; without one they are made of the contents.",
        rich_help_panel=DATA,
    ),
]
GroupColumn = Annotated[
    str | None,
    typer.Option(
        help="Rows with one value in this column share one mask (source, annotator).",
        rich_help_panel=DATA,
    ),
]
Split = Annotated[str, typer.Option(help="Split of a Hugging Face data set.", rich_help_panel=DATA)]
TestSplit = Annotated[str, typer.Option(help="Split for --test, likewise.", rich_help_panel=DATA)]

HeadUnits = Annotated[
    int, typer.Option(min=1, help="Mask units of the wide head.", rich_help_panel=MODEL)
]
LoraRank = Annotated[
    int,
    typer.Option(
        min=1, help="Rank of the LoRA components, a mask unit each (texts).", rich_help_panel=MODEL
    ),
]
MaxTokens = Annotated[
    int, typer.Option(min=1, help="Longer texts are cut, in tokens.", rich_help_panel=MODEL)
]

BatchSize = Annotated[int, typer.Option(min=1, help="Rows in a step.", rich_help_panel=TRAINING)]
LearningRate = Annotated[
    float,
    typer.Option(
        min=0,
        help="Of all that is trained but the wide head (of texts: LoRA), decaying to 0.",
        rich_help_panel=TRAINING,
    ),
]
HeadLearningRate = Annotated[
    float,
    typer.Option(min=0, help="Of the wide head, decaying to 0.", rich_help_panel=TRAINING),
]
ClassWeights = Annotated[
    list[str] | None,
    typer.Option(
        help="What rows count in the training loss: balanced (every class as much in all), or NAME=WEIGHT "
        "(repeatable; the other classes 1). What is measured and scored is not weighted.",
        rich_help_panel=TRAINING,
    ),
]
Keep = Annotated[
    float,
    typer.Option(
        help="Share of units an instance trains, strictly between 0 and 1.",
        rich_help_panel=TRAINING,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Of masks, new weights, order and ordinary dropout.", rich_help_panel=TRAINING
    ),
]
