"""Commands before and for training: ``plan`` and ``fit``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from turnover.cli.config import config_option, recipe
from turnover.cli.options import (
    DATA,
    IMAGES,
    MODEL,
    RUN,
    TRAINING,
    BatchSize,
    ClassWeights,
    GroupColumn,
    HeadLearningRate,
    HeadUnits,
    IdColumn,
    ImageColumn,
    Json,
    Keep,
    LabelColumn,
    LearningRate,
    LoraRank,
    MaxTokens,
    Seed,
    Split,
    TestData,
    TestSplit,
    TextColumn,
    TextFile,
)
from turnover.cli.output import Output
from turnover.cli.places import place
from turnover.cli.reading import reading, say_rows
from turnover.errors import InputError

if TYPE_CHECKING:
    from turnover.data.base import Data
    from turnover.tasks.plan import Plan

_NOT_IN_RECIPE = ("out", "overwrite", "config", "as_json")
_DECIDE_DATA = (
    *("data", "test", "text_column", "image_column", "label_column", "id_column", "group_column"),
    *("split", "test_split", "image_size"),
)


def _digest_of_file(ctx: typer.Context, data_digest: str | None) -> str | None:
    """The digest asked for; that of a configuration file is of the data named there alone."""
    sources = {name: ctx.get_parameter_source(name) for name in (*_DECIDE_DATA, "data_digest")}
    given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    return data_digest if "data_digest" in given or not given else None


def fit(
    data: Annotated[
        str,
        typer.Argument(
            help="Texts: CSV, TSV, JSON(L) or Parquet file. Images: a folder with a folder for each "
            "class, or an .npz or Parquet file. Or a Hugging Face data set, or a folder of one."
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="Hugging Face name or folder of a text encoder, or vgg11, vgg13, vgg16, vgg19 for "
            "images.",
            autocompletion=lambda: ["vgg11", "vgg13", "vgg16", "vgg19"],
            rich_help_panel=MODEL,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the run to write, or its URL on a store (s3://...).",
            parser=place,
            metavar="PATH",
            rich_help_panel=RUN,
        ),
    ],
    test: TestData = None,
    text_column: TextColumn = "text",
    image_column: ImageColumn = "image",
    label_column: LabelColumn = "label",
    id_column: IdColumn = None,
    group_column: GroupColumn = None,
    split: Split = "train",
    test_split: TestSplit = "test",
    data_digest: Annotated[
        str | None,
        typer.Option(
            help="Refuse training and test data that are not those of this digest, as fit.toml in a "
            "run's folder has it.",
            callback=_digest_of_file,
            rich_help_panel=DATA,
        ),
    ] = None,
    head_units: HeadUnits = 8192,
    lora_rank: LoraRank = 16,
    max_tokens: MaxTokens = 128,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Pretrained weights of the VGG (safetensors, torchvision's names): its convolutions "
            "stay frozen below a wide head.",
            rich_help_panel=IMAGES,
        ),
    ] = None,
    image_size: Annotated[
        int,
        typer.Option(
            min=32,
            help="Height and width in pixels the images are brought to, a multiple of 32.",
            rich_help_panel=IMAGES,
        ),
    ] = 32,
    width: Annotated[
        int,
        typer.Option(min=1, help="Channels of the first convolution.", rich_help_panel=IMAGES),
    ] = 64,
    hidden: Annotated[
        int,
        typer.Option(min=1, help="Units of each fully connected layer.", rich_help_panel=IMAGES),
    ] = 4096,
    augment: Annotated[
        bool,
        typer.Option(help="Shift and mirror the images in training.", rich_help_panel=IMAGES),
    ] = True,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Passes over the training data; default: 3 for texts, 10 for images.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    batch_size: BatchSize = 32,
    learning_rate: LearningRate = 1e-3,
    head_learning_rate: HeadLearningRate = 1e-4,
    class_weights: ClassWeights = None,
    keep: Keep = 0.5,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="Masked module, pattern or preset (lora, head, mlp, channels; repeatable); default: "
            "all that is trained.",
            autocompletion=lambda: ["lora", "head", "mlp", "channels"],
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seed: Seed = 0,
    compare: Annotated[
        bool,
        typer.Option(
            help="Also train the same model with ordinary dropout.", rich_help_panel=TRAINING
        ),
    ] = True,
    memorization: Annotated[
        bool,
        typer.Option(
            help="Follow the losses of every training row, for turnover memorize.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(help="Replace an existing run.", rich_help_panel=RUN),
    ] = False,
    config: Annotated[Path | None, config_option()] = None,
    as_json: Json = False,
) -> None:
    """Train a text or image classifier with turn-over dropout; writes a run folder.

    Where it was interrupted, the same command goes on. Its fit.toml makes the run again:
    turnover fit --config RUN/fit.toml --out OTHER.
    """
    settings = {name: value for name, value in locals().items() if name not in _NOT_IN_RECIPE}
    from turnover.data.base import Columns, read_both
    from turnover.data.image_sources import holds_images
    from turnover.data.images import ImageReader
    from turnover.data.text import read
    from turnover.dropout.masks import MaskSpec
    from turnover.models.base import Config
    from turnover.models.image import IMAGE_MODELS, ImageClassifierConfig
    from turnover.models.text import ClassifierConfig
    from turnover.runs.run import check_new_run
    from turnover.runs.run import data_digest as digest_of
    from turnover.tasks.class_weights import parse_class_weights
    from turnover.tasks.fit import FitConfig, fit
    from turnover.tasks.training import TrainingConfig

    check_new_run(out, overwrite=overwrite)
    of_images = model in IMAGE_MODELS
    if of_images:
        file = None if weights is None else str(weights)
        shape: Config = ImageClassifierConfig(
            model, image_size, width, hidden, augment, file, head_units
        )
    else:
        if holds_images(data):
            raise InputError(f"{data} holds images: give --model {' or '.join(IMAGE_MODELS)}")
        shape = ClassifierConfig(model, head_units, lora_rank, max_tokens)
    passes = epochs if epochs is not None else (10 if of_images else 3)
    task = FitConfig(
        shape,
        TrainingConfig(
            passes,
            batch_size,
            learning_rate,
            head_learning_rate,
            seed,
            parse_class_weights(class_weights),
        ),
        MaskSpec(keep, seed),
        tuple(site or ()),
        compare,
        memorization=memorization,
    )
    columns = Columns(
        image_column if of_images else text_column, label_column, id_column, group_column
    )
    reader: Callable[..., Data] = ImageReader(image_size) if of_images else read
    output = Output(as_json=as_json)
    with reading(output):
        train_data, test_data = read_both(reader, data, test, columns, split, test_split)
    say_rows(output, training=train_data, test=test_data)
    found = digest_of(train_data, test_data)
    if data_digest not in (None, found):
        raise InputError(
            f"{data} or its test data changed: their digest is {found}, and {data_digest} is asked for; "
            f"to train on them as they are, give --data-digest {found}"
        )
    files = ("data", "test", "weights") if of_images else ("data", "test", "model")
    again = recipe({**settings, "epochs": passes, "data_digest": found}, files)
    metrics = fit(task, train_data, test_data, out, overwrite=overwrite, recipe=again)
    print_fit(output, metrics)
    output.say(f"run: {out}; next: turnover influence {out}")
    output.document({"run": str(out), "metrics": metrics})


def plan(
    data: TextFile,
    model: Annotated[
        str,
        typer.Option(help="Hugging Face name or folder of the encoder.", rich_help_panel=MODEL),
    ],
    test: TestData = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    id_column: IdColumn = None,
    group_column: GroupColumn = None,
    split: Split = "train",
    test_split: TestSplit = "test",
    head_units: HeadUnits = 8192,
    lora_rank: LoraRank = 16,
    max_tokens: MaxTokens = 128,
    epochs: Annotated[
        int, typer.Option(min=1, help="Passes over the data.", rich_help_panel=TRAINING)
    ] = 3,
    batch_size: BatchSize = 32,
    learning_rate: LearningRate = 1e-3,
    head_learning_rate: HeadLearningRate = 1e-4,
    class_weights: ClassWeights = None,
    keep: Keep = 0.5,
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Networks whose scores are averaged.")] = 1,
    top: Annotated[
        int, typer.Option(min=1, help="Strongest instances of a target to resolve.")
    ] = 10,
    pilot: Annotated[bool, typer.Option(help="Train on a part of the data and measure.")] = False,
    pilot_rows: Annotated[
        int, typer.Option(min=1, help="About how many training rows the pilot takes.")
    ] = 800,
    config: Annotated[  # noqa: ARG001 - its callback reads it
        Path | None, config_option(passing_over=fit)
    ] = None,
    as_json: Json = False,
) -> None:
    """Before training: how sure will single scores be, and what would it take?

    The file of --config may be that of a fit: what only fit has is left aside.
    """
    from turnover.data.base import Columns, read_both
    from turnover.data.text import read
    from turnover.dropout.masks import MaskSpec
    from turnover.models.text import ClassifierConfig
    from turnover.tasks.class_weights import parse_class_weights
    from turnover.tasks.fit import FitConfig
    from turnover.tasks.plan import plan
    from turnover.tasks.training import TrainingConfig

    task = FitConfig(
        ClassifierConfig(model, head_units, lora_rank, max_tokens),
        TrainingConfig(
            epochs,
            batch_size,
            learning_rate,
            head_learning_rate,
            seed,
            parse_class_weights(class_weights),
        ),
        MaskSpec(keep, seed),
    )
    columns = Columns(text_column, label_column, id_column, group_column)
    output = Output(as_json=as_json)
    with reading(output):
        train_data, test_data = read_both(read, data, test, columns, split, test_split)
    rows = pilot_rows if pilot else None
    found = plan(task, train_data, test_data, seeds=seeds, top=top, pilot_rows=rows)
    say_rows(output, training=train_data, test=test_data)
    _print_plan(output, found)
    output.document(found.to_dict())


def print_fit(output: Output, metrics: dict[str, Any]) -> None:
    """What a fit measured."""
    table = Table("loss, nats", "exposed", "hidden")
    for name in ("train", "test"):
        values = (metrics["loss"][f"{name}_{side}"] for side in ("exposed", "hidden"))
        table.add_row(name, *(f"{value:.3f}" for value in values))
    output.say(table)
    accuracy = metrics["accuracy"]
    output.say(
        f"accuracy {accuracy['turnover']:.3f}"
        + (
            f", with ordinary dropout {accuracy['without_turnover']:.3f}"
            if "without_turnover" in accuracy
            else ""
        )
        + f", majority class {accuracy['majority']:.3f}; "
        f"{metrics['audit']['leaking_share']:.2%} of trainable scalars leak"
    )
    precision = metrics["precision"]
    if precision["stored"] != "float32":
        output.say(f"the encoder is stored in {precision['stored']}; here its weights are float32")
    if "class_weights" in metrics:
        weights = ", ".join(f"{name} {w:.3g}" for name, w in metrics["class_weights"].items())
        output.say(
            f"class weights in training: {weights}; losses and scores are not weighted, and gram takes "
            "all rows to weigh the same"
        )
    if metrics["accuracy_interval"]["turnover"][0] <= accuracy["majority"]:
        output.say(
            "the whole network is not better than the majority class. Masks never change, and a network "
            "can learn them by heart in place of its inputs: begin from pretrained weights, or give it "
            "more rows, fewer epochs or lower learning rates",
            style="yellow",
            highlight=False,
        )
    if not metrics["audit"]["clean"]:
        output.say(metrics["audit"]["report"], style="yellow", highlight=False)


def _print_plan(output: Output, plan: Plan) -> None:
    columns = ["mask units", "networks", "relative signal to noise"]
    if plan.pilot:
        columns += ["signal to noise", "noise, nats", f"z of number {plan.top}"]
        columns += ["q <= 0.05 per target"]
    title = f"{plan.asked.instances} training instances"
    table = Table(*columns, title=title, title_justify="left")
    for option in plan.options:
        cells = [f"{option.setting.units}", f"{option.setting.seeds}", f"{option.relative:.2g}"]
        if (expected := option.prediction) is not None:
            cells += [f"{expected.signal_to_noise:.2f}", f"{expected.noise_floor:.3g}"]
            cells += [f"{expected.top_z:.1f}", f"{expected.significant:.1f}"]
        table.add_row(*cells, style="bold" if option.setting == plan.asked else None)
    output.say(table)
    if plan.pilot is None:
        output.say(
            "All relative to the setting asked for (bold): how large the influences in this data are is "
            "not known before training. --pilot trains on a part of it and measures."
        )
        return
    strongest = f"the {plan.top} strongest instances of a target"
    if plan.needed_units is None:
        output.say(f"no number of units is known to resolve {strongest}: the pilot saw none so far")
    else:
        output.say(
            f"to resolve {strongest} (z of {plan.needed_z:.1f}, q <= 0.05): {plan.needed_units} mask "
            f"units in one network, or networks of {plan.asked.units}: {plan.needed_seeds}"
        )
    output.say(
        f"pilot: {plan.pilot.rows} rows, {plan.pilot.targets} targets, {plan.pilot.seconds:.0f} s; at "
        f"other widths multiply --head-learning-rate by sqrt({plan.asked.units} / units)"
    )
