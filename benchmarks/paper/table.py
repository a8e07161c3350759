"""Puts the figures of the experiments into ``docs/paper.md``, between its markers, and draws its picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fidelity.table import replaced

from . import picture

RESULTS = Path(__file__).parent.parent / "results" / "paper.json"
DOCS = Path(__file__).parent.parent.parent / "docs" / "paper.md"
Json = dict[str, Any]

_OURS = (
    "turn-over",
    "label errors",
    "loss of the turn-over",
    "AUM of the turn-over",
    "early AUM of the turn-over",
    "cleanlab on turn-over",
    "gram",
)
_NOT_METHODS = ("nothing", "what is wrong (oracle)", "random")


def _lines(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _made(found: Json) -> str:
    machine = found["machine"]
    return (
        f"{found['seconds']:.0f} s, {machine['threads']} thread; {machine['date']}, commit "
        f"{machine['commit']}, torch {machine['torch']}."
    )


def groups(found: Json) -> str:
    """Whether the corrupted sources are found, the correlations, and every source."""
    parts = [_sources_said(found), _agreement(found)]
    sources = [
        [
            str(source["rows"]),
            f"{source['wrong']:.0%}{' (corrupted)' if source['corrupted'] else ''}",
            f"{source['effect']:+.3f} ± {source['effect_standard_error']:.3f}",
            f"{source['score']:+.2f}",
            f"{source['z']:+.1f}",
            f"{source['q']:.2g}",
            f"{source['gram']:+.3f}",
        ]
        for source in sorted(found["sources"], key=lambda one: float(one["effect"]))
    ]
    titles = ["rows", "wrong labels", "effect ± standard error", "score", "z", "q", "gram"]
    parts.append(_lines(titles, sources))
    if "longer" in found:
        parts += ["Trained longer:", _sources_said(found["longer"]), _agreement(found["longer"])]
    return "\n\n".join([*parts, _made(found)])


def _sources_said(found: Json) -> str:
    corrupted = sum(source["corrupted"] for source in found["sources"])
    others = len(found["sources"]) - corrupted
    each = [
        f"{right} of {corrupted} and {more} of {others}"
        for right, more in zip(
            found["corrupted_found"], found["others_called_harmful"], strict=True
        )
    ]
    ceiling = found["ceiling"]
    return (
        f"{found['rows']:,} rows of {len(found['sources'])} sources, {found['held_out']:,} held-out rows; "
        f"wide head of {found['units']:,} units, {found['epochs']} epochs, {found['accuracy']:.1%} of the "
        f"held-out rows right. Harmful with q <= 0.05, of the corrupted and of the other sources, "
        f"network by network: {'; '.join(each)}. Truth: {found['truth_seeds']} seeds; sd of the effects "
        f"over sources {found['effect_sd']:.3f} nats, standard error of one "
        f"{found['effect_standard_error']:.3f}. Ceilings from the seeds: Pearson "
        f"{ceiling['pearson']:.2f}, Spearman {ceiling['spearman']:.2f}."
    )


def _agreement(found: Json) -> str:
    rows = []
    for name, method in found["methods"].items():
        low, high = method["spearman_together"][1:]
        rows.append(
            [
                name,
                _with_sd(method["pearson"], method["pearson_sd"]),
                _with_sd(method["spearman"], method["spearman_sd"]),
                f"{method['spearman_without_corrupted']:.2f}",
                f"{method['pearson_together']:.2f}",
                f"{method['spearman_together'][0]:.2f} ({low:.2f} to {high:.2f})",
            ]
        )
    header = ["", "Pearson", "Spearman", "Spearman, corrupted left out"]
    header += [f"mean of {found['networks']} networks: Pearson", "Spearman (95% interval)"]
    return _lines(header, rows)


def _with_sd(value: float, sd: float | None) -> str:
    return f"{value:.2f}" if sd is None else f"{value:.2f} ± {sd:.2f}"


def label_errors(found: Json) -> str:
    """Ranking, budgets of review, cleanlab's own choice, accuracy after removal, and where ours loses."""
    sets = found["labels"]
    wrong = ", ".join(f"{name} {one['wrong_share']:.1%}" for name, one in sets.items())
    seeds = next(iter(sets.values()))["seeds"]
    parts = [
        f"{found['rows']:,} training images, {found['test_rows']:,} test images; wrong labels: {wrong}. "
        f"Mean ± sd over {seeds} seeds. Precision is of so many rows reviewed; recall is precision times "
        f"rows reviewed over rows wrong, so at as many as are wrong they are one. **Bold**: the best of a "
        f"column, random and oracle apart."
    ]
    figures = ("auc", "precision at 1%", "precision at 5%", "precision at as many as are wrong")
    for name, one in sets.items():
        columns = {figure: {k: v[figure] for k, v in one["finding"].items()} for figure in figures}
        columns["accuracy after removal"] = one["accuracy_after_removal"]
        parts.append(f"**{name}**: {one['wrong']:,} of {found['rows']:,} labels are wrong")
        parts.append(_columns(columns))
        parts.append(_said(name, columns))
    issues = []
    for name, one in sets.items():
        for given, by in one["confident_learning"].items():
            shares = [f"{by[key][0]:.3f} ± {by[key][1]:.3f}" for key in ("precision", "recall")]
            issues.append([name, given, *shares, f"{by['flagged'][0]:,.0f}"])
    parts.append("cleanlab's `find_label_issues`, which chooses how many rows, fed with:")
    parts.append(_lines(["labels", "predictions", "precision", "recall", "flagged"], issues))
    return "\n\n".join([*parts, _made(found)])


def _columns(columns: dict[str, dict[str, list[float]]]) -> str:
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    best = {figure: _best(column)[0] for figure, column in columns.items()}
    rows = []
    for name in names:
        cells = [name]
        for figure, column in columns.items():
            said = f"{column[name][0]:.3f} ± {column[name][1]:.3f}" if name in column else ""
            cells.append(f"**{said}**" if name == best[figure] else said)
        rows.append(cells)
    return _lines(["", *columns], rows)


def _best(column: dict[str, list[float]], *, ours: bool | None = None) -> tuple[str, float]:
    able = {
        name: value[0]
        for name, value in column.items()
        if name not in _NOT_METHODS and ours in (None, name.startswith(_OURS))
    }
    name = max(able, key=lambda one: able[one])
    return name, able[name]


def _said(labels: str, columns: dict[str, dict[str, list[float]]]) -> str:
    """One sentence for every column: the best of ours, and the best of the others."""
    said = []
    for figure, column in columns.items():
        ours, others = _best(column, ours=True), _best(column, ours=False)
        apart = abs(ours[1] - others[1]) > max(column[ours[0]][1], column[others[0]][1])
        verb = ("wins" if ours[1] > others[1] else "loses") if apart else "ties"
        said.append(f"{figure}: ours {verb} ({ours[0]} {ours[1]:.3f}, {others[0]} {others[1]:.3f})")
    return (
        f"Best of ours against best of the others, {labels} (a tie: not further apart than the larger "
        f"sd): {'; '.join(said)}."
    )


def hidden(found: Json) -> str:
    """The four losses of every network at the end, and the curves."""
    rows = []
    for name, one in found["networks"].items():
        rows.append(
            [
                name,
                *(_interval(one["last"][side]) for side in _SIDES),
                f"{one['exposed_over_hidden']:.2f}",
                "yes" if one["hidden_did_not_learn"] else "no",
                f"{one['accuracy']:.3f}{'' if one['above_chance'] else ' (chance)'}",
                "**yes**" if one["holds"] else "no",
                f"{one['leaking_share']:.1%}" + _buffers(one["leaking_buffers"]),
            ]
        )
    header = ["", *(side.replace("_", " ") for side in _SIDES), "exposed / hidden"]
    header += ["hidden did not learn", "test accuracy, whole network", "holds", "leaks (audit)"]
    said = (
        f"{found['rows']:,} images and {found['test_rows']:,} test images ({found['other_rows']:,} others "
        f"for the frozen convolutions); {found['sentences']} sentences and {found['test_sentences']} test "
        f"sentences. *Holds*: exposed / hidden at most {found['ratio']}, hidden did not learn, and the "
        f"whole network is better than chance. Nats ± half width of the 95% interval."
    )
    parts = [said, _lines(header, rows)]
    for name, one in found["networks"].items():
        curves = [
            [str(step), *(f"{one['curves'][side][index][0]:.3f}" for side in _SIDES)]
            for index, step in enumerate(one["steps"])
        ]
        header = [one["unit"], *(side.replace("_", " ") for side in _SIDES)]
        parts += [f"{name}, over training:", _lines(header, curves)]
    return "\n\n".join([*parts, _made(found)])


_SIDES = ("train_exposed", "train_hidden", "test_exposed", "test_hidden")


def _interval(value: list[float]) -> str:
    return f"{value[0]:.3f} ± {value[1]:.3f}"


def _buffers(count: int) -> str:
    return f", {count} buffers" if count else ""


def random_labels(found: Json) -> str:
    """Both losses of every kind by epoch."""
    kinds = list(found["curves"])
    header = ["epoch", *(f"{name} ({found['rows'][name]:,})" for name in kinds)]
    rows = []
    for index, epoch in enumerate(found["epochs"]):
        cells = []
        for name in kinds:
            exposed, unseen = (found["curves"][name][side][index][0] for side in _BOTH)
            cells.append(f"{exposed:.2f} / {unseen:.2f}")
        rows.append([str(epoch), *cells])
    widths = max(
        value[1] for name in kinds for side in _BOTH for value in found["curves"][name][side]
    )
    return "\n\n".join(
        [
            f"Mean loss in nats, exposed / hidden (test images under ghosts' masks); half widths of the "
            f"95% intervals are at most {widths:.2f}.",
            _lines(header, rows),
            _made(found),
        ]
    )


def errors(found: Json) -> str:
    """How many errors are turned, of sentences and of images."""
    parts = []
    for name, one in found["sets"].items():
        rows = [
            [
                "nothing",
                "",
                _counts(one["turned_without_removal"]),
                "",
                "",
                "",
                f"{one['accuracy']:.3f}",
            ]
        ]
        for method, by in one["methods"].items():
            more = f"{100 * by['more']:+.1f} ± {100 * by['more_standard_error']:.1f}"
            rows.append(
                [
                    method,
                    str(by["removed"]),
                    _counts(by["turned"]),
                    _counts(by["turned_at_random"]),
                    more,
                    f"{by['p']:.2g}",
                    f"{by['accuracy']:.3f} ({by['accuracy_at_random']:.3f})",
                ]
            )
        header = ["removed by", "instances", "errors turned, seed by seed", "at random"]
        header += ["more, % of the errors ± standard error", "p", "accuracy (at random)"]
        parts += [
            f"**{name}**: {one['errors']:,} errors on {one['held_out']:,} held-out rows, {one['rows']:,} "
            f"training rows; wide head of {one['units']:,} units, {one['epochs']} epochs; {one['seeds']} "
            f"trainings without each set, {one['draws']} random sets for each.",
            _lines(header, rows),
        ]
    return "\n\n".join([*parts, _made(found)])


def _counts(values: list[float]) -> str:
    return ", ".join(f"{value:.0f}" for value in values)


_BOTH = ("exposed", "hidden")


def shift(found: Json) -> str:
    """Every kind of head, cleansing against the others, and every ranking at every share."""
    said = (
        f"{found['rows']:,} training, {found['held_out']:,} validation and {found['test_rows']:,} test rows; "
        f"mean ± sd over {found['splits']} splits of {found['heads']} heads each. Turn-over: "
        f"{found['masked_heads']} wide heads of {found['units']:,} units."
    )
    kinds = [
        [
            _KINDS.get(name, name),
            _percent(one["accuracy"]),
            _interval(one["loss"]),
            _chosen(found["chosen"].get(name)),
        ]
        for name, one in found["kinds"].items()
        if " as many as " not in name
    ]
    parts = [
        said,
        _lines(["", "accuracy, %", "loss, nats", "chosen on the validation rows"], kinds),
    ]
    parts.append(
        f"Cleansing minus the others, paired over the splits: points of accuracy, then nats of loss, ± "
        f"standard error. **Beats**: at least {100 * found['points']:g} points and more than "
        f"{found['errors']:g} standard errors."
    )
    names = list(found["against"])
    against = [
        [_KINDS.get(other, other), *(_difference(found["against"][name][other]) for name in names)]
        for other in found["against"][names[0]]
    ]
    parts.append(_lines(["", *names], against))
    shares = next(iter(found["curves"].values()))
    curves = [
        [
            _KINDS.get(name, name),
            *(f"{_percent(one['accuracy'])}, {one['loss'][0]:.3f}" for one in by_share.values()),
        ]
        for name, by_share in found["curves"].items()
    ]
    parts += ["Accuracy and loss on the test rows by the share taken out:"]
    parts.append(_lines(["", *(f"{float(share):.0%}" for share in shares)], curves))
    return "\n\n".join([*parts, _made(found)])


def full_bert(found: Json) -> str:
    """What fine-tuning on every set gives, and what cleansing is worth against the others."""
    names = ("accuracy", "loss", "accuracy_calibrated", "loss_calibrated", "accuracy_films")
    rows = [
        [
            _KINDS.get(name, name),
            f"{one['removed']:,}",
            *(_seeds(one[each], 1 if each.startswith("accuracy") else 3) for each in names),
        ]
        for name, one in found["sets"].items()
    ]
    header = [
        "taken out by",
        "rows",
        "accuracy, %",
        "loss",
        "accuracy, calibrated",
        "loss, calibrated",
    ]
    ours = list(found["against"])
    others = list(dict.fromkeys(other for one in found["against"].values() for other in one))
    against = [
        [_KINDS.get(other, other), *(_points(found["against"][name].get(other)) for name in ours)]
        for other in others
    ]
    return "\n\n".join(
        [
            f"{found['rows']:,} training, {found['held_out']:,} validation and {found['test_rows']:,} test "
            f"rows, one split; {found['epochs']} epochs; seeds: {found['seeds']}.",
            _lines([*header, "accuracy on films"], rows),
            "Difference in points of accuracy on the test rows, uncalibrated, ± standard error over these "
            "rows:",
            _lines(["", *ours], against),
            _fitted(found),
            _made(found),
        ]
    )


def full_vgg(found: Json) -> str:
    """The four losses of a run on images, and what is behind its errors."""
    return "\n\n".join(
        [
            f"VGG-{found['depth']} of width {found['width']}, convolutions trained on "
            f"{found['other_rows']:,} other images and frozen; {found['rows']:,} training and "
            f"{found['test_rows']:,} test images. With ordinary dropout in place of masks: test accuracy "
            f"{found['without_turnover']:.3f}.",
            _fitted(found),
            _made(found),
        ]
    )


def _fitted(found: Json) -> str:
    """The losses of one run and its errors."""
    header = [*(side.replace("_", " ") for side in _SIDES), "exposed / hidden"]
    header += ["hidden did not learn", "test accuracy, whole network", "holds", "leaks (audit)"]
    row = [
        *(_interval(found["last"][side]) for side in _SIDES),
        f"{found['exposed_over_hidden']:.2f}",
        "yes" if found["hidden_did_not_learn"] else "no",
        f"{found['accuracy']:.3f}",
        "**yes**" if found["holds"] else "no",
        f"{found['leaking_share']:.1%}",
    ]
    curves = [
        [str(step), *(f"{found['curves'][side][index][0]:.3f}" for side in _SIDES)]
        for index, step in enumerate(found["steps"])
    ]
    return "\n\n".join(
        [
            _lines(header, [row]),
            _lines(["step", *header[: len(_SIDES)]], curves),
            f"{found['errors']:,} errors explained, {found['errors_with_significant']:,} of them with "
            f"instances at q <= 0.05: {found['significant_pairs']:,} pairs, {found['mean_significant']:g} on "
            f"an error; fresh ghosts at p < 0.01: {found['ghost_false_positives']:.4f}.",
        ]
    )


def _seeds(values: list[float], digits: int) -> str:
    scale = 100 if digits == 1 else 1
    return ", ".join(f"{scale * value:.{digits}f}" for value in values)


def _points(found: list[float] | None) -> str:
    return "" if found is None else f"{100 * found[0]:+.1f} ± {100 * found[1]:.1f}"


_KINDS = {
    "none": "all rows",
    "loss": "highest loss",
    "loss, as many": "highest loss, as many",
    "tuned": "all rows; epochs, weight decay, threshold tuned",
    "tuned, with temperature": "all rows; these and the temperature tuned",
    "gram, calibrated": "gram, then threshold and temperature",
    "turn-over, calibrated": "turn-over, then threshold and temperature",
}


def _chosen(values: list[Any] | None) -> str:
    said = [
        f"{value:.0%}" if isinstance(value, float) else f"{value[0]} and {value[1]:g}"
        for value in values or ()
    ]
    return ", ".join(said)


def _percent(value: list[float]) -> str:
    return f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"


def _difference(found: Json) -> str:
    points, error = (100 * value for value in found["accuracy"])
    said = f"{points:+.1f} ± {error:.1f}"
    loss = f"{found['loss'][0]:+.3f} ± {found['loss'][1]:.3f}"
    return f"{f'**{said}**' if found['beats'] else said}, {loss}"


RENDERED: dict[str, Callable[[Json], str]] = {
    "groups": groups,
    "errors": errors,
    "label_errors": label_errors,
    "hidden": hidden,
    "random_labels": random_labels,
    "shift": shift,
    "full_bert": full_bert,
    "full_vgg": full_vgg,
}


def main() -> None:
    text, found = DOCS.read_text(), json.loads(RESULTS.read_text())
    for name, render in RENDERED.items():
        if name in found:
            text = replaced(text, name, render(found[name]))
    DOCS.write_text(text)
    if {"shift", "hidden"} <= set(found):
        picture.DOCS.write_text(picture.drawn(found))


if __name__ == "__main__":
    main()
