"""Commands before and for training: ``plan`` and ``fit``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from turnover.cli.config import config_option, recipe
from turnover.cli.options import (
    DATA,
    IMAGE_MODEL,
    MASKS,
    MODEL,
    TEXT_MODEL,
    TRAIN,
    TRAINING,
    Device,
    Positive,
    folder_or_url,
)
from turnover.cli.output import Output
from turnover.cli.parameters import RUN, Fields, build, command, option_of
from turnover.cli.reading import Source, say_rows
from turnover.cli.scores import next_commands
from turnover.data.base import Data
from turnover.dropout.masks import MaskSpec
from turnover.dropout.sites import PRESETS
from turnover.errors import InputError
from turnover.io.memory import freed_memory_kept
from turnover.models.base import Config
from turnover.models.image import IMAGE_MODELS, ImageClassifierConfig
from turnover.models.pipeline import config_class
from turnover.models.vision import ImageEncoderConfig
from turnover.runs.run import check_new_run
from turnover.runs.run import data_digest as digest_of
from turnover.tasks import fit as fit_task
from turnover.tasks import plan as plan_task
from turnover.tasks.class_weights import parse_class_weights
from turnover.tasks.fit import FitConfig
from turnover.tasks.training import TrainingConfig

_EPOCHS = typer.Option(
    help="Passes over the training data; default: 3 for Hugging Face encoders, 10 for VGG."
)
_MODEL = Annotated[
    str, typer.Option(autocompletion=lambda: list(IMAGE_MODELS), rich_help_panel=MODEL)
]
_TRAIN = replace(TRAIN, types={**TRAIN.types, "epochs": Annotated[int | None, _EPOCHS]})
_SITES = typer.Option(
    help="Masked module, pattern or preset (lora, head, mlp, channels; repeatable); default: everything "
    "that is trained.",
    autocompletion=lambda: list(PRESETS),
)


def _digest_of_file(ctx: typer.Context, data_digest: str | None) -> str | None:
    """The digest asked for; one from a configuration file holds for the data named there alone."""
    names = [one.name for one in fields(Source)]
    sources = {
        name: ctx.get_parameter_source(name)
        for name in ("data", "image_size", "data_digest", *names)
    }
    given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    return data_digest if "data_digest" in given or not given else None


@command(
    Fields(Source, DATA),
    TEXT_MODEL,
    IMAGE_MODEL,
    _TRAIN,
    MASKS,
    Fields(
        FitConfig,
        TRAINING,
        ("sites", "compare", "memorization"),
        {"sites": Annotated[list[str] | None, _SITES]},
    ),
    config=config_option(),
)
def fit(
    data: Annotated[str, typer.Argument()],
    model: _MODEL,
    out: Annotated[Path, typer.Option(parser=folder_or_url, metavar="PATH", rich_help_panel=RUN)],
    output: Output,
    data_digest: Annotated[
        str | None, typer.Option(callback=_digest_of_file, rich_help_panel=DATA)
    ] = None,
    overwrite: Annotated[bool, typer.Option(rich_help_panel=RUN)] = False,
    device: Device = "auto",
    **options: Any,
) -> None:
    """Train a text or image classifier with turn-over dropout; writes a run folder.

    If it was interrupted, the same command resumes. Its fit.toml makes the run again:
    turnover fit --config RUN/fit.toml --out OTHER.

    Args:
        data: texts: CSV, TSV, JSON(L) or Parquet file. Images: a folder with one folder per class, or an
            .npz or Parquet file. Either: a Hugging Face data set, or a folder that holds one.
        model: Hugging Face name or folder of an encoder of texts or images, or vgg11, vgg13, vgg16 or vgg19.
        out: folder of the run to write, or its URL on a store (s3://...).
        data_digest: refuse training and test data with another digest; fit.toml in a run's folder holds
            its own.
        overwrite: replace an existing run.
    """
    check_new_run(out, overwrite=overwrite)
    shape = _shape(data, model, options)
    train_data, test_data = build(Source, options).read(data, shape)
    _say_data(output, train_data, test_data, held_out=options["test"] is None)
    found = digest_of(train_data, test_data)
    if data_digest not in (None, found):
        raise InputError(
            f"{data} or its test data changed: their digest is {found}, not {data_digest}; to train on "
            f"them as they are, give --data-digest {found}"
        )
    files = ("data", "test", "weights" if model in IMAGE_MODELS else "model")
    settings = {"data": data, "model": model, **options, "data_digest": found}
    with freed_memory_kept():
        metrics = fit_task.fit(
            _task(shape, options),
            train_data,
            test_data,
            out,
            overwrite=overwrite,
            recipe=recipe(settings, files),
            device=device,
        )
    print_fit(output, metrics)
    output.say(f"run: {out}; next: {next_commands(train_data, out, 'influence')}")
    output.document({"run": str(out), "metrics": metrics})


@command(
    Fields(Source, DATA),
    TEXT_MODEL,
    IMAGE_MODEL,
    _TRAIN,
    MASKS,
    config=config_option(ignoring=fit),
)
def plan(
    data: Annotated[str, typer.Argument()],
    model: _MODEL,
    output: Output,
    seeds: Positive = 1,
    top: Positive = 10,
    pilot: bool = False,
    pilot_rows: Positive = 800,
    device: Device = "auto",
    **options: Any,
) -> None:
    """Predict, before training, how well single scores can be resolved, and what it would take.

    --config accepts the file of a fit; options that plan does not have are ignored.

    Args:
        data: training data, as for fit.
        model: as for fit; of images an encoder, or a VGG with --weights.
        seeds: networks whose scores are averaged.
        top: strongest instances of a target to resolve.
        pilot: train on a part of the data and measure.
        pilot_rows: approximate number of training rows for the pilot.
    """
    shape = _shape(data, model, options)
    train_data, test_data = build(Source, options).read(data, shape)
    rows = pilot_rows if pilot else None
    found = plan_task.plan(
        _task(shape, options),
        train_data,
        test_data,
        seeds=seeds,
        top=top,
        pilot_rows=rows,
        device=device,
    )
    _say_data(output, train_data, test_data, held_out=options["test"] is None)
    _print_plan(output, found)
    output.document(found.to_dict() | {"device": device})


def _say_data(output: Output, train: Data, test: Data, *, held_out: bool) -> None:
    """Say how many rows there are of each, and where test rows come from."""
    say_rows(output, training=train, test=test)
    if held_out:
        output.say(
            "no --test: about a fifth of the rows, drawn by their ids, is held out for testing and is not "
            "trained on"
        )


def _shape(data: str, model: str, options: dict[str, Any]) -> Any:
    """Shape of the model, with its epochs in the options; refuses options of VGG for an encoder of images."""
    kind = config_class(model, data)
    if kind is ImageEncoderConfig:
        own = {one.name for one in fields(kind)}
        vgg = [one for one in fields(ImageClassifierConfig) if one.name not in own]
        names = {one.name: option_of(one.name) for one in vgg}
        given = [one.name for one in vgg if options[names[one.name]] != one.default]
        if given:
            raise InputError(
                f"--{names[given[0]].replace('_', '-')} is for VGG, and {model!r} has its own shape and "
                f"image processor: leave it out"
            )
    shape = build(kind, options, model=model)
    options["epochs"] = options["epochs"] or shape.epochs
    return shape


def _task(shape: Config, options: Mapping[str, Any]) -> FitConfig:
    weights = parse_class_weights(options["class_weights"])
    training = build(TrainingConfig, options, class_weights=weights)
    masks = build(MaskSpec, options)
    return build(FitConfig, options, classifier=shape, training=training, masks=masks)


def print_fit(output: Output, metrics: dict[str, Any]) -> None:
    """Print what a fit measured."""
    loss, accuracy, audit = metrics["loss"], metrics["accuracy"], metrics["audit"]
    output.table(
        ("loss, nats", "exposed", "hidden"),
        (
            (name, f"{loss[f'{name}_exposed']:.3f}", f"{loss[f'{name}_hidden']:.3f}")
            for name in ("train", "test")
        ),
    )
    without = accuracy.get("without_turnover")
    ordinary = "" if without is None else f", with ordinary dropout {without:.3f}"
    output.say(
        f"accuracy {accuracy['turnover']:.3f}{ordinary}, majority class {accuracy['majority']:.3f}; "
        f"{audit['leaking_share']:.2%} of trainable scalars leak"
    )
    stored = metrics["precision"]["stored"]
    if stored != "float32":
        output.say(f"the encoder is stored in {stored}; here its weights are float32")
    if "class_weights" in metrics:
        weights = ", ".join(f"{name} {w:.3g}" for name, w in metrics["class_weights"].items())
        output.say(
            f"class weights in training: {weights}; losses and scores are not weighted, and gram treats all "
            f"rows as weighing the same"
        )
    if metrics["accuracy_interval"]["turnover"][0] <= accuracy["majority"]:
        output.warn(
            "the whole network is not better than the majority class. Masks never change, and a network "
            "can memorize them instead of its inputs: begin from pretrained weights, or give it more "
            "rows, fewer epochs or lower learning rates"
        )
    if not audit["clean"]:
        output.warn(audit["report"])


def _print_plan(output: Output, plan: plan_task.TrainingPlan) -> None:
    columns = ["mask units", "networks", "relative signal to noise"]
    if plan.pilot:
        columns += ["signal to noise", "noise, nats", f"z of number {plan.top}"]
        columns += ["q <= 0.05 per target"]
    rows = []
    for option in plan.options:
        cells = [f"{option.setting.units}", f"{option.setting.seeds}", f"{option.relative:.2g}"]
        if (expected := option.prediction) is not None:
            cells += [f"{expected.signal_to_noise:.2f}", f"{expected.noise_floor:.3g}"]
            cells += [f"{expected.top_z:.1f}", f"{expected.significant:.1f}"]
        rows.append(cells)
    asked = [number for number, one in enumerate(plan.options) if one.setting == plan.asked]
    output.table(columns, rows, title=f"{plan.asked.instances} training instances", bold=asked)
    if plan.pilot is None:
        output.say(
            "All values are relative to the requested setting (*): how large the influences in this "
            "data are is unknown before training. --pilot trains on a part of it and measures."
        )
        return
    strongest = f"the {plan.top} strongest instances of a target"
    if plan.needed_units is None:
        output.say(f"no number of units is known to resolve {strongest}: the pilot saw no signal")
    else:
        output.say(
            f"to resolve {strongest} (z of {plan.needed_z:.1f}, q <= 0.05): {plan.needed_units} mask "
            f"units in one network, or networks of {plan.asked.units}: {plan.needed_seeds}"
        )
    output.say(
        f"pilot: {plan.pilot.rows} rows, {plan.pilot.targets} targets, {plan.pilot.seconds:.0f} s; at "
        f"other widths multiply --head-learning-rate by sqrt({plan.asked.units} / units)"
    )
