"""The content of a run's report, from the run's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from turnover.errors import InputError
from turnover.io.parsing import read_json
from turnover.report.content import (
    AccuracyRow,
    Curve,
    DoubtfulLabel,
    Fact,
    HarmfulOverall,
    LabelSummary,
    NoiseSummary,
    ReportContent,
)
from turnover.report.pictures import thumbnails
from turnover.runs.run import Run
from turnover.tasks.explain import described, explain_errors, influential, rows_by_id
from turnover.tasks.stored_doubts import read_doubts

_OVERALL = 50
_DOUBTFUL = 50
_NOT_OURS = (
    "The model was trained elsewhere, and is explained as it is. Predictions of networks that never learned "
    "an instance, and noise floors from ghosts, need turn-over training (turnover fit)."
)
_OBJECTIVES = {
    "margin": "the margin (minus the log-odds of the true class, in nats)",
    "cross_entropy": "the cross entropy of the true class (in nats)",
}


def content(run: Run, *, title: str, commands: tuple[str, ...]) -> ReportContent:
    """Gather the report of a scored run."""
    metrics = read_json(run.folder / "metrics.json")
    errors = tuple(explain_errors(run))  # first: it names a run that was not scored
    found = metrics["influence"]
    overall, labels = _harmful_overall(run), _labels(run)
    doubtful = () if labels is None else labels.rows
    listed = [*overall, *doubtful, *(one for error in errors for one in error.instances)]
    return ReportContent(
        title=title,
        objective=_OBJECTIVES.get(found["objective"], found["objective"]),
        classes=tuple(run.train.classes),
        curves=_curves(run.folder / "metrics.json", metrics["curves"]) if run.masks else (),
        accuracy=_accuracy(metrics),
        deploy=_deploy(metrics) if run.masks else _NOT_OURS,
        errors=errors,
        harmful_overall=overall,
        noise=_noise(metrics, found),
        facts=_facts(metrics, found) if run.masks else _facts_of_trained(metrics, found),
        commands=commands,
        labels=labels,
        by_gram=run.masks is None,
        train_images=thumbnails(run.train, [one.key for one in listed]),
        test_images=thumbnails(run.test, [error.key for error in errors]),
    )


def _curves(path: Path, curves: dict[str, Any]) -> tuple[Curve, ...]:
    try:
        return tuple(
            Curve(name.replace("_", " "), tuple(curves["steps"]), *zip(*points, strict=True))
            for name, points in curves["losses"].items()
        )
    except InputError as error:
        raise InputError(f"{path}: damaged: {error}") from error


def _accuracy(metrics: dict[str, Any]) -> tuple[AccuracyRow, ...]:
    accuracy, interval = metrics["accuracy"], metrics["accuracy_interval"]
    named = {
        "turnover": ("turn-over dropout (mean network)", "the network explained here"),
        "model": ("the model", "as it was trained"),
        "without_turnover": (
            "same model, ordinary dropout",
            "trained with the same settings; cannot be explained this way",
        ),
    }
    rows = []
    for key in (one for one in named if one in accuracy):
        (low, high), (name, note) = interval[key], named[key]
        rows.append(AccuracyRow(name, accuracy[key], low, high, note))
    share = accuracy["majority"]
    half = 1.96 * (share * (1 - share) / metrics["n_test"]) ** 0.5
    note = "baseline: always the most frequent training class"
    return (*rows, AccuracyRow("majority class", share, share - half, share + half, note))


def _deploy(metrics: dict[str, Any]) -> str:
    accuracy = metrics["accuracy"]
    if "without_turnover" not in accuracy:
        return (
            "Only the turn-over network was trained. Masks that are fixed per instance do not regularize "
            "as ordinary dropout does, so compare before you deploy it."
        )
    low, high = metrics["accuracy_interval"]["difference"]
    difference = (
        f"{accuracy['difference'] * 100:+.1f} points (95% interval {low * 100:+.1f} to {high * 100:+.1f}, "
        f"paired over the test rows)"
    )
    ours, theirs = metrics["loss"]["test_mean"], metrics["loss"]["test_without_turnover"]
    loss = (
        f"The test losses are {ours:.3f} nats with turn-over and {theirs:.3f} with ordinary dropout"
    )
    if ours > theirs:
        loss += ": calibrate the turn-over network's probabilities before you use them"
    if low > 0:
        advice = "deploy the turn-over network"
    elif high < 0:
        advice = (
            "deploy the model with ordinary dropout if only accuracy counts, and use the turn-over "
            "network to explain and to clean the data"
        )
    else:
        advice = (
            "which is not distinguishable from none: deploy the turn-over network, so that you run the "
            "network that you explain"
        )
    return f"The difference in accuracy is {difference}; {advice}. {loss}."


def _harmful_overall(run: Run) -> tuple[HarmfulOverall, ...]:
    overall = run.read_result("aggregate")
    rows = rows_by_id(overall.train_ids, run.train)
    own: dict[int, tuple[float, float]] = {}
    if run.has_result("self"):
        result = run.read_result("self")
        numbers = zip(result.scores.tolist(), result.q.tolist(), strict=True)
        own = dict(zip(result.train_ids.tolist(), numbers, strict=True))
    columns = np.argsort(overall.scores, kind="stable")[:_OVERALL].tolist()
    ids = overall.train_ids[columns].tolist()
    instances = zip(influential(overall, None, run.train, rows, columns), ids, strict=True)
    return tuple(
        HarmfulOverall(**vars(one), self_influence=score, self_influence_q=q)
        for one, train_id in instances
        for score, q in [own.get(train_id, (None, None))]
    )


def _labels(run: Run) -> LabelSummary | None:
    found = read_doubts(run)
    if found is None:
        return None
    errors, train = found.errors, run.train
    wrong, suggested = errors.probability, errors.suggested
    rows = tuple(
        DoubtfulLabel(
            *described(train, row),
            float(wrong[row]),
            train.classes[suggested[row]],
            float(errors.posterior[row, suggested[row]]),
        )
        for row in errors.order()[:_DOUBTFUL].tolist()
    )
    return LabelSummary(rows, errors.expected, errors.likely, len(train), found.described())


def _noise(metrics: dict[str, Any], found: dict[str, Any]) -> NoiseSummary:
    return NoiseSummary(
        **found.get("noise_floor", {"median": 0.0, "low": 0.0, "high": 0.0}),
        significant_pairs=metrics.get("significant_pairs") or 0,
        pairs=found.get("pairs", 0),
        ghost_false_positive_rate=metrics.get("ghost_false_positive_rate") or 0.0,
        ghost_pairs=found.get("ghost_pairs", 0),
        spearman_exact_linear=found.get("spearman_exact_linear"),
    )


def _facts(metrics: dict[str, Any], found: dict[str, Any]) -> tuple[Fact, ...]:
    loss, half, seconds = metrics["loss"], metrics["loss_half_width"], metrics["seconds"]

    def nats(name: str) -> str:
        return f"{loss[name]:.3f} ± {half[name]:.3f}"

    leaking = f"{metrics['audit']['leaking_share']:.2%}"
    leak = "share of trainable scalars that one instance reaches both exposed and hidden"
    facts = [
        _trained_on(metrics, "each with its own mask", "which share a mask each"),
        Fact("Test instances", f"{metrics['n_test']:,}", "never trained on; run under ghost masks"),
        Fact("Mask units", f"{metrics['mask_units']:,}", "summed over the sites below"),
        Fact("Loss, train exposed", nats("train_exposed"), "all training rows, own masks"),
        Fact("Loss, train hidden", nats("train_hidden"), "all training rows, flipped masks"),
        Fact("Loss, test exposed", nats("test_exposed"), "all test rows, ghost masks"),
        Fact("Loss, test hidden", nats("test_hidden"), "all test rows, flipped ghost masks"),
        Fact("Loss, test mean network", nats("test_mean"), "all test rows, no mask"),
        Fact("Leaking parameters", leaking, leak),
        Fact("Training", f"{seconds['train']:.0f} s", "with masks, loss curves included"),
        Fact("Influence", f"{seconds['influence']:.0f} s", "everything this page shows"),
        Fact("Estimator", found["method"], f"objective: {found['objective']}, in nats"),
    ]
    if (rank := found.get("spearman_exact_linear")) is not None:
        how = f"mean over targets, {found['exact_pairs']:,} pairs estimated both ways"
        facts.append(Fact("Linear against exact", f"Spearman {rank:.2f}", how))
    if (gram := found.get("gram")) is not None:
        how = (
            f"a pass over the training data and a solve; {gram['same_sign']:.0%} of its "
            f"{gram['compared']} strongest instances of each error have the same sign by turn-over; median "
            f"standard error {gram['median_standard_error']:.2g} nats"
        )
        facts.append(Fact("Gram", f"{gram['seconds']:.0f} s", how))
    scored = found["scored_sites"]
    names = ", ".join(scored) if len(scored) < 4 else f"{len(scored)} sites"
    how = (
        "their masks are flipped; other sites run without masks, so scores are of these sites only"
    )
    facts.append(Fact("Scored sites", names, how))
    for site, values in _grouped(found["sites"]).items():
        how = (
            f"{values['units']:,.0f} mask units; mean self-influence through this site alone, against "
            f"noise of {values['noise']:.3f} nats"
        )
        facts.append(Fact(f"Learning at {site}", f"{values['signal']:+.3f} nats", how))
    return tuple(facts)


def _trained_on(metrics: dict[str, Any], alone: str, together: str) -> Fact:
    groups = metrics.get("n_groups")
    how = alone if groups is None else f"in {groups:,} groups, {together}"
    return Fact("Training rows", f"{metrics['n_train']:,}", how)


def _facts_of_trained(metrics: dict[str, Any], found: dict[str, Any]) -> tuple[Fact, ...]:
    loss, half, seconds = metrics["loss"], metrics["loss_half_width"], metrics["seconds"]
    both = {name: f"{loss[name]:.3f} ± {half[name]:.3f}" for name in ("train", "test")}
    tuned = f"{metrics['parameters']:,}"
    facts = [
        _trained_on(
            metrics, "their gradients explain the targets", "whose scores are sums over rows"
        ),
        Fact("Test instances", f"{metrics['n_test']:,}", "never trained on"),
        Fact("Parameters", tuned, "whose gradients are taken"),
        Fact("Loss, train", both["train"], "all training rows, in nats"),
        Fact("Loss, test", both["test"], "all test rows, in nats"),
        Fact("Influence", f"{seconds['influence']:.0f} s", "everything this page shows"),
        Fact("Estimator", found["method"], f"objective: {found['objective']}, in nats"),
    ]
    return tuple(facts)


def _grouped(sites: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Combine the LoRA sites: signals add up, and so do noise variances."""
    lora = {name: v for name, v in sites.items() if ".lora_A." in name}
    grouped = {name: v for name, v in sites.items() if name not in lora}
    if lora:
        grouped[f"{len(lora)} LoRA sites"] = {
            "units": sum(v["units"] for v in lora.values()),
            "signal": sum(v["signal"] for v in lora.values()),
            "noise": sum(v["noise"] ** 2 for v in lora.values()) ** 0.5,
        }
    return grouped
