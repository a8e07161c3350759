"""Score a run: influence on its errors and on the whole test set, self-influence, and their noise."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from turnover import objectives
from turnover.data.base import Data
from turnover.data.encoded import Encoded, batches
from turnover.errors import InputError
from turnover.ids import ghost_ids
from turnover.influence.estimator import METHODS, Influence
from turnover.influence.linear import LinearScorer, mask_gradients
from turnover.influence.plan import Plan
from turnover.io.parsing import field, read_json, write_json
from turnover.objectives import Objective
from turnover.results.calibration import noise_floor
from turnover.results.location import ROOT
from turnover.results.result import Result
from turnover.runs.run import Run
from turnover.runs.targets import EXPLANATIONS, rows_digest
from turnover.runs.targets import FILE as TARGETS
from turnover.tasks.agreement import EXACT_GHOSTS, agreement
from turnover.tasks.explain import SIGNIFICANT_Q, Explanation, explain
from turnover.tasks.training import evaluate

OBJECTIVES = {"margin": objectives.margin, "cross_entropy": objectives.cross_entropy}
_BATCH = 32
_P_CHECKED = 0.01
_SITE_ROWS = 256
_OWN_GHOSTS = 1000
_GRAM_TOP, _GRAM_COMPARED = 50, 5
PAIR_METHODS = tuple(method for method in METHODS if method != "gram")


@dataclass(frozen=True)
class ScoreConfig:
    """What is estimated.

    Attributes:
        method: estimator of the pairs and the aggregate (self-influence is linear).
        seconds: time budget of the method ``auto``.
        objective: cost of a prediction in nats: ``margin`` (minus the log-odds of the true class) or
            ``cross_entropy`` (its loss).
        ghosts: ghosts that fit the noise floor; as many fresh ones check it.
        sites: names or patterns of the sites that are scored, ``("*",)`` for all; ``None`` takes those
            that carry more signal than noise, told from the training instances' self-influence.
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
                f"unknown objective {self.objective!r}; there are {', '.join(OBJECTIVES)}"
            )


def score(run: Run, config: ScoreConfig, *, engine: str = "process") -> dict[str, Any]:
    """Estimate, store the results in the run, and add what was found to its metrics.

    Stores ``results/errors`` (misclassified test rows x training ids), ``results/gram`` (their extremes
    by gram, with row numbers of the training data as ids), ``results/aggregate`` (mean over all test
    rows), ``results/self`` (training ids) and ``results/targets.json``. Where it is cut off, the same
    call goes on with the errors.

    Args:
        engine: what computes the influence on the errors (:meth:`turnover.Influence.estimate`).

    Returns:
        the run's metrics, complete.

    Raises:
        InputError: unknown objective or method, an objective that is not finite, or a run that another
            process scores.
    """
    with run.scoring():
        return _score(run, config, engine)


def _score(run: Run, config: ScoreConfig, engine: str) -> dict[str, Any]:
    start = time.perf_counter()
    _measured(run)  # refused now, and not when all is computed
    network = run.network
    scoring = _Scoring(run, config)
    test, wrong, ids = scoring.test, scoring.wrong, scoring.ids
    found: dict[str, Any] = {"method": config.method, "objective": config.objective}
    found["sites"], found["scored_sites"] = scoring.by_site, list(scoring.sites)
    results: dict[str, Result] = {}
    before = _explained(run)
    targets = run.folder / "results" / TARGETS
    # All is computed before any of it replaces a result of other settings.
    with ExitStack() as stack:
        if wrong:
            influence = scoring.influence(config.method)
            if config.method == "auto":
                plan = influence.plan(batches(test, wrong, _BATCH), ids)
                influence = scoring.influence(plan.chosen)
                found["plan"] = plan.to_dict()
            found["method"] = influence.method
            kept = {key: value for key, value in asdict(config).items() if key != "gram"}
            of = [scoring.sites, network.digest(), rows_digest(run)]
            settings = json.dumps([kept, influence.method, *of])
            draft = stack.enter_context(run.draft("errors", settings))
            errors = influence.estimate(
                batches(test, wrong, _BATCH), ids, out=draft, engine=engine
            ).load()
            found |= _noise(errors, _fresh(influence, test, wrong, config.ghosts))
            found |= agreement(run, influence, test, wrong, ids, errors)
        if wrong and config.gram:
            results["gram"], found["gram"] = _score_by_gram(run, scoring, errors)
        results |= _overall(scoring, config)
        # Without it no command reads results: were this cut off, some would be of other settings.
        targets.unlink(missing_ok=True)
    run.remove_result("gram")
    for name, result in results.items():
        run.write_result(name, result)
    if _explained(run) != before:  # explanations are of the results that were there
        (run.folder / "results" / EXPLANATIONS).unlink(missing_ok=True)
    metrics = _measured(run)
    metrics["seconds"]["influence"] = time.perf_counter() - start
    metrics["errors_explained"] = len(wrong)
    for key in ("ghost_false_positive_rate", "significant_pairs"):
        metrics[key] = found.pop(key, None)
    metrics["influence"] = found
    write_json(run.folder / "metrics.json", metrics, sealed=True)
    write_json(targets, scoring.targets | {"data": rows_digest(run)}, sealed=True)
    return metrics


def _explained(run: Run) -> list[bytes]:
    """What changes with any setting of the results that explanations are made of."""
    roots = (run.folder / "results" / f"{name}.zarr" / ROOT for name in ("errors", "gram"))
    return [root.read_bytes() if root.is_file() else b"" for root in roots]


def _overall(scoring: _Scoring, config: ScoreConfig) -> dict[str, Result]:
    """Influence on the mean of all test rows, and of every training row on itself."""
    test, training = scoring.test, scoring.training
    mean = scoring.influence(config.method if config.method in ("exact", "linear") else "linear")
    results = {"aggregate": mean.aggregate(batches(test, range(len(test)), _BATCH), scoring.ids)}
    # Every row has ghosts of its own and the null is pooled over the rows, so fewer do.
    own = scoring.influence("linear", ghosts=min(config.ghosts, _OWN_GHOSTS))
    if len(scoring.ids) == len(training):
        rows = batches(training, range(len(training)), _BATCH)
        results["self"] = own.self_influence(rows)
    return results


def _measured(run: Run) -> dict[str, Any]:
    """What the fit measured, to which scoring adds.

    Raises:
        InputError: damaged.
    """
    path = run.folder / "metrics.json"
    metrics = read_json(path)
    field(metrics, "seconds", dict, path)
    return metrics


def explain_plan(run: Run, config: ScoreConfig) -> Plan | None:
    """What scoring the errors would cost by each method; ``None`` where there are no errors.

    Raises:
        InputError: unknown objective or method.
    """
    scoring = _Scoring(run, config)
    if not scoring.wrong:
        return None
    return scoring.influence("auto").plan(batches(scoring.test, scoring.wrong, _BATCH), scoring.ids)


class _Scoring:
    """What is scored in a run: its errors, and the sites."""

    def __init__(self, run: Run, config: ScoreConfig) -> None:
        self._run, self._config = run, config
        self.objective = OBJECTIVES[config.objective]
        network = run.network
        if config.method == "gram":
            raise InputError(
                "gram's pairs stand beside those of turn-over dropout, and are estimated without being "
                f"asked for: leave --method out, or choose one of {', '.join(PAIR_METHODS)}"
            )
        if config.method not in METHODS:
            raise InputError(
                f"unknown method {config.method!r}; built are: {', '.join(PAIR_METHODS)}"
            )
        self.test, self.training = run.encode(run.test), run.encode(run.train)
        everything = range(len(self.test))
        predictions = evaluate(run.model, self.test, everything, lambda _: network.mean())
        # Results keep the order of their batches, so the errors are listed as they will be batched.
        misclassified = [row for row in everything if not predictions.correct[row]]
        chunks = self.test.chunks(misclassified, _BATCH)
        self.wrong = [row for chunk in chunks for row in chunk]
        self.targets = {
            "rows": self.wrong,
            "predicted": [int(predictions.predicted[row]) for row in self.wrong],
            "confidence": [round(float(predictions.confidence[row]), 6) for row in self.wrong],
        }
        self.ids = torch.unique(run.train.ids)
        self.by_site = _by_site(run, self.training, config)
        self.sites = (
            choose_sites(self.by_site) if config.sites is None else network.select(config.sites)
        )

    def influence(self, method: str, *, ghosts: int | None = None) -> Influence:
        config = self._config
        return Influence(
            self._run.network,
            self.objective,
            method,
            ghosts=ghosts or config.ghosts,
            sites=self.sites,
            seconds=config.seconds,
            progress=True,
        )


def choose_sites(by_site: dict[str, dict[str, float]]) -> list[str]:
    """The sites that together have the highest signal over noise.

    Signals add up and so do noise variances, so a site is worth taking while it raises the ratio.
    Nothing of the targets is looked at: the p-values stay what they are.

    Args:
        by_site: for every site ``signal`` and ``noise``, in nats.
    """
    ranked = sorted(by_site, key=lambda s: -by_site[s]["signal"] / max(by_site[s]["noise"], 1e-12))
    best, chosen = -np.inf, ranked[:1]
    for count in range(1, len(ranked) + 1):
        sites = ranked[:count]
        signal = sum(by_site[site]["signal"] for site in sites)
        noise = sum(by_site[site]["noise"] ** 2 for site in sites) ** 0.5
        ratio = signal / max(noise, 1e-12)
        if ratio > best:
            best, chosen = ratio, sites
    return [site for site in by_site if site in chosen]


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
        given: a text, or the file of an image.
        label: the class whose margin is explained; ``None`` takes the predicted one.
        top: how many training instances on each side.
        among: as :func:`~turnover.tasks.explain.explain`.
        gram: whether also by gram, which takes a pass over the training data.

    Returns:
        The explanation, and what was explained as data of one row.

    Raises:
        InputError: an empty text, an image that cannot be read, what the run's model does not take, or
            a label that is not a class of the run.
    """
    classes = run.train.classes
    if label is not None and label not in classes:
        raise InputError(f"unknown label {label!r}; the classes are {', '.join(classes)}")
    data = run.pipeline.one(given, 0 if label is None else classes.index(label), classes)
    encoded = run.encode(data)
    prediction = evaluate(run.model, encoded, [0], lambda _: run.network.mean())
    predicted = int(prediction.predicted[0])
    if label is None:
        data = data.relabelled([predicted])
        encoded = run.encode(data)
    sites = run.scored_sites()
    influence = Influence(run.network, objectives.margin, "linear", sites=sites)
    result = influence.estimate([encoded.batch([0])], torch.unique(run.train.ids))
    confidence = [float(prediction.confidence[0])]
    beside = None
    if gram:
        fitted = _fitted_gram(run, run.encode(run.train), objectives.margin)
        beside = fitted.estimate([encoded.batch([0])], top=top)
    explained = explain(
        result, run.train, data, [0], [predicted], confidence, top=top, among=among, gram=beside
    )
    return explained[0], data


def _fitted_gram(run: Run, training: Encoded, objective: Objective) -> Influence:
    """Gram of the run's network and training rows, each under its number: groups share ids."""
    numbered = [
        replace(training.batch(chunk), ids=torch.tensor(chunk))
        for chunk in training.chunks(range(len(training)), _BATCH)
    ]
    return Influence(run.network, objective, "gram", progress=True).fit(numbered)


def _score_by_gram(run: Run, scoring: _Scoring, errors: Result) -> tuple[Result, dict[str, Any]]:
    """The errors' extremes by gram, and how far their signs agree with turn-over's."""
    start = time.perf_counter()
    fitted = _fitted_gram(run, scoring.training, scoring.objective)
    result = fitted.estimate(batches(scoring.test, scoring.wrong, _BATCH), top=_GRAM_TOP)
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
    return influence.estimate(batches(test, wrong, _BATCH), fresh).p


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
        # What is left of the variance of real z-scores above the ghosts' 1.
        "score_variance_over_noise": float((errors.z.astype(np.float64) ** 2).mean()),
    }


def _by_site(run: Run, training: Encoded, config: ScoreConfig) -> dict[str, dict[str, float]]:
    """How much of what instances leave in the network sits at each site.

    ``signal``: mean linear self-influence through the site alone, in nats. ``noise``: its ghosts'
    standard deviation (root mean square over instances). ``z``: the mean of signal over noise.
    """
    network, objective = run.network, OBJECTIVES[config.objective]
    rows = torch.randperm(len(training), generator=torch.Generator().manual_seed(1))[:_SITE_ROWS]
    signal: dict[str, list[float]] = {site: [] for site in network.sites}
    ratio: dict[str, list[float]] = {site: [] for site in network.sites}
    variance: dict[str, list[float]] = {site: [] for site in network.sites}
    units_of = network.known_units()
    for batch in batches(training, rows.tolist(), _BATCH):
        gradients = mask_gradients(network, objective, batch)
        assert batch.ids is not None
        start = 0
        for site, units in units_of.items():
            part = gradients[:, start : start + units]
            start += units
            scorer = LinearScorer(part, network.spec, {site: units})
            own = scorer.own(batch.ids).cpu().numpy()
            noise = scorer.scores(ghost_ids(200)).cpu().numpy()
            signal[site] += own.tolist()
            floor = noise_floor(noise)
            ratio[site] += floor.standardize(own[:, None])[:, 0].tolist()
            variance[site] += (floor.sd**2).tolist()
    return {
        site: {
            "units": units_of[site],
            "signal": float(np.mean(signal[site])),
            "noise": float(np.mean(variance[site]) ** 0.5),
            "z": float(np.mean(ratio[site])),
        }
        for site in network.sites
    }
