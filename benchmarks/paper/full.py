"""What users train: a real BERT fine-tuned on another domain's sentences, and a larger VGG. Hours.

``turnover fit`` trains the BERT on all rows and on what every cleansing leaves; its ``turnover cleanse``
ranks by heads on frozen features, and whether that carries over to the network that is fine-tuned is
what is asked here. Finished trainings in the folder are not run again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from turnover import evaluation
from turnover.data import demo
from turnover.data.images import ImageData
from turnover.data.text import TextData
from turnover.evaluation import Recipe
from turnover.io.files import replacing
from turnover.io.parsing import read_json
from turnover.models.image import ImageClassifierConfig
from turnover.models.text import ClassifierConfig
from turnover.models.vgg import VGG
from turnover.report.from_run import content
from turnover.report.pictures import write_sheet
from turnover.report.render import write
from turnover.runs.run import Run
from turnover.tasks.cleanse import LOSS, NONE, RANDOM, cleanse, taken_out
from turnover.tasks.explain import explain_errors
from turnover.tasks.fit import FitConfig, fit
from turnover.tasks.score import ScoreConfig, score
from turnover.tasks.training import TrainingConfig, evaluate, logits_of_rows

from . import hidden, images, shift

Json = dict[str, Any]

GRAM, MASKS = "gram", "turn-over"
SETS = (NONE, RANDOM, LOSS, GRAM, MASKS)
SHOWN = 24
_CLASSES = ["negative", "positive"]
_KINDS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_CONVOLUTIONS = Recipe(epochs=12, learning_rate=5e-4, batch_size=50, optimizer="adam")
_HEAD = TrainingConfig(epochs=20, head_learning_rate=1e-4)


@dataclass(frozen=True)
class Design:
    """How much of everything.

    Attributes:
        classifier: the BERT.
        training: its fine-tuning.
        rows: training rows, drawn from the films.
        own_rows: other films to test on.
        held_out: validation rows, drawn from the electronics; the others are the test rows.
        seeds: fine-tunings on every set.
        heads: seeds of the heads that the cleansing trains.
        fractions: shares that it tries.
    """

    classifier: ClassifierConfig
    training: TrainingConfig
    rows: int = 6000
    own_rows: int = 1000
    held_out: int = 1200
    seeds: int = 1
    heads: int = 2
    fractions: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2)


def bert(data: Path | None, folder: Path, seeds: int) -> Json:
    """Cleansing for another domain, and what is behind the errors on the own one."""
    films, electronics = (_texts(data, name) for name in (shift.FILMS, shift.ELECTRONICS))
    design = Design(ClassifierConfig(str(demo.model_folder())), TrainingConfig(), seeds=seeds)
    return figures(films, electronics, design, folder / "full-bert")


def figures(films: TextData, electronics: TextData, design: Design, folder: Path) -> Json:
    """Fine-tune on all rows, cleanse, fine-tune without what was taken out, explain the errors."""
    generator = np.random.default_rng(0)
    mine = generator.permutation(len(films))[: design.rows + design.own_rows].tolist()
    drawn = generator.permutation(len(electronics)).tolist()
    train, own = films.take(mine[: design.rows]), films.take(mine[design.rows :])
    held, test = (
        electronics.take(drawn[: design.held_out]),
        electronics.take(drawn[design.held_out :]),
    )

    def tuned(name: str, seed: int, gone: NDArray[np.int64]) -> Run:
        kept = train.take(np.delete(np.arange(len(train)), gone).tolist())
        training = TrainingConfig(**{**vars(design.training), "seed": seed})
        return fitted(
            FitConfig(design.classifier, training, compare=False),
            kept,
            own,
            folder / f"{name}-{seed}",
        )

    whole = tuned(NONE, 0, np.empty(0, dtype=np.int64))
    out = removals(whole, held, design)
    found: Json = {}
    right: dict[str, list[Tensor]] = {}
    for name in SETS:
        runs = [tuned(name, seed, out[name][seed]) for seed in range(design.seeds)]
        found[name], right[name] = measured(runs, held, test)
        found[name]["removed"] = len(out[name][0])
        print(name, found[name], flush=True)
    return {
        "rows": design.rows,
        "held_out": design.held_out,
        "test_rows": len(test),
        "seeds": design.seeds,
        "epochs": design.training.epochs,
        "sets": found,
        "against": {
            name: {other: paired(right[name], right[other]) for other in SETS if other != name}
            for name in (GRAM, MASKS)
        },
        **curves(whole),
        **explained(whole, gram=False),
    }


def fitted(config: FitConfig, train: Any, test: Any, folder: Path) -> Run:
    """The run in a folder, fitted where it is not there yet."""
    if not folder.exists():
        fit(config, train, test, folder)
    return Run.load(folder)


def removals(whole: Run, held: TextData, design: Design) -> dict[str, list[NDArray[np.int64]]]:
    """Rows taken out of each set, seed by seed: as many at random and by loss as by gram."""
    ranked = {}
    for name in (GRAM, MASKS):
        path = whole.folder.parent / f"removed-{name}.npy"
        if not path.exists():
            taken = cleanse(
                whole, held, ranking=name, fractions=design.fractions, seeds=design.heads
            ).removed
            with replacing(path) as draft, draft.open("wb") as file:
                np.save(file, taken, allow_pickle=False)
        ranked[name] = np.load(path, allow_pickle=False)
    rows = len(whole.train)
    losses = evaluate(
        whole.model, whole.encode(whole.train), range(rows), lambda _: whole.network.mean()
    ).loss
    count = len(ranked[GRAM])
    order = np.argsort(-losses.numpy(), kind="stable")
    every = range(design.seeds)
    return {
        NONE: [np.empty(0, dtype=np.int64) for _ in every],
        RANDOM: [taken_out(None, count / rows, rows, seed)[:count] for seed in every],
        LOSS: [order[:count] for _ in every],
        **{name: [taken for _ in every] for name, taken in ranked.items()},
    }


def measured(runs: Sequence[Run], held: TextData, test: TextData) -> tuple[Json, list[Tensor]]:
    """Accuracy and loss on the test rows, and which of them are right, by each network.

    *Calibrated*: with threshold and temperature fitted on the validation rows.
    """
    figures: dict[str, list[float]] = {
        f"{name}{mended}": [] for mended in ("", "_calibrated") for name in ("accuracy", "loss")
    }
    own = [read_json(run.folder / "metrics.json")["accuracy"]["turnover"] for run in runs]
    right = []
    for run in runs:
        held_logits, test_logits = (logits(run, data) for data in (held, test))
        mend = shift.calibrated(held_logits, torch.tensor(held.labels))
        labels = torch.tensor(test.labels)
        right.append(test_logits.argmax(dim=1) == labels)
        for mended, given in (("", test_logits), ("_calibrated", mend(test_logits))):
            accuracy, loss = shift.judged(given, labels)
            figures[f"accuracy{mended}"].append(round(accuracy, 4))
            figures[f"loss{mended}"].append(round(loss, 4))
    return {**figures, "accuracy_films": [round(one, 4) for one in own]}, right


def logits(run: Run, data: TextData) -> Tensor:
    """Logits (rows, classes) of the whole network."""
    return logits_of_rows(
        run.model, run.encode(data), range(len(data)), lambda _: run.network.mean()
    )


def paired(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> list[float]:
    """Difference of accuracies and its standard error over the test rows, each a mean over seeds."""
    means = [torch.stack(list(side)).double().mean(dim=0) for side in (ours, theirs)]
    difference = means[0] - means[1]
    error = float(difference.std()) / len(difference) ** 0.5
    return [round(float(difference.mean()), 4), round(error, 4)]


def curves(run: Run) -> Json:
    """What the run says of exposed and hidden losses, and whether its hidden networks did not learn."""
    metrics = read_json(run.folder / "metrics.json")
    return hidden.followed_by_fit(metrics, len(run.test), len(run.train.classes))


def explained(run: Run, *, gram: bool) -> Json:
    """Score the errors, and write the report and, of images, the contact sheet."""
    metrics = read_json(run.folder / "metrics.json")
    if "influence" not in metrics:
        metrics = score(run, ScoreConfig(gram=gram))
    errors = explain_errors(run, top=5)
    write(content(run, title="errors", commands=()), run.folder / "report.html")
    if isinstance(run.train, ImageData) and isinstance(run.test, ImageData):
        write_sheet(errors[:SHOWN], run.train, run.test, run.folder / "errors.png")
    return {
        "errors": metrics["errors_explained"],
        "errors_with_significant": metrics["influence"]["errors_with_significant_pairs"],
        "significant_pairs": metrics["significant_pairs"],
        "ghost_false_positives": round(metrics["ghost_false_positive_rate"], 5),
        "most_significant_on_one": max(one.n_significant for one in errors),
        "mean_significant": round(mean(one.n_significant for one in errors), 1),
    }


@dataclass(frozen=True)
class Deep:
    """The larger VGG.

    Attributes:
        depth: of the VGG.
        width: channels of its first convolution.
        recipe: by which the convolutions are trained, on other images.
        head_units: of the wide head on them.
        training: of the head.
    """

    depth: int = 13
    width: int = 32
    recipe: Recipe = _CONVOLUTIONS
    head_units: int = 32768
    training: TrainingConfig = _HEAD


def vgg(data: Path | None, folder: Path) -> Json:
    """Frozen convolutions of a larger VGG, a wide head on images that they have not seen."""
    given = images.load(data, hidden.ROWS + hidden.OTHER_ROWS, hidden.TEST_ROWS)
    return deep(given, Deep(), folder / "full-vgg")


def deep(given: images.Images, design: Deep, folder: Path, rows: int = hidden.ROWS) -> Json:
    """Train convolutions on all but the first rows, a wide head on these, and explain its errors."""

    def build(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return VGG(design.depth, len(_KINDS), size=32, width=design.width, hidden=512)

    weights = folder / "convolutions.safetensors"
    if not weights.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (model,) = evaluation.train(
            build, given.x[rows:], given.y[rows:], design.recipe, [1], progress=True
        ).models()
        with replacing(weights) as draft:
            save_file(model.state_dict(), draft)
    config = FitConfig(
        ImageClassifierConfig(
            f"vgg{design.depth}",
            width=design.width,
            hidden=512,
            weights=str(weights),
            head_units=design.head_units,
        ),
        design.training,
    )
    run = fitted(
        config,
        _pictures(given.x[:rows], given.y[:rows], "train"),
        _pictures(given.test_x, given.test_y, "test"),
        folder / "run",
    )
    metrics = read_json(run.folder / "metrics.json")
    return {
        "depth": design.depth,
        "width": design.width,
        "rows": rows,
        "other_rows": len(given.x) - rows,
        "test_rows": len(given.test_y),
        "without_turnover": metrics["accuracy"]["without_turnover"],
        **curves(run),
        **explained(run, gram=True),
    }


def _texts(data: Path | None, name: str) -> TextData:
    texts, labels = shift.load(data, name)
    # A sentence that comes twice would be in two sets at once.
    first = {
        re.sub(r"\s+", " ", text).strip(): row for row, text in reversed(list(enumerate(texts)))
    }
    rows = sorted(first.values())
    return TextData(
        [texts[row] for row in rows],
        labels[rows].tolist(),
        torch.tensor(rows),
        [str(row) for row in rows],
        _CLASSES,
    )


def _pictures(x: Tensor, y: Tensor, name: str) -> ImageData:
    pixels = (x * 64 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    rows = list(range(len(y)))
    names = [f"{name} {row}" for row in rows]
    return ImageData(pixels, rows, names, y.tolist(), torch.arange(len(y)), names, _KINDS)
