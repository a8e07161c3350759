"""Score a run: influence on its errors and on the whole test set, self-influence, and their noise."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from turnover import objectives
from turnover.data.base import Data
from turnover.data.encoded import Encoded, batches
from turnover.dropout.modules import device_of
from turnover.errors import InputError
from turnover.ids import ghost_ids
from turnover.influence.auto import Auto
from turnover.influence.estimator import Influence
from turnover.influence.protocol import METHODS, Method
from turnover.io.parsing import convert, read_json, write_json
from turnover.results.location import ROOT
from turnover.results.result import Result
from turnover.runs.run import Run
from turnover.runs.targets import EXPLANATIONS, rows_digest
from turnover.runs.targets import FILE as TARGETS
from turnover.tasks.agreement import EXACT_GHOSTS, agreement
from turnover.tasks.explain import SIGNIFICANT_Q, Explanation, explain
from turnover.tasks.features import by_head, features_of
from turnover.tasks.score_trained import BATCH, by_ids, fitted, score_trained
from turnover.tasks.sites import choose_sites, signals
from turnover.tasks.training import PREDICTING, evaluate

OBJECTIVES = {"margin": objectives.margin, "cross_entropy": objectives.cross_entropy}
_P_CHECKED = 0.01
OWN_GHOSTS = 1000
_GRAM_TOP, _GRAM_COMPARED = 50, 5
PAIR_METHODS = tuple(sorted(METHODS.keys() - {"gram"}))


@dataclass(frozen=True)
class ScoreConfig:
    """Options of scoring.

    Attributes:
        method: estimator of the pairs and the aggregate (self-influence is linear).
        seconds: time budget of the method ``auto``.
        objective: cost of a prediction in nats: ``margin`` (minus the log-odds of the true class) or
            ``cross_entropy`` (its loss).
        ghosts: ghosts that fit the noise floor; as many fresh ones check it.
        sites: names or patterns of the sites to score, ``("*",)`` for all; ``None`` chooses those that
            carry more signal than noise, by the training instances' self-influence.
        gram: also estimate the errors' extremes by gram, which takes a pass over the training data.
    """

    method: str = "linear"
    objective: str = "margin"
    ghosts: int = 4000
    sites: tuple[str, ...] | None = None
    seconds: float = 60.0
    gram: bool = True

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise InputError(
                f"unknown objective {self.objective!r}; known objectives: {', '.join(OBJECTIVES)}"
            )


def score(run: Run, config: ScoreConfig, *, engine: str = "process") -> dict[str, Any]:
    """Estimate influence on a run's test data, store the results in the run, and complete its metrics.

    Stores ``results/errors`` (misclassified test rows x training ids), ``results/gram`` (their extremes
    by gram, with row numbers of the training data as ids), ``results/aggregate`` (mean over all test
    rows), ``results/self`` (training ids) and ``results/targets.json``. If interrupted, the same call
    resumes the errors.

    Args:
        run: the run.
        config: options.
        engine: engine that computes the influence on the errors (:meth:`turnover.Influence.estimate`).

    Returns:
        the run's metrics.

    Raises:
        InputError: unknown objective or method, an objective that is not finite, or a run that another
            process scores.
    """
    with run.scoring():
        if run.masks is None:
            if engine != "process":
                raise InputError("gram scores in this process: leave --engine out")
            return score_trained(run, config, OBJECTIVES)
        return _score(run, config, engine)


def _score(run: Run, config: ScoreConfig, engine: str) -> dict[str, Any]:
    start = time.perf_counter()
    _metrics(run)  # refuse damaged metrics before anything is computed
    network = run.network
    scoring = Scoring(run, config)
    test, wrong, ids = scoring.test, scoring.wrong, scoring.ids
    found: dict[str, Any] = {"method": config.method, "objective": config.objective}
    found["device"] = str(device_of(run.model))
    found["sites"], found["scored_sites"] = scoring.by_site, list(scoring.sites)
    results: dict[str, Result] = {}
    before = _explained(run)
    targets = run.folder / "results" / TARGETS
    # Everything is computed before it replaces results of other settings.
    with ExitStack() as stack:
        if wrong:
            influence = scoring.influence(config.method)
            if config.method == "auto":
                plan = influence.plan(batches(test, wrong, BATCH), ids)
                influence = scoring.influence(plan.chosen)
                found["plan"] = plan.to_dict()
            found["method"] = influence.method
            kept = {key: value for key, value in asdict(config).items() if key != "gram"}
            of = [scoring.sites, network.digest(), rows_digest(run)]
            settings = json.dumps([kept, influence.method, *of])
            draft = stack.enter_context(run.draft("errors", settings))
            errors = influence.estimate(
                batches(test, wrong, BATCH), ids, out=draft, engine=engine
            ).load()
            # What is stored is computed from the rows themselves, as its continuation compares them.
            found |= _noise(errors, _fresh(influence, scoring.known, wrong, config.ghosts))
            found |= agreement(run, influence, scoring.known, wrong, ids, errors)
        if wrong and config.gram:
            results["gram"], found["gram"] = _score_by_gram(run, scoring, errors)
        results |= _overall(scoring, config)
        # Without it no command reads results, which an interruption would leave in a mix of settings.
        targets.unlink(missing_ok=True)
    run.remove_result("gram")
    for name, result in results.items():
        run.write_result(name, result)
    if _explained(run) != before:  # explanations belong to the old results
        (run.folder / "results" / EXPLANATIONS).unlink(missing_ok=True)
    metrics = _metrics(run)
    metrics["seconds"]["influence"] = time.perf_counter() - start
    metrics["errors_explained"] = len(wrong)
    for key in ("ghost_false_positive_rate", "significant_pairs"):
        metrics[key] = found.pop(key, None)
    metrics["influence"] = found
    write_json(run.folder / "metrics.json", metrics, sealed=True)
    write_json(targets, scoring.targets | {"data": rows_digest(run)}, sealed=True)
    return metrics


def _explained(run: Run) -> list[bytes]:
    """Descriptions of the results behind explanations; they change with every setting."""
    roots = (run.folder / "results" / f"{name}.zarr" / ROOT for name in ("errors", "gram"))
    return [root.read_bytes() if root.is_file() else b"" for root in roots]


def _overall(scoring: Scoring, config: ScoreConfig) -> dict[str, Result]:
    """Influence on the mean of all test rows, and self-influence of every training row."""
    test, training = scoring.known, scoring.training
    mean = scoring.influence(mean_method(config))
    results = {"aggregate": mean.aggregate(batches(test, range(len(test)), BATCH), scoring.ids)}
    # Fewer ghosts suffice: every row has its own, and the null is pooled over the rows.
    own = scoring.influence("linear", ghosts=min(config.ghosts, OWN_GHOSTS))
    if scoring.by_rows:
        rows = batches(training, range(len(training)), BATCH)
        results["self"] = own.self_influence(rows)
    return results


def mean_method(config: ScoreConfig) -> str:
    """The method of the influence on the mean of all test rows."""
    return config.method if config.method in ("exact", "linear") else "linear"


def _metrics(run: Run) -> dict[str, Any]:
    path = run.folder / "metrics.json"
    metrics = read_json(path)
    convert(metrics.get("seconds"), dict[str, float], f"{path}: seconds")
    return metrics


class Scoring:
    """Errors and sites of a run that are scored.

    Attributes:
        known: the test rows as features of the head, where it has all scored sites.
    """

    def __init__(self, run: Run, config: ScoreConfig) -> None:
        self._run, self._config, self.model = run, config, run.model
        self.objective = OBJECTIVES[config.objective]
        network = run.network
        if config.method == "gram":
            raise InputError(
                "gram's pairs are estimated beside those of every method: leave --method out, or choose "
                f"one of {', '.join(PAIR_METHODS)}"
            )
        if config.method not in METHODS:
            raise InputError(
                f"unknown method {config.method!r}; known methods: {', '.join(PAIR_METHODS)}"
            )
        self.test, self.training = run.encode(run.test), run.encode(run.train)
        everything = range(len(self.test))
        features = features_of(run.model, self.test, PREDICTING)
        predictions = evaluate(
            run.model, features, everything, lambda _: network.mean(), PREDICTING
        )
        # Errors are listed in the order of their batches, which results keep.
        misclassified = [row for row in everything if not predictions.correct[row]]
        chunks = self.test.chunks(misclassified, BATCH)
        self.wrong = [row for chunk in chunks for row in chunk]
        self.targets = {
            "rows": self.wrong,
            "predicted": [int(predictions.predicted[row]) for row in self.wrong],
            "confidence": [round(float(predictions.confidence[row]), 6) for row in self.wrong],
        }
        self.ids = torch.unique(run.train.ids)
        self.by_rows = len(self.ids) == len(self.training)
        self.by_site = signals(network, self.objective, self.training)
        self.sites = (
            choose_sites(self.by_site) if config.sites is None else network.select(config.sites)
        )
        self.known = features if by_head(self.sites) else self.test

    def influence(self, method: str | Method, *, ghosts: int | None = None) -> Influence:
        """Estimator on the chosen sites, with the objective and the ghosts of the options."""
        config = self._config
        return Influence(
            self._run.network,
            self.objective,
            Auto(config.seconds) if method == "auto" else method,
            ghosts=ghosts or config.ghosts,
            sites=self.sites,
            progress=True,
        )


def explain_input(
    run: Run,
    given: str | Path,
    label: str | None,
    *,
    top: int,
    among: str | None = None,
    gram: bool = True,
) -> tuple[Explanation, Data]:
    """Explain the prediction for a new text or image, linearly and on the margin.

    Args:
        run: a run.
        given: a text, or the path of an image.
        label: class whose margin is explained; ``None``: the predicted class.
        top: number of training instances on each side.
        among: as :func:`~turnover.tasks.explain.explain`.
        gram: explain also by gram, which takes a pass over the training data.

    Returns:
        The explanation, and the text or image as data of one row.

    Raises:
        InputError: an empty text, an image that cannot be read, input that the run's model cannot take, or
            a label that is not a class of the run.
    """
    classes = run.train.classes
    if label is not None and label not in classes:
        raise InputError(f"unknown label {label!r}; the classes are {', '.join(classes)}")
    data = run.pipeline.one(given, 0 if label is None else classes.index(label), classes)
    encoded = run.encode(data)
    prediction = evaluate(run.model, encoded, [0], lambda _: run.whole())
    predicted = int(prediction.predicted[0])
    if label is None:
        data = data.relabeled([predicted])
        encoded = run.encode(data)
    confidence = [float(prediction.confidence[0])]
    target, beside = [encoded.batch([0])], None
    if run.masks is None:
        by_gram = fitted(run, run.encode(run.train), objectives.margin)
        result = by_ids(by_gram.estimate(target), run)
    else:
        influence = Influence(run.masks, objectives.margin, "linear", sites=run.scored_sites())
        result = influence.estimate(target, torch.unique(run.train.ids))
        if gram:
            by_gram = fitted(run, run.encode(run.train), objectives.margin)
            beside = by_gram.estimate(target, top=top)
    explained = explain(
        result, run.train, data, [0], [predicted], confidence, top=top, among=among, gram=beside
    )
    return explained[0], data


def _score_by_gram(run: Run, scoring: Scoring, errors: Result) -> tuple[Result, dict[str, Any]]:
    """Extremes of the errors by gram, and the agreement of their signs with turn-over's."""
    start = time.perf_counter()
    result = fitted(run, scoring.training, scoring.objective).estimate(
        batches(scoring.test, scoring.wrong, BATCH), top=_GRAM_TOP
    )
    each = min(_GRAM_COMPARED, result.scores.shape[1] // 2)
    ends = np.r_[0:each, result.scores.shape[1] - each : result.scores.shape[1]]
    ids = run.train.ids.numpy()[result.train_ids[:, ends]]
    order = np.argsort(errors.train_ids)
    columns = order[np.searchsorted(errors.train_ids, ids, sorter=order)]
    other = np.take_along_axis(errors.scores, columns, axis=1)
    assert result.standard_error is not None
    return result, {
        "seconds": time.perf_counter() - start,
        "same_sign": float((np.sign(other) == np.sign(result.scores[:, ends])).mean()),
        "compared": 2 * each,
        "median_standard_error": float(np.median(result.standard_error)),
    }


def _fresh(
    influence: Influence, test: Encoded, wrong: Sequence[int], count: int
) -> np.ndarray[Any, Any]:
    """p-values of ghosts that did not fit the noise floor: (errors, ghosts)."""
    fresh = ghost_ids(count, start=count)
    if influence.method == "exact":
        fresh = fresh[:EXACT_GHOSTS]
    return influence.estimate(batches(test, wrong, BATCH), fresh).p


def _noise(errors: Result, ghost_p: np.ndarray[Any, Any]) -> dict[str, Any]:
    significant = errors.q <= SIGNIFICANT_Q
    return {
        "ghost_false_positive_rate": float((ghost_p < _P_CHECKED).mean()),
        "significant_pairs": int(significant.sum()),
        "errors_with_significant_pairs": int(significant.any(axis=1).sum()),
        "pairs": int(errors.scores.size),
        "ghost_pairs": int(ghost_p.size),
        "ghost_rate_below_1e-4": float((ghost_p < 1e-4).mean()),
        "noise_floor": {
            "median": float(np.median(errors.noise_floor)),
            "low": float(np.quantile(errors.noise_floor, 0.05)),
            "high": float(np.quantile(errors.noise_floor, 0.95)),
        },
        # The ghosts' z-scores have variance 1.
        "score_variance_over_noise": float((errors.z.astype(np.float64) ** 2).mean()),
    }
