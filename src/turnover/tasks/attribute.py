"""Explain a model that was trained elsewhere: read it and its data, write a run, and score it by gram."""

from __future__ import annotations

import re
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from turnover.data.base import Columns, Data
from turnover.data.delimited import read_table
from turnover.data.encoded import Encoded
from turnover.data.images import COLUMNS
from turnover.data.text import TextData, Tokens
from turnover.dropout.modules import choose_device
from turnover.errors import InputError
from turnover.influence.gram.forecast import Forecast
from turnover.io.parsing import write_json
from turnover.models.base import Pipeline
from turnover.models.classifiers import Classifier, load_classifier
from turnover.models.trained import TrainedImages, TrainedTexts, check_rows_apart, pipeline_of
from turnover.runs.run import (
    TRAINED,
    Run,
    check_new_run,
    data_digest,
    versions,
    write_digests,
    writing_run,
)
from turnover.runs.source import write_source
from turnover.tasks.score import OBJECTIVES, ScoreConfig, score
from turnover.tasks.score_trained import forecast
from turnover.tasks.training import Evaluation, evaluate

ERRORS, ALL = "errors", "all"
_NUMBER = re.compile(r"(?:LABEL_)?(\d+)", re.ASCII)
_SHOWN = 10
_Data = TypeVar("_Data", bound=Data)


@dataclass(frozen=True)
class AttributeConfig:
    """How a trained model is explained.

    Attributes:
        layers: parameters whose gradients explain it: all (that were trained), last (the encoder's last block
            and above), head (above the encoder), lora (of an adapter), or a pattern of names such as
            '*layer.5*'; default: all of an adapter, else last.
        targets: test rows to explain: errors, all, or a CSV file with their keys in the column key.
        classes: the model's classes in the order of its outputs, where its config does not name them.
        max_tokens: tokens to which longer texts are cut; default: as many as the model takes, up to 512.
        objective: cost of a prediction in nats: minus the log-odds of the true class, or its loss.
    """

    layers: str | None = None
    targets: str = ERRORS
    classes: tuple[str, ...] = ()
    max_tokens: int | None = None
    objective: str = "margin"

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise InputError(
                f"unknown objective {self.objective!r}; known objectives: {', '.join(OBJECTIVES)}"
            )


@dataclass(frozen=True)
class Prepared:
    """A model with its data, read and checked: nothing was computed but a few predictions.

    Attributes:
        classifier: the model.
        pipeline: takes the data to it.
        train: its training data; labels are indexes of its outputs.
        test: rows to explain.
        notes: what was assumed, one line each.
        targets: as trained.json has them: ``"errors"``, ``"all"``, or rows.
        encoded: the training and the test data as the model takes them.
    """

    classifier: Classifier
    pipeline: TrainedTexts | TrainedImages
    train: Data
    test: Data
    notes: tuple[str, ...]
    targets: str | list[int]
    config: AttributeConfig
    encoded: tuple[Encoded, Encoded]

    @cached_property
    def predictions(self) -> Evaluation:
        """Those of the test rows."""
        return _evaluated(self.classifier, self.encoded[1])

    def forecast(self, device: str | torch.device = "auto") -> Forecast:
        """Estimate seconds, memory and bytes of the scores, from a few rows."""
        self.classifier.model.to(choose_device(device))
        training, test = self.encoded
        count = len(self.test) if self.targets == ALL else len(self.targets)
        if self.targets == ERRORS:
            count = int((~self.predictions.correct).sum())
        objective = OBJECTIVES[self.config.objective]
        model = self.classifier.model
        return forecast(model, objective, training, targets=count, means=len(test))


def attribute(
    model: str | Path,
    train: str | Path,
    test: str | Path,
    out: str | Path,
    *,
    layers: str | None = None,
    targets: str | Path = ERRORS,
    columns: Columns | None = None,
    classes: Sequence[str] = (),
    max_tokens: int | None = None,
    objective: str = "margin",
    overwrite: bool = False,
    device: str | torch.device = "auto",
) -> Run:
    """Find the training instances behind the predictions of a model that was trained elsewhere, by gram.

    Nothing is trained, no code of the model is run, and the model's folder stays as it is: the run holds a
    copy. Source: :class:`turnover.Gram`.

    Args:
        model: folder or Hugging Face name of a classifier of texts or images
            (``AutoModelForSequenceClassification``, ``AutoModelForImageClassification``), or of a PEFT
            adapter of one; weights are safetensors.
        train: the data that it was trained on: a file, folder or Hugging Face data set, as for
            ``turnover fit``.
        test: rows to explain, in the same formats.
        out: folder of the run to write.
        layers: parameters whose gradients count: ``"all"`` that were trained, ``"last"``: those of the
            encoder's last block and above, ``"head"``: those above the encoder, ``"lora"``: those of an
            adapter, or a glob pattern of their names. ``None``: all of an adapter, else last.
        targets: test rows to explain: ``"errors"``, ``"all"``, or a CSV file with their keys.
        columns: columns to read; ``second`` names that of the second texts of pairs. ``None``: text or
            image, and label.
        classes: names of the model's outputs in their order, where its config has none.
        max_tokens: tokens to which longer texts are cut; ``None``: as many as the model takes, up to 512.
        objective: ``"margin"`` or ``"cross_entropy"``, in nats.
        overwrite: replace an existing run.
        device: where the model runs (:func:`~turnover.dropout.modules.choose_device`).

    Returns:
        the scored run. ``run.read_result("errors")`` is a :class:`turnover.Result` with float32 scores
        (targets, train); ``"aggregate"`` and ``"self"`` have scores (train,).

    Warns:
        UserWarning: labels that are matched with the model's classes by number or case, and texts that are
            cut.

    Raises:
        InputError: a model that cannot be loaded or is no classifier, labels that are none of its classes,
            data that cannot be read, no such layers, an existing run.

    Example:
        >>> run = turnover.attribute("my-bert", "train.csv", "test.csv", "runs/mine")  # doctest: +SKIP
        >>> run.read_result("errors").top(5)  # doctest: +SKIP
    """
    out = Path(out)
    check_new_run(out, overwrite=overwrite)
    config = AttributeConfig(layers, str(targets), tuple(classes), max_tokens, objective)
    chosen = choose_device(device)
    made = prepare(str(model), str(train), str(test), config, columns)
    for note in made.notes:
        warnings.warn(note, stacklevel=2)
    run = write(made, out, overwrite=overwrite, device=chosen)
    score(run, ScoreConfig(objective=objective))
    return run


def prepare(
    model: str,
    train: str,
    test: str | None,
    config: AttributeConfig,
    columns: Columns | None = None,
    *,
    split: str = "train",
    test_split: str = "test",
    one: str | Path | None = None,
    label: str | None = None,
    classifier: Classifier | None = None,
) -> Prepared:
    """Read a model and its data, map the labels to its classes, and try it on two rows.

    Args:
        model: folder or name.
        train: training data.
        test: rows to explain; ``None``: explain ``one``.
        config: options.
        columns: columns to read.
        split: split of a Hugging Face data set to read ``train`` from.
        test_split: likewise for ``test``.
        one: a text, or the path of an image.
        label: class to explain it for; ``None``: the predicted class.
        classifier: the model, if it is loaded already.

    Raises:
        InputError: as :func:`attribute`.
    """
    classifier = classifier or load_classifier(model)
    reader = classifier.reader()
    columns = columns or (Columns() if classifier.takes == "text" else COLUMNS)
    if columns.second is not None and classifier.takes == "image":
        raise InputError("a second column is for texts, and this model takes images")
    train_data = reader(train, columns=columns, split=split)
    outputs = int(classifier.model.config.num_labels)  # type: ignore[union-attr, arg-type]
    names, notes = _matched(train_data.classes, classifier.names, config.classes, outputs, model)
    train_data = _with_classes(train_data, names)
    usual = "last" if classifier.adapter is None else ALL
    layers = usual if config.layers is None else config.layers
    pipeline = pipeline_of(classifier, model, train_data, layers, config.max_tokens)
    if test is not None:
        test_data = reader(test, columns=columns, classes=names, split=test_split, ids_needed=False)
        targets = _targets(config.targets, test_data)
    else:
        assert one is not None
        test_data, targets = _single(classifier, pipeline, one, label, names), ALL
    encoder: Pipeline = pipeline
    training, held = encoder.encode(train_data), encoder.encode(test_data)
    if isinstance(pipeline, TrainedTexts):
        for name, data, rows in (("training", train_data, training), ("test", test_data, held)):
            assert isinstance(data, TextData)
            assert isinstance(rows, Tokens)
            if cut := pipeline.cut(data, rows):
                longest = pipeline.config.max_tokens
                notes += (f"{cut} {name} texts are cut to {longest} tokens (--max-tokens)",)
    if classifier.stored != "float32":
        notes += (f"its {classifier.stored} weights are computed with in float32",)
    order = [row for chunk in training.chunks(range(len(training))) for row in chunk]
    check_rows_apart(classifier.model, training, [order[0], order[-1]], model)
    encoded = training, held
    return Prepared(classifier, pipeline, train_data, test_data, notes, targets, config, encoded)


def write(
    made: Prepared, out: Path, *, overwrite: bool, device: str | torch.device = "auto"
) -> Run:
    """Write a run of a trained model, which :func:`~turnover.tasks.score.score` scores; returns it loaded.

    Raises:
        InputError: an existing run.
    """
    chosen = choose_device(device)
    model = made.classifier.model.to(chosen)
    start = time.perf_counter()
    found = {"train": _evaluated(made.classifier, made.encoded[0]), "test": made.predictions}
    losses = {name: one.mean() for name, one in found.items()}
    accuracy, *interval = found["test"].accuracy()
    majority = Counter(made.train.labels).most_common(1)[0][0]
    metrics = {
        "n_train": len(made.train),
        "n_groups": made.train.count_groups(),
        "n_test": len(made.test),
        "loss": {name: mean for name, (mean, _) in losses.items()},
        "loss_half_width": {name: half for name, (_, half) in losses.items()},
        "accuracy": {
            "model": accuracy,
            "train": float(found["train"].correct.float().mean()),
            "majority": made.test.labels.count(majority) / len(made.test),
        },
        "accuracy_interval": {"model": interval},
        "parameters": sum(one.numel() for one in model.parameters() if one.requires_grad),
        "precision": {"stored": made.classifier.stored, "evaluation": "float32"},
        "device": str(chosen),
        "seconds": {"evaluate": time.perf_counter() - start},
    }
    with writing_run(out, overwrite=overwrite) as draft:
        made.pipeline.save(draft, model, len(made.train.classes))
        chosen_by = {"targets": made.targets, "objective": made.config.objective}
        write_json(draft / TRAINED, chosen_by)
        made.train.save(draft, "train")
        write_source(draft, made.train)
        made.test.save(draft, "test")
        write_json(draft / "metrics.json", metrics, sealed=True)
        provenance = {"data": data_digest(made.train, made.test), "made_with": versions()}
        settings = {"model": made.pipeline.config.model, "layers": made.pipeline.config.layers}
        write_json(draft / "config.json", {"classes": made.train.classes, **settings, **provenance})
        write_digests(draft)
    return Run.load(out, chosen)


def _evaluated(classifier: Classifier, data: Encoded) -> Evaluation:
    return evaluate(classifier.model, data, range(len(data)), lambda _: nullcontext())


def _matched(
    found: Sequence[str], own: Sequence[str], given: Sequence[str], outputs: int, model: str
) -> tuple[list[str], tuple[str, ...]]:
    """Names of the model's outputs as the data write them, in their order, and what to say of it.

    Names match exactly, then in upper or lower case, then as numbers of the outputs.
    """
    if given and len(given) != outputs:
        raise InputError(
            f"{len(given)} classes are given, and model {model!r} has {outputs} outputs: give one name for "
            f"each, in their order"
        )
    if len(set(given)) < len(given):
        raise InputError(f"a class is given twice: {', '.join(given)}")
    names = list(given or own)
    if len(set(names)) < len(names):
        raise InputError(
            f"model {model!r} has two classes of one name (id2label: {', '.join(names[:_SHOWN])}): name "
            f"its outputs, --class-name NAME for each"
        )
    if names and set(found) <= set(names):
        return names, ()
    folded = {name.casefold(): index for index, name in enumerate(names)}
    if len(folded) == len(names) and all(name.casefold() in folded for name in found):
        places = {folded[name.casefold()]: name for name in found}
        if len(places) < len(found):
            raise InputError(
                f"the labels {', '.join(sorted(found)[:_SHOWN])} differ in upper and lower case alone: write "
                f"them alike"
            )
        pairs = ", ".join(f"{name} = {names[at]}" for at, name in sorted(places.items()))
        taken = [places.get(index, name) for index, name in enumerate(names)]
        return taken, (f"labels are the model's classes in another case: {pairs}",)
    numbers = {name: _NUMBER.fullmatch(name) for name in found}
    if not given and all(numbers.values()):
        places = {int(match[1]): name for name, match in numbers.items() if match is not None}
        if max(places) < outputs and len(places) == len(found):
            prefix = "LABEL_" if next(iter(found)).startswith("LABEL_") else ""
            taken = [places.get(index, f"{prefix}{index}") for index in range(outputs)]
            said = ", ".join(f"{taken[index]} = {name}" for index, name in enumerate(names))
            return taken, (f"labels are numbers of the model's outputs{': ' * bool(said)}{said}",)
    listed = ", ".join(sorted(found)[:_SHOWN])
    if not names:
        raise InputError(
            f"model {model!r} does not name its {outputs} classes (id2label), and the labels are {listed}: "
            f"give them in the order of its outputs, --class-name NAME for each"
        )
    missing = sorted(set(found) - set(names))
    raise InputError(
        f"the labels {', '.join(missing[:_SHOWN])} are none of the classes of model {model!r}: "
        f"{', '.join(names[:_SHOWN])}; write them alike, or give --class-name NAME for each output"
    )


def _with_classes(data: _Data, names: list[str]) -> _Data:
    labels = [names.index(data.classes[label]) for label in data.labels]
    changed: _Data = replace(data, labels=labels, classes=names)  # type: ignore[type-var]
    return changed


def _targets(given: str, data: Data) -> str | list[int]:
    if given in (ERRORS, ALL):
        return given
    path = Path(given)
    if not path.is_file():
        raise InputError(
            f"targets {given!r}: no such file; give errors, all, or a CSV file with keys of test rows in the "
            f"column key"
        )
    row_of = {key: row for row, key in enumerate(data.keys)}
    rows: dict[int, None] = {}
    for number, line in read_table(path, ("key",)):
        key = line.get("key")
        if key not in row_of:
            raise InputError(f"{path}: line {number}: no test row has the key {key!r}")
        rows[row_of[key]] = None
    if not rows:
        raise InputError(f"{path}: names no test rows")
    return list(rows)


def _single(
    classifier: Classifier,
    pipeline: TrainedTexts | TrainedImages,
    given: str | Path,
    label: str | None,
    names: list[str],
) -> Data:
    """One row to explain, with the predicted class as its label if none is given."""
    if label is not None and label not in names:
        raise InputError(f"unknown label {label!r}; the classes are {', '.join(names)}")
    data: Any = pipeline.one(given, 0 if label is None else names.index(label), names)
    if label is None:
        predicted = _evaluated(classifier, pipeline.encode(data)).predicted
        data = data.relabeled([int(predicted[0])])
    row: Data = data
    return row
