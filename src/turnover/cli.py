"""The command line: parses, calls, prints."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, pstdev
from typing import TYPE_CHECKING, Annotated, Any

from turnover.errors import InputError

if TYPE_CHECKING:
    from turnover.run import Run
    from turnover.tasks.cleanse import Cleansing
    from turnover.tasks.explain import Explanation
    from turnover.tasks.groups import Groups
    from turnover.tasks.memorize import Memorization
    from turnover.tasks.score import ScoreConfig

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError:  # the core installs without them
    sys.exit("the command line needs: pip install 'turnover[text]', or 'turnover[images]'")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Which training instances made this network predict that, and how sure is it?",
)
console = Console()

RunFolder = Annotated[Path, typer.Argument(help="Folder of a run, as written by `turnover fit`.")]
Method = Annotated[
    str,
    typer.Option(
        help="Estimator: linear, exact, rerank (linear, then exact for the ends), or auto (the most "
        "exact within --seconds)."
    ),
]
Objective = Annotated[str, typer.Option(help="Cost of a prediction: margin or cross_entropy.")]
Ghosts = Annotated[int, typer.Option(help="Ghosts that fit the noise floor.")]
Gram = Annotated[
    bool, typer.Option(help="Also estimate by gram, which takes a pass over the training data.")
]

DataSource = Annotated[
    str,
    typer.Argument(
        help="Texts: CSV, TSV, JSON(L) or Parquet file. Images: a folder with a folder for each class, or "
        "an .npz or Parquet file. Or a Hugging Face data set."
    ),
]
TextFile = Annotated[
    str, typer.Argument(help="CSV, TSV, JSON(L) or Parquet file, or Hugging Face data set.")
]
Encoder = Annotated[str, typer.Option(help="Hugging Face name or folder of the encoder.")]
TestData = Annotated[
    str | None, typer.Option(help="Test data; without it a fifth of the data is held out.")
]
IdColumn = Annotated[str | None, typer.Option(help="Distinct instance ids.")]
GroupColumn = Annotated[
    str | None, typer.Option(help="Rows with one value share one mask (source, annotator).")
]
Split = Annotated[str, typer.Option(help="Split of a Hugging Face data set.")]
TestSplit = Annotated[str, typer.Option(help="Split for --test, likewise.")]
LearningRate = Annotated[float, typer.Option(help="Of the LoRA components.")]
HeadLearningRate = Annotated[float, typer.Option(help="Of the wide head.")]
HeadUnits = Annotated[int, typer.Option(help="Mask units of the wide head.")]
Keep = Annotated[float, typer.Option(help="Share of units an instance trains.")]
Seed = Annotated[int, typer.Option(help="Of masks, weights and order.")]


@app.command()
def fit(
    data: DataSource,
    model: Annotated[
        str,
        typer.Option(
            help="Hugging Face name or folder of a text encoder, or vgg11, vgg13, vgg16, vgg19 for images."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run to write.")],
    test: TestData = None,
    text_column: str = "text",
    image_column: Annotated[str, typer.Option(help="Column or array of the images.")] = "image",
    label_column: str = "label",
    id_column: IdColumn = None,
    group_column: GroupColumn = None,
    split: Split = "train",
    test_split: TestSplit = "test",
    epochs: Annotated[int | None, typer.Option(help="Default: 3 for texts, 10 for images.")] = None,
    batch_size: int = 32,
    learning_rate: LearningRate = 1e-3,
    head_learning_rate: HeadLearningRate = 1e-4,
    head_units: HeadUnits = 8192,
    lora_rank: int = 16,
    max_tokens: int = 128,
    image_size: Annotated[
        int, typer.Option(help="Height and width the images are brought to, a multiple of 32.")
    ] = 32,
    width: Annotated[int, typer.Option(help="Channels of the first convolution (images).")] = 64,
    hidden: Annotated[int, typer.Option(help="Units of the hidden layers (images).")] = 4096,
    augment: Annotated[bool, typer.Option(help="Shift and mirror the images in training.")] = True,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Pretrained weights of the VGG (safetensors, torchvision's names): its convolutions "
            "stay frozen below a wide head."
        ),
    ] = None,
    keep: Keep = 0.5,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="Masked module, pattern or preset (repeatable); default: all that is trained."
        ),
    ] = None,
    seed: Seed = 0,
    compare: Annotated[
        bool, typer.Option(help="Also train the same model with ordinary dropout.")
    ] = True,
    memorization: Annotated[
        bool,
        typer.Option(
            "--memorization", help="Follow the losses of every training row, for turnover memorize."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing run.")] = False,
) -> None:
    """Train a text or image classifier with turn-over dropout; writes a run folder."""
    from turnover.data import Columns, Data, read, read_both
    from turnover.images import read_images
    from turnover.integrations.transformers import ClassifierConfig
    from turnover.masks import MaskSpec
    from turnover.pipelines import IMAGE_MODELS, Config, ImageClassifierConfig
    from turnover.tasks.fit import FitConfig, fit
    from turnover.tasks.training import TrainingConfig

    of_images = model in IMAGE_MODELS
    if of_images:
        file = None if weights is None else str(weights)
        shape: Config = ImageClassifierConfig(
            model, image_size, width, hidden, augment, file, head_units
        )
    else:
        if Path(data).is_dir() or data.endswith(".npz"):
            raise InputError(f"{data} holds images: give --model {' or '.join(IMAGE_MODELS)}")
        shape = ClassifierConfig(model, head_units, lora_rank, max_tokens)
    passes = epochs if epochs is not None else (10 if of_images else 3)
    config = FitConfig(
        shape,
        TrainingConfig(passes, batch_size, learning_rate, head_learning_rate, seed),
        MaskSpec(keep, seed),
        tuple(site or ()),
        compare,
        memorization=memorization,
    )
    columns = Columns(
        image_column if of_images else text_column, label_column, id_column, group_column
    )
    reader: Callable[..., Data] = partial(read_images, size=image_size) if of_images else read
    train_data, test_data = read_both(reader, data, test, columns, split, test_split)
    metrics = fit(config, train_data, test_data, out, overwrite=overwrite)
    _print_fit(metrics)
    console.print(f"run: {out}; next: turnover influence {out}")


@app.command()
def plan(
    data: TextFile,
    model: Encoder,
    test: TestData = None,
    text_column: str = "text",
    label_column: str = "label",
    id_column: IdColumn = None,
    group_column: GroupColumn = None,
    split: Split = "train",
    test_split: TestSplit = "test",
    epochs: int = 3,
    batch_size: int = 32,
    learning_rate: LearningRate = 1e-3,
    head_learning_rate: HeadLearningRate = 1e-4,
    head_units: HeadUnits = 8192,
    lora_rank: int = 16,
    max_tokens: int = 128,
    keep: Keep = 0.5,
    seed: Seed = 0,
    seeds: Annotated[int, typer.Option(help="Networks whose scores are averaged.")] = 1,
    top: Annotated[int, typer.Option(help="Strongest instances of a target to resolve.")] = 10,
    pilot: Annotated[
        bool, typer.Option("--pilot", help="Train on a part of the data and measure.")
    ] = False,
    pilot_rows: Annotated[int, typer.Option(help="About how many training rows.")] = 800,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Before training: how sure will single scores be, and what would it take?"""
    from turnover.data import Columns, read, read_both
    from turnover.integrations.transformers import ClassifierConfig
    from turnover.masks import MaskSpec
    from turnover.tasks.fit import FitConfig
    from turnover.tasks.plan import plan
    from turnover.tasks.training import TrainingConfig

    config = FitConfig(
        ClassifierConfig(model, head_units, lora_rank, max_tokens),
        TrainingConfig(epochs, batch_size, learning_rate, head_learning_rate, seed),
        MaskSpec(keep, seed),
    )
    columns = Columns(text_column, label_column, id_column, group_column)
    train_data, test_data = read_both(read, data, test, columns, split, test_split)
    rows = pilot_rows if pilot else None
    found = plan(config, train_data, test_data, seeds=seeds, top=top, pilot_rows=rows)
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=2) + "\n")
        return
    _print_plan(found)


@app.command()
def influence(
    run: RunFolder,
    method: Method = "linear",
    objective: Objective = "margin",
    ghosts: Ghosts = 4000,
    site: Annotated[
        list[str] | None,
        typer.Option(
            help="Scored site or pattern (repeatable), '*' for all; default: those that carry more "
            "signal than noise."
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="What --method auto may take.")] = 60.0,
    explain_plan: Annotated[
        bool,
        typer.Option(
            "--explain-plan",
            help="Print estimated time, memory and noise of each method, and stop.",
        ),
    ] = False,
    gram: Gram = True,
) -> None:
    """Estimate influence on every misclassified test row, on the whole test set, and on itself."""
    from turnover.run import Run
    from turnover.tasks.score import ScoreConfig
    from turnover.tasks.score import explain_plan as explained

    sites = tuple(site) if site else None
    config = ScoreConfig(method, objective, ghosts, sites, seconds, gram)
    loaded = Run.load(run)
    if explain_plan:
        plan = explained(loaded, config)
        sys.stdout.write(f"{plan or 'no misclassified test rows: nothing to score'}\n")
        return
    _score(loaded, config)


@app.command()
def explain(
    run: RunFolder,
    show: Annotated[int, typer.Option(help="Errors to print; all are written.")] = 3,
    top: Annotated[int, typer.Option(help="Training instances on each side.")] = 5,
    among: Annotated[
        str | None,
        typer.Option(
            help="List training instances of this class alone: predicted or true. Default: of all."
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Explain this text instead.")] = None,
    image: Annotated[Path | None, typer.Option(help="Explain this image file instead.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Class to explain it for; default: as predicted.")
    ] = None,
    gram: Annotated[
        bool, typer.Option(help="Explain it by gram as well: a pass over the training data.")
    ] = True,
    sheet: Annotated[
        Path | None, typer.Option(help="Also write a contact sheet of what is shown (PNG; images).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Explain misclassified test rows, or one text or image, by training instances."""
    from turnover.images import ImageData
    from turnover.run import Run
    from turnover.tasks.explain import AMONG
    from turnover.tasks.score import explain_input

    if show < 0 or top < 1:
        raise InputError("--show must be >= 0 and --top >= 1")
    if among is not None and among not in AMONG:
        raise InputError(f"unknown --among {among!r}; choose {' or '.join(AMONG)}")
    if text is not None and image is not None:
        raise InputError("give --text or --image, not both")
    loaded = Run.load(run)
    if sheet is not None:
        from turnover.report.pictures import check_sheet

        if not isinstance(loaded.train, ImageData):
            raise InputError("--sheet is for images; texts are in the report (turnover report)")
        check_sheet(sheet)
    given = text if text is not None else image
    if given is None:
        shown = _explain_errors(loaded, show=show, top=top, among=among, as_json=as_json)
        targets = loaded.test
    else:
        explained, targets = explain_input(loaded, given, label, top=top, among=among, gram=gram)
        shown = [explained]
        _print_explanations(shown, as_json=as_json)
    if sheet is not None:
        from turnover.report.pictures import write_sheet

        assert isinstance(loaded.train, ImageData)
        assert isinstance(targets, ImageData)
        write_sheet(shown, loaded.train, targets, sheet)
        if not as_json:
            console.print(f"contact sheet: {sheet}")


@app.command()
def memorize(
    run: RunFolder,
    show: Annotated[int, typer.Option(help="Rows to print; all are written.")] = 5,
) -> None:
    """What was learned by heart, and when, in a run trained with --memorization."""
    from turnover.run import Run
    from turnover.tasks.memorize import memorization, write_memorization

    if show < 0:
        raise InputError("--show must be >= 0")
    loaded = Run.load(run)
    found = memorization(loaded)
    path = _in_results(run, "memorization.csv")
    write_memorization(loaded, found, path)
    _print_memorization(loaded, found, show)
    console.print(f"all rows: {path}")


@app.command()
def groups(
    run: RunFolder,
    method: Annotated[str, typer.Option(help="Estimator: linear or exact.")] = "linear",
    objective: Objective = "margin",
    show: Annotated[
        int, typer.Option(help="Groups at either end to print, and to predict without.")
    ] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What each group (source, annotator) of a run with a group column did to the test rows."""
    from turnover.run import Run, write_json
    from turnover.tasks.groups import groups
    from turnover.tasks.score import OBJECTIVES

    if show < 0:
        raise InputError("--show must be >= 0")
    if method not in ("linear", "exact"):
        raise InputError(f"unknown method {method!r} for groups: choose linear or exact")
    if objective not in OBJECTIVES:
        raise InputError(f"unknown objective {objective!r}; there are {', '.join(OBJECTIVES)}")
    found = groups(Run.load(run), OBJECTIVES[objective], method=method, predict=show)
    path = _in_results(run, "groups.json")
    write_json(path, found.to_dict())
    if as_json:
        sys.stdout.write(json.dumps(found.to_dict(), indent=2) + "\n")
        return
    _print_groups(found)
    console.print(f"all groups: {path}")


@app.command()
def predict(
    run: RunFolder,
    hidden: Annotated[
        bool,
        typer.Option(
            "--hidden",
            help="Predict the training rows, each by the network that never learned it, in place of "
            "the test rows.",
        ),
    ] = False,
    without: Annotated[
        str | None,
        typer.Option(
            help="Predict the test rows without this training instance or group (its key)."
        ),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option(help="Calibrate --hidden on the test rows and their labels.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="CSV; default: in the run's results.")] = None,
) -> None:
    """Write predictions as CSV: of the test rows, or out of sample of the training rows."""
    from turnover.run import Run
    from turnover.tasks.predict import predict_test, predict_training, write_predictions

    if hidden and without is not None:
        raise InputError(
            "--hidden predicts training rows, --without test rows: give one of the two"
        )
    name = "hidden_predictions.csv" if hidden else "predictions.csv"
    if out is not None and not out.parent.is_dir():
        raise InputError(f"{out.parent} does not exist: make the folder first")
    loaded = Run.load(run)
    if hidden:
        found = predict_training(loaded, calibrate=calibrate)
        data, probabilities = loaded.train, found.probabilities
        console.print(
            f"share of the exposed network {found.exposed_share:.2f}, temperature "
            f"{found.temperature:.2f}"
        )
    else:
        data, probabilities = loaded.test, predict_test(loaded, without=without)
    path = out or _in_results(run, name)
    write_predictions(data, probabilities, path)
    right = probabilities.argmax(axis=1) == data.labels
    console.print(f"accuracy {right.mean():.3f}; {len(data)} rows: {path}")


@app.command()
def review(
    run: RunFolder,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The list to review (CSV); with --decisions the data set after them. Default: in the "
            "run's results."
        ),
    ] = None,
    budget: Annotated[int, typer.Option(help="At most so many rows to review.")] = 100,
    decisions: Annotated[
        Path | None,
        typer.Option(help="The list with its column decision filled in: keep, remove or a class."),
    ] = None,
) -> None:
    """List training rows with doubtful labels, or write the data set after the decisions on them."""
    from turnover.data import check_writable
    from turnover.run import Run
    from turnover.tasks.review import apply_decisions, review, write_review

    name = "review.csv" if decisions is None else "decided.csv"
    if out is not None:
        check_writable(out, ".npz")
        if decisions is None and out.suffix != ".csv":
            raise InputError(f"{out}: the list to review is a CSV file")
    loaded = Run.load(run)
    if decisions is not None:
        path = out or _in_results(run, name)
        counts = apply_decisions(loaded, decisions, path)
        said = ", ".join(f"{count} {name}" for name, count in counts.items())
        console.print(f"{said}: {path}")
        return
    flagged = review(loaded, budget=budget)
    path = out or _in_results(run, name)
    write_review(flagged, path)
    console.print(
        f"{len(flagged)} training rows whose label the network that never learned them does not share: "
        f"{path}\nfill in the column decision (keep, remove or a class), then: turnover review "
        f"{run} --decisions {path} --out cleaned.csv",
        highlight=False,
    )


@app.command()
def cleanse(
    run: RunFolder,
    validation: Annotated[
        str, typer.Option(help="Rows to predict better: a file or Hugging Face data set.")
    ],
    out: Annotated[Path, typer.Option(help="Data set without the rows that were taken out.")],
    ranking: Annotated[
        str | None,
        typer.Option(
            help="Influence on the validation rows by gram (the default) or turn-over, or self: what "
            "was learned by heart."
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(help="Your own ranking: CSV with key and score, positive = helpful."),
    ] = None,
    fraction: Annotated[
        list[float] | None,
        typer.Option(help="Share to take out (repeatable); default: 0.01 0.02 0.05 0.1 0.2."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Heads trained without each share.")] = 3,
    text_column: str = "text",
    image_column: str = "image",
    label_column: str = "label",
    split: Annotated[str, typer.Option(help="Split of a Hugging Face data set.")] = "validation",
) -> None:
    """Take training rows out for a validation set's sake, and measure what that is worth.

    New heads on the pretrained encoder's features are trained without them; the run stays as it is.
    """
    from turnover.data import Columns, Data, check_writable, read
    from turnover.images import read_images
    from turnover.pipelines import ImagePipeline
    from turnover.run import Run, write_json
    from turnover.tasks.cleanse import FRACTIONS, cleanse, read_scores, write_cleansed

    if ranking is not None and scores is not None:
        raise InputError("--ranking and --scores are two rankings: give one of them")
    check_writable(out, ".npz")
    loaded = Run.load(run)
    given = None if scores is None else read_scores(loaded, scores)
    classes = loaded.train.classes
    held: Data
    if isinstance(loaded.pipeline, ImagePipeline):
        columns, size = Columns(image_column, label_column), loaded.pipeline.config.size
        held = read_images(validation, size, columns, classes=classes, split=split)
    else:
        columns = Columns(text_column, label_column)
        held = read(validation, columns, classes=classes, split=split)
    found = cleanse(
        loaded,
        held,
        ranking=ranking or "gram",
        scores=given,
        fractions=fraction or FRACTIONS,
        seeds=seeds,
    )
    removed = _in_results(run, "removed.csv")
    write_cleansed(loaded, found, out, removed)
    write_json(_in_results(run, "cleanse.json"), found.to_dict())
    _print_cleansing(found)
    console.print(f"{len(found.removed)} rows taken out: {removed}; the others: {out}")


@app.command()
def report(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the run.")] = None,
    text: Annotated[
        bool, typer.Option(help="Show texts and images; --no-text leaves them out.")
    ] = True,
) -> None:
    """Write the run's report: one HTML file that needs nothing else."""
    from turnover.run import Run

    _write_report(Run.load(run), out or run / "report.html", texts=text)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run to write.")] = Path("runs/demo"),
    head_units: int = 32768,
    seed: int = 0,
) -> None:
    """Fine-tune a real BERT on 3,000 movie-review sentences and explain its errors."""
    from turnover.demo import model_folder, write_sentences
    from turnover.run import Run
    from turnover.tasks.score import ScoreConfig

    train_file, test_file = write_sentences(out.parent / f"{out.name}-data")
    fit(
        str(train_file),
        model=str(model_folder()),
        out=out,
        test=str(test_file),
        id_column="id",
        head_units=head_units,
        head_learning_rate=5e-5,
        seed=seed,
        overwrite=True,
    )
    run = Run.load(out)
    _score(run, ScoreConfig())
    _explain_errors(run, show=3, top=5, among=None, as_json=False)
    _write_report(run, out / "report.html", texts=True)


def _score(run: Run, config: ScoreConfig) -> None:
    from turnover.tasks.score import score

    _print_influence(score(run, config))
    console.print(f"next: turnover explain {run.folder}, turnover report {run.folder}")


def _explain_errors(
    run: Run, *, show: int, top: int, among: str | None, as_json: bool
) -> list[Explanation]:
    from turnover.report.from_run import explain_errors
    from turnover.run import write_json

    explanations = explain_errors(run, top=top, among=among)
    path = run.folder / "results" / "explanations.json"
    write_json(path, {"errors": [explanation.to_dict() for explanation in explanations]})
    explanations.sort(key=lambda explanation: -explanation.n_significant)
    _print_explanations(explanations[:show], as_json=as_json)
    if not as_json:
        console.print(f"all errors: {path}")
    return explanations[:show]


def _write_report(run: Run, out: Path, *, texts: bool) -> None:
    from turnover.report.from_run import content
    from turnover.report.render import write

    commands = tuple(
        f"turnover {command} {shlex.quote(str(run.folder))}"
        for command in ("influence", "explain", "report")
    )
    title = f"{run.folder.resolve().name}: which training instances are behind its errors"
    write(content(run, title=title, commands=commands), out, texts=texts)
    console.print(f"report: {out}")


def _print_fit(metrics: dict[str, Any]) -> None:
    table = Table("loss, nats", "exposed", "hidden")
    for name in ("train", "test"):
        values = (metrics["loss"][f"{name}_{side}"] for side in ("exposed", "hidden"))
        table.add_row(name, *(f"{value:.3f}" for value in values))
    console.print(table)
    accuracy = metrics["accuracy"]
    console.print(
        f"accuracy {accuracy['turnover']:.3f}"
        + (
            f", with ordinary dropout {accuracy['without_turnover']:.3f}"
            if "without_turnover" in accuracy
            else ""
        )
        + f", majority class {accuracy['majority']:.3f}; "
        f"{metrics['audit']['leaking_share']:.2%} of trainable scalars leak"
    )
    if metrics["accuracy_interval"]["turnover"][0] <= accuracy["majority"]:
        console.print(
            "the whole network is not better than the majority class. Masks never change, and a network "
            "can learn them by heart in place of its inputs: begin from pretrained weights, or give it "
            "more rows, fewer epochs or lower learning rates",
            style="yellow",
            highlight=False,
        )
    if not metrics["audit"]["clean"]:
        console.print(metrics["audit"]["report"], style="yellow", markup=False, highlight=False)


def _print_plan(plan: Any) -> None:
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
    console.print(table)
    if plan.pilot is None:
        console.print(
            "All relative to the setting asked for (bold): how large the influences in this data are is "
            "not known before training. --pilot trains on a part of it and measures."
        )
        return
    strongest = f"the {plan.top} strongest instances of a target"
    if plan.needed_units is None:
        console.print(
            f"no number of units is known to resolve {strongest}: the pilot saw none so far"
        )
    else:
        console.print(
            f"to resolve {strongest} (z of {plan.needed_z:.1f}, q <= 0.05): {plan.needed_units} mask "
            f"units in one network, or networks of {plan.asked.units}: {plan.needed_seeds}"
        )
    console.print(
        f"pilot: {plan.pilot.rows} rows, {plan.pilot.targets} targets, {plan.pilot.seconds:.0f} s; at "
        f"other widths multiply --head-learning-rate by sqrt({plan.asked.units} / units)"
    )


def _print_influence(metrics: dict[str, Any]) -> None:
    found = metrics["influence"]
    if not metrics["errors_explained"]:
        console.print("no misclassified test rows")
        return
    console.print(
        f"{metrics['errors_explained']} errors x {metrics['n_train']} training instances: "
        f"{metrics['significant_pairs']} pairs with q <= 0.05, on "
        f"{found['errors_with_significant_pairs']} errors; fresh ghosts at p < 0.01: "
        f"{metrics['ghost_false_positive_rate']:.4f}; {metrics['seconds']['influence']:.0f} s"
    )


def _in_results(run: Path, name: str) -> Path:
    """A file in the results of a run, whose folder may not be there before influence is estimated."""
    folder = run / "results"
    folder.mkdir(exist_ok=True)
    return folder / name


def _print_memorization(run: Run, found: Memorization, show: int) -> None:
    epochs = len(found.exposed)
    table = Table("mean loss, nats", "network", *(f"epoch {epoch + 1}" for epoch in range(epochs)))
    for name, sides in found.curves().items():
        for side, losses in zip(("exposed", "hidden"), sides, strict=True):
            table.add_row(name, side, *(f"{loss:.3f}" for loss in losses))
    console.print(table)
    listed = Table("hidden - exposed", "label", "training row most learned by heart")
    for row in (-found.by_heart).argsort(kind="stable")[:show]:
        label = run.train.classes[run.train.labels[row]]
        text = f"[{run.train.keys[row]}] {run.train.shown(row)}"
        listed.add_row(f"{found.by_heart[row]:+.3f}", label, text)
    if show:
        console.print(listed, markup=False)


def _print_groups(found: Groups) -> None:
    table = Table("group", "rows", "nats", "z", "q", "accuracy with", "without")
    for one in found.groups:
        if one.accuracy_with is None or one.accuracy_without is None:
            continue
        style = "bold" if one.significant else None
        cells = [one.key, str(one.rows), f"{one.score:+.4f}", f"{one.z:+.1f}", f"{one.q:.2g}"]
        cells += [f"{one.accuracy_with:.3f}", f"{one.accuracy_without:.3f}"]
        table.add_row(*cells, style=style)
    console.print(table, markup=False)
    console.print(
        f"{sum(one.significant for one in found.groups)} of {len(found.groups)} groups have q <= 0.05 "
        f"(bold); whole network {found.accuracy:.3f}; by chance (without - with) differs by "
        f"{found.accuracy_spread:.3f}"
    )


def _print_cleansing(found: Cleansing) -> None:
    for title, points in (("validation", found.curve), ("test", found.test)):
        table = Table(
            "taken out by",
            "share",
            "rows",
            "accuracy",
            "loss, nats",
            title=title,
            title_justify="left",
        )
        for one in points:
            figures = (f"{mean(v):.3f} ± {pstdev(v):.3f}" for v in (one.accuracy, one.loss))
            table.add_row(one.removal, f"{100 * one.fraction:g}%", str(one.removed), *figures)
        console.print(table)
    console.print(
        f"heads on the pretrained encoder's features, mean ± standard deviation over "
        f"{len(found.curve[0].loss)} seeds; on the test rows at the share with the ranking's lowest "
        f"loss on the validation rows"
    )


def _print_explanations(explanations: list[Explanation], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps([e.to_dict() for e in explanations], indent=2) + "\n")
        return
    from turnover.tasks.explain import GRAM_MEANS, TURNOVER_MEANS

    for explanation in explanations:
        _print_explanation(explanation)
    if any(explanation.gram for explanation in explanations):
        for meaning in (TURNOVER_MEANS, GRAM_MEANS):
            console.print(meaning, markup=False, highlight=False)


def _print_explanation(explanation: Explanation) -> None:
    from turnover.tasks.explain import NOT_SIGNIFICANT

    table = Table(
        "",
        "label",
        "nats",
        "z",
        "q",
        "training instance",
        title=(
            f"{explanation.text}\n{explanation.true_label}, predicted {explanation.predicted_label} "
            f"({explanation.confidence:.0%})"
        ),
        title_justify="left",
    )
    for side, instances in (("helpful", explanation.helpful), ("harmful", explanation.harmful)):
        for one in instances:
            q = f"{one.q:.2g}" if one.significant else f"{one.q:.2f} {NOT_SIGNIFICANT}"
            table.add_row(
                side, one.label, f"{one.score:+.3f}", f"{one.z:+.1f}", q, f"[{one.key}] {one.text}"
            )
    console.print(table, markup=False)
    if explanation.gram is None:
        return
    table = Table("gram", "label", "nats", "standard error", "training instance")
    beside = (("helpful", explanation.gram.helpful), ("harmful", explanation.gram.harmful))
    for side, listed in beside:
        for item in listed:
            error = f"{item.standard_error:.3f}"
            text = f"[{item.key}] {item.text}"
            table.add_row(side, item.label, f"{item.score:+.3f}", error, text)
    console.print(table, markup=False)


def main() -> None:
    """Entry point; bad input is one line on stderr and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except InputError as error:
        sys.stderr.write(f"turnover: {error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("turnover: interrupted; the same command resumes where it can\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
