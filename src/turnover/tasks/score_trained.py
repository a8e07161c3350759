"""Score a run whose model was trained elsewhere: by gram, as there are no masks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from turnover.data.encoded import Encoded, batches
from turnover.dropout.modules import device_of
from turnover.errors import InputError
from turnover.influence.estimator import Influence
from turnover.influence.gram.forecast import Forecast
from turnover.influence.gram.forecast import forecast as forecast_gram
from turnover.io.parsing import convert, read_json, write_json
from turnover.objectives import Objective
from turnover.results.calibration import NoiseFloor
from turnover.results.result import Result
from turnover.runs.run import TRAINED, Run
from turnover.runs.targets import EXPLANATIONS, rows_digest
from turnover.runs.targets import FILE as TARGETS
from turnover.tasks.explain import SIGNIFICANT_Q
from turnover.tasks.training import Evaluation, evaluate

if TYPE_CHECKING:
    from turnover.tasks.score import ScoreConfig

BATCH = 32
_SAMPLE = 16
"""Batches of which a forecast tries some."""
_DEFAULT = "margin"


@dataclass(frozen=True)
class _Wanted:
    targets: str | list[int]
    objective: str = _DEFAULT


def objective_of(run: Run, config: ScoreConfig) -> str:
    """The objective asked for; by default that of the run."""
    if config.objective != _DEFAULT:
        return config.objective
    where = run.folder / TRAINED
    return convert(read_json(where), _Wanted, where).objective


def score_trained(
    run: Run, config: ScoreConfig, objectives: Mapping[str, Objective]
) -> dict[str, Any]:
    """Score a run without masks; see :func:`turnover.tasks.score.score`.

    ``errors`` holds all pairs of the targets, by gram, with standard errors; there is no ``gram``.
    """
    _check(run, config)
    name = objective_of(run, config)
    objective = objectives[name]
    start = time.perf_counter()
    metrics = read_json(run.folder / "metrics.json")
    convert(metrics.get("seconds"), dict[str, float], run.folder / "metrics.json: seconds")
    test = run.encode(run.test)
    predictions, rows = _targets(run, test)
    influence = fitted(run, run.encode(run.train), objective)
    results: dict[str, Result] = {}
    if rows:
        results["errors"] = by_ids(influence.estimate(batches(test, rows, BATCH)), run)
    every = batches(test, range(len(test)), BATCH)
    results["aggregate"] = by_ids(influence.aggregate(every), run)
    if not run.train.grouped:
        results["self"] = by_ids(influence.self_influence(), run)
    # Without it no command reads results, which an interruption would leave in a mix of settings.
    listed = run.folder / "results" / TARGETS
    listed.unlink(missing_ok=True)
    for stored, result in results.items():
        run.write_result(stored, result)
    for absent in {"errors", "self"} - results.keys():
        run.remove_result(absent)
    (run.folder / "results" / EXPLANATIONS).unlink(missing_ok=True)
    found: dict[str, Any] = {
        "method": influence.method,
        "objective": name,
        "device": str(device_of(run.model)),
    }
    metrics["significant_pairs"] = None
    if rows:
        found |= _noise(results["errors"])
        metrics["significant_pairs"] = found.pop("significant_pairs")
    metrics["seconds"]["influence"] = time.perf_counter() - start
    metrics["errors_explained"] = len(rows)
    metrics["influence"] = found
    write_json(run.folder / "metrics.json", metrics, sealed=True)
    targets = {
        "rows": rows,
        "predicted": [int(predictions.predicted[row]) for row in rows],
        "confidence": [round(float(predictions.confidence[row]), 6) for row in rows],
        "data": rows_digest(run),
    }
    write_json(listed, targets, sealed=True)
    return metrics


def expected(run: Run, config: ScoreConfig, objectives: Mapping[str, Objective]) -> Forecast:
    """Estimate what :func:`score_trained` takes."""
    _check(run, config)
    objective = objectives[objective_of(run, config)]
    training, test = run.encode(run.train), run.encode(run.test)
    targets = len(_targets(run, test)[1])
    return forecast(run.model, objective, training, targets=targets, means=len(test))


def _targets(run: Run, test: Encoded) -> tuple[Evaluation, list[int]]:
    """Predictions of the test rows, and the rows to explain in the order of their batches."""
    predictions = evaluate(run.model, test, range(len(test)), lambda _: run.whole())
    where = run.folder / TRAINED
    wanted = convert(read_json(where), _Wanted, where).targets
    if isinstance(wanted, str) and wanted not in ("errors", "all"):
        raise InputError(f"{where}: damaged, unknown targets {wanted!r}; restore it")
    if wanted == "errors":
        wanted = (~predictions.correct).nonzero()[:, 0].tolist()
    elif wanted == "all":
        wanted = list(range(len(test)))
    rows = [row for chunk in test.chunks([int(row) for row in wanted], BATCH) for row in chunk]
    if rows and not 0 <= min(rows) <= max(rows) < len(test):
        raise InputError(f"{where}: damaged, targets are none of the run's rows; restore it")
    return predictions, rows


def fitted(run: Run, training: Encoded, objective: Objective) -> Influence:
    """Gram fitted on the training rows, with row numbers as ids, because rows of a group share ids."""
    numbered = [
        replace(training.batch(chunk), ids=torch.tensor(chunk))
        for chunk in training.chunks(range(len(training)), BATCH)
    ]
    network = run.model if run.masks is None else run.masks
    return Influence(network, objective, "gram", progress=True).fit(numbered)


def forecast(
    model: nn.Module, objective: Objective, training: Encoded, *, targets: int, means: int
) -> Forecast:
    """Estimate what gram takes for a number of targets, and for the mean of ``means`` others."""
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(0)).tolist()
    chunks = training.chunks(order[: BATCH * _SAMPLE], BATCH)
    mixed = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(1)).tolist()
    sample = [training.batch(chunks[at]) for at in mixed]
    rows = len(training)
    return forecast_gram(model, objective, sample, rows=rows, targets=targets, means=means)


def by_ids(result: Result, run: Run) -> Result:
    """Give a result of row numbers the ids of the rows; scores of a group are those of its rows in sum.

    The standard error of a group is at most the sum of its rows'.
    """
    ids = run.train.ids.numpy()
    known, group = np.unique(ids[result.train_ids], return_inverse=True)
    if len(known) == len(ids):
        return replace(result, train_ids=ids[result.train_ids])

    def summed(values: NDArray[np.floating]) -> NDArray[np.float32]:
        sums = np.zeros((*values.shape[:-1], len(known)))
        np.add.at(sums.T, group, values.T.astype(np.float64))
        return sums.astype(np.float32)

    assert result.standard_error is not None
    errors = summed(result.standard_error)
    floor = np.sqrt(np.mean(np.square(errors.astype(np.float64)), axis=-1))
    return replace(
        result,
        scores=summed(result.scores),
        standard_error=errors,
        floor=NoiseFloor(np.zeros_like(floor), floor),
        train_ids=known,
        considered=len(known),
    )


def _check(run: Run, config: ScoreConfig) -> None:
    """Refuse options of turn-over masks."""
    for one in fields(config):
        if one.name != "objective" and getattr(config, one.name) != one.default:
            option = "site" if one.name == "sites" else one.name
            raise InputError(
                f"--{option} is for networks with turn-over masks, and the model of {run.folder} was trained "
                f"without: it is scored by gram; leave it out"
            )


def _noise(errors: Result) -> dict[str, Any]:
    assert errors.standard_error is not None
    floor = errors.noise_floor
    significant = errors.q <= SIGNIFICANT_Q
    return {
        "significant_pairs": int(significant.sum()),
        "errors_with_significant_pairs": int(significant.any(axis=1).sum()),
        "pairs": int(errors.scores.size),
        "median_standard_error": float(np.median(errors.standard_error)),
        "noise_floor": {
            "median": float(np.median(floor)),
            "low": float(np.quantile(floor, 0.05)),
            "high": float(np.quantile(floor, 0.95)),
        },
    }
