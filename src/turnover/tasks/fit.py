"""Fit a classifier with turn-over dropout, and the same model with ordinary dropout beside it."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from turnover.data.base import Data
from turnover.data.encoded import Encoded
from turnover.dropout.audit import AuditReport
from turnover.dropout.masks import MaskSpec
from turnover.dropout.modules import choose_device, random_state_kept
from turnover.dropout.network import Network, attach
from turnover.ids import ghost_ids
from turnover.io.bars import stages
from turnover.io.parsing import write_json
from turnover.models.base import Config, Pipeline
from turnover.models.pipeline import build
from turnover.runs.run import (
    CHECKPOINT,
    MASKS,
    data_digest,
    versions,
    write_digests,
    writing_run,
)
from turnover.runs.source import write_source
from turnover.tasks.class_weights import class_weights
from turnover.tasks.memorize import FILE, Follower
from turnover.tasks.rehearsal import rehearse
from turnover.tasks.training import (
    Curves,
    Evaluation,
    TrainingConfig,
    evaluate,
    ordinary_dropout,
    train,
    under_masks,
)

_TEST_GHOSTS = 2**32
"""First ghost of the test rows, beyond those of noise floors."""


@dataclass(frozen=True)
class FitConfig:
    """Options of a fit: with the data they determine the run.

    Attributes:
        classifier: shape of the model.
        training: how it is trained.
        masks: the mask spec.
        sites: masked sites, as for :func:`turnover.attach`; empty: everything that is trained.
        compare: also train the same model with ordinary dropout.
        curve_rows: fixed rows of the training and of the test data on which losses are followed.
        memorization: record both losses of every training row after each epoch (turnover memorize).
    """

    classifier: Config
    training: TrainingConfig = field(default_factory=TrainingConfig)
    masks: MaskSpec = field(default_factory=MaskSpec)
    sites: tuple[str, ...] = ()
    compare: bool = True
    curve_rows: int = 300
    memorization: bool = False

    def __post_init__(self) -> None:
        # The only way to set a field of a frozen dataclass.
        object.__setattr__(self, "sites", self.sites or self.classifier.sites)


def fit(
    config: FitConfig,
    train_data: Data,
    test_data: Data,
    out: Path,
    *,
    overwrite: bool = False,
    recipe: str | None = None,
    device: str | torch.device = "auto",
) -> dict[str, Any]:
    """Train, evaluate and write a run folder; an interrupted fit resumes after its last epoch.

    Args:
        config: options.
        train_data: training data.
        test_data: test data.
        out: folder of the run; it appears when everything is done.
        overwrite: replace an existing run.
        recipe: command-line options that make the run again, stored as ``fit.toml``.
        device: where the networks are trained (:func:`~turnover.dropout.modules.choose_device`); initial
            weights are the same on all devices.

    Returns:
        the metrics, as in the run's ``metrics.json``.

    Raises:
        InputError: no such device, a model that cannot be loaded, an unknown site, a loss that is NaN, an
            existing run.
    """
    chosen = choose_device(device)
    kept = (FILE,) if config.memorization else ()
    with writing_run(out, overwrite=overwrite, kept=kept) as draft:
        # Draws for weights and dropout leave the caller's generator alone.
        with random_state_kept(chosen):
            torch.manual_seed(config.training.seed)
            with stages("preparing", 4) as begin:
                begin("loading the model")
                pipeline, model = build(config.classifier, train_data)
                model.to(chosen)  # not before: the CPU draws the weights, the same for all devices
                prepared = _prepare(config, pipeline, model, train_data, test_data, draft, begin)
            metrics = _fit(config, prepared, train_data, test_data, draft)
        pipeline.save(draft, model, len(train_data.classes))
        if prepared.plain is not None:
            folder = draft / "without_turnover"
            folder.mkdir(exist_ok=True)
            pipeline.save(folder, prepared.plain, len(train_data.classes))
        write_json(draft / MASKS, prepared.network.to_dict())
        train_data.save(draft, "train")
        write_source(draft, train_data)
        test_data.save(draft, "test")
        metrics["device"] = str(chosen)
        write_json(draft / "metrics.json", metrics, sealed=True)
        settings = {**asdict(config), "masks": config.masks.to_dict()}
        provenance = {"data": data_digest(train_data, test_data), "made_with": versions()}
        write_json(draft / "config.json", {"classes": train_data.classes, **settings, **provenance})
        if recipe is not None:
            (draft / "fit.toml").write_text(recipe, encoding="utf-8")
        write_digests(draft)
        for checkpoint in draft.glob(f"*{CHECKPOINT}"):
            checkpoint.unlink()
    return metrics


@dataclass(frozen=True)
class _Prepared:
    """What is trained: the network, the same model without masks, the rows, and the audit."""

    network: Network
    plain: nn.Module | None
    training: Encoded
    test: Encoded
    bfloat16: bool
    weights: Tensor | None
    curve_rows: tuple[list[int], list[int]]
    report: AuditReport


def _prepare(
    config: FitConfig,
    pipeline: Pipeline,
    model: nn.Module,
    train_data: Data,
    test_data: Data,
    draft: Path,
    begin: Callable[[str], None],
) -> _Prepared:
    weights = class_weights(config.training.class_weights, train_data)
    begin("rows for the model, and a rehearsal on two of them")
    training, test, bfloat16 = rehearse(
        pipeline, model, config.sites, config.masks, train_data, test_data, draft
    )
    begin("features that standardize the head")
    pipeline.prepare(model, training)
    begin("audit")
    plain = copy.deepcopy(model) if config.compare else None
    network = attach(model, config.sites, config.masks)
    curve_train = fixed_rows(len(training), config.curve_rows)
    curve_test = fixed_rows(len(test), config.curve_rows)
    report = network.audit(training.batch(curve_train[:8]))
    curves = (curve_train, curve_test)
    return _Prepared(network, plain, training, test, bfloat16, weights, curves, report)


def _fit(
    config: FitConfig, prepared: _Prepared, train_data: Data, test_data: Data, draft: Path
) -> dict[str, Any]:
    network, plain, weights = prepared.network, prepared.plain, prepared.weights
    training, test, model = prepared.training, prepared.test, network.model

    def measure() -> dict[str, tuple[float, float]]:
        # The precision of the training is enough for a curve, and takes half the time.
        sides = _sides(prepared, *prepared.curve_rows, bfloat16=prepared.bfloat16)
        return {name: evaluation.mean() for name, evaluation in sides.items()}

    seconds = {}
    same: dict[str, Any] = {
        "identity": repr(config),
        "bfloat16": prepared.bfloat16,
        "weights": weights,
    }
    start = time.perf_counter()
    curves = train(
        model,
        training,
        config.training,
        network.exposed,
        **same,
        name="with turn-over dropout",
        checkpoint=draft / f"turnover{CHECKPOINT}",
        measure=measure,
        follow=Follower(network, training, draft / FILE) if config.memorization else None,
    )
    seconds["train"] = time.perf_counter() - start
    start = time.perf_counter()
    sides = _sides(prepared, range(len(training)), range(len(test)))
    end = {
        name: side.of(prepared.curve_rows[name.startswith("test")]) for name, side in sides.items()
    }
    curves.add(
        config.training.steps(len(training)), {name: side.mean() for name, side in end.items()}
    )
    with_mean = evaluate(model, test, range(len(test)), lambda _: network.mean())
    seconds["evaluate"] = time.perf_counter() - start
    without = None
    if plain is not None:
        start = time.perf_counter()
        with ordinary_dropout(plain, config.sites, config.masks.keep):
            train(
                plain,
                training,
                config.training,
                _no_masks,
                **same,
                name="with ordinary dropout",
                checkpoint=draft / f"ordinary{CHECKPOINT}",
            )
        seconds["train_without_turnover"] = time.perf_counter() - start
        without = evaluate(plain, test, range(len(test)), _no_masks)
    metrics = _metrics(
        network, prepared.report, curves, sides, with_mean, without, train_data, test_data
    )
    metrics["precision"] = {
        "stored": getattr(model, "stored", "float32"),
        "training": "bfloat16" if prepared.bfloat16 else "float32",
        "curves": "bfloat16" if prepared.bfloat16 else "float32",
        "evaluation": "float32",
    }
    if weights is not None:
        metrics["class_weights"] = dict(zip(train_data.classes, weights.tolist(), strict=True))
    metrics["seconds"] = seconds
    return metrics


def _no_masks(_: Any) -> AbstractContextManager[None]:
    return nullcontext()


def fixed_rows(count: int, wanted: int) -> list[int]:
    """Draw some of ``count`` rows, always the same ones."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return sorted(order[:wanted].tolist())


def _sides(
    prepared: _Prepared,
    train_rows: Sequence[int],
    test_rows: Sequence[int],
    *,
    bfloat16: bool = False,
) -> dict[str, Evaluation]:
    """Evaluate train rows under their own masks and test rows under ghosts' masks, exposed and hidden."""
    network, training, test = prepared.network, prepared.training, prepared.test
    sides = {}
    ghosts = ghost_ids(len(test), start=_TEST_GHOSTS)
    for name, data, rows, ids in (
        ("train", training, train_rows, None),
        ("test", test, test_rows, ghosts),
    ):
        for side in ("exposed", "hidden"):
            masked = under_masks(network, data, ids, hidden=side == "hidden")
            title = f"{side} losses on {len(rows)} {name} rows"
            sides[f"{name}_{side}"] = evaluate(
                network.model, data, rows, masked, title, bfloat16=bfloat16
            )
    return sides


def _metrics(
    network: Network,
    report: AuditReport,
    curves: Curves,
    sides: dict[str, Evaluation],
    with_mean: Evaluation,
    without: Evaluation | None,
    train_data: Data,
    test_data: Data,
) -> dict[str, Any]:
    loss = {name: side.mean() for name, side in sides.items()}
    loss["test_mean"] = with_mean.mean()
    majority = Counter(train_data.labels).most_common(1)[0][0]
    accuracy: dict[str, Any] = {"majority": test_data.labels.count(majority) / len(test_data)}
    intervals = {}
    accuracy["turnover"], *intervals["turnover"] = with_mean.accuracy()
    if without is not None:
        accuracy["without_turnover"], *intervals["without_turnover"] = without.accuracy()
        difference = with_mean.correct.double() - without.correct.double()
        mean = difference.mean().item()
        half = 1.96 * difference.std().item() / len(difference) ** 0.5
        accuracy["difference"] = mean
        intervals["difference"] = [mean - half, mean + half]
        loss["test_without_turnover"] = without.mean()
    hidden_mean, _ = loss["train_hidden"]
    test_mean, test_half = loss["test_hidden"]
    return {
        "n_train": len(train_data),
        "n_groups": train_data.count_groups(),
        "n_test": len(test_data),
        "mask_units": network.mask_units,
        "mask_units_by_site": network.known_units(),
        "loss": {name: mean for name, (mean, _) in loss.items()},
        "loss_half_width": {name: half for name, (_, half) in loss.items()},
        "exposed_over_hidden": loss["train_exposed"][0] / hidden_mean,
        "hidden_did_not_learn": hidden_mean >= test_mean - test_half,
        "accuracy": accuracy,
        "accuracy_interval": intervals,
        "audit": {
            "leaking_share": report.leaking_share,
            "clean": report.clean,
            "buffers": list(report.buffers),
            "settings": list(report.settings),
            "report": str(report),
        },
        "curves": asdict(curves),
    }
