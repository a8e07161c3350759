"""Puts the board and its neighbors into ``docs/fidelity.md`` and ``docs/labels.md``, between markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from . import board, finetuned, language_board, mislabels, relabel

DOCS = Path(__file__).parent.parent.parent / "docs" / "fidelity.md"
LABELS = DOCS.parent / "labels.md"

_NETWORKS = {"turnover": "turn-over", "head": "wide head"}
_FINE_TUNED = {"adapter": "LoRA in the last two blocks", "whole": "The last two blocks themselves"}
_DEFAULT = "label errors, features"
_OURS_TOO = ("left-out margin, features",)
_SHOWN = (
    _DEFAULT,
    "AUM, standard",
    "early loss, standard",
    "5-fold logistic regression (cleanlab), features",
)
_GROUPS = {"ours": 0, "peer": 1, "trivial": 2}


def problem_table(name: str, found: dict[str, Any]) -> str:
    """One problem: every method on every network, raw / class-removed by both truths."""
    lines = [
        f"### {name}: {found['title']}",
        "",
        _ceilings(found),
        "",
        "| method | network | standard truth | turn-over truth | mislabel AUC | trainings "
        "| seconds: training + method | stored |",
        "|---|---|---|---|---|---|---|---|",
    ]
    methods = sorted(
        ((method, entry) for method, entry in found["methods"].items() if entry["kind"] in _GROUPS),
        key=lambda item: _GROUPS[item[1]["kind"]],
    )
    for method, entry in methods:
        there = [network for network in board.NETWORKS if network in entry]
        lines += [_row(method, network, entry[network]) for network in there]
    return "\n".join(lines)


def _ceilings(found: dict[str, Any]) -> str:
    said = []
    for truth in board.TRUTHS:
        ceiling = found["truth"][truth]["ceiling"]
        said.append(
            f"{'turn-over' if truth == 'turnover' else truth} truth "
            f"{ceiling['raw']:.2f} / {ceiling['class_removed']:.2f}"
        )
    subsets = found["subsets"]
    return (
        f"{found['train']:,} training instances, {found['targets']} targets, {subsets['count']} "
        f"half-subsets x {found['truth_seeds']} seeds (manifest `{subsets['sha256'][:12]}`). "
        f"Ceilings: {', '.join(said)}."
    )


def _row(method: str, network: str, row: dict[str, Any]) -> str:
    cells = [method, _NETWORKS.get(network, network)]
    failed = row.get("note", "").startswith("failed")
    for truth in board.TRUTHS:
        found = row.get(f"{truth}_truth")
        cells.append(row["note"] if failed else _figures(found))
        if failed:
            cells.append("")
            break
    auc = row.get("mislabel_auc")
    cells += [
        "" if auc is None else f"{auc:.3f}",
        str(row["trainings"]),
        f"{row['train_s']:.1f} + {row['prepare_s'] + row['score_s']:.1f}",
        _bytes(row["stored_bytes"]),
    ]
    return f"| {' | '.join(cells)} |"


def _figures(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    raw, removed = found["raw"], found["class_removed"]
    return f"{raw[0]:.3f} / {removed[0]:.3f} ({removed[1]:.2f} to {removed[2]:.2f})"


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count //= 1000
    return f"{count:.0f} GB"


def mislabel_table(found: dict[str, Any]) -> str:
    """Mean AUC by problem, noise and rate."""
    columns = [f"{kind} {rate:.0%}" for kind in mislabels.KINDS for rate in mislabels.RATES]
    lines = []
    for name in sorted({cell.split("/")[0] for cell in found}):
        cells = [
            found.get(f"{name}/{kind}/{rate}", {})
            for kind in mislabels.KINDS
            for rate in mislabels.RATES
        ]
        rows = sorted({row for cell in cells for row in cell})
        seeds = max(figure["seeds"] for cell in cells for figure in cell.values())
        lines += [f"**{name}**, {seeds} seeds", "", f"| method, network | {' | '.join(columns)} |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for row in rows:
            figures = [f"{cell[row]['mean']:.3f}" if row in cell else "" for cell in cells]
            lines.append(f"| {row} | {' | '.join(figures)} |")
        lines.append("")
    return "\n".join(lines)


def standing_table(runs: dict[str, dict[str, dict[str, float]]]) -> str:
    """The default against the best other row of every cell, paired by seed, and precisions."""
    cells: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for key, found in runs.items():
        if _DEFAULT in found:
            cell, _, seed = key.rpartition("/")
            cells.setdefault(cell, {})[seed] = found
    shown = ", ".join(name.partition(",")[0] for name in _SHOWN)
    lines = [
        f"| problem, noise | label errors | best other row | difference ± standard error | precision at 1%: "
        f"{shown} | at 5% |",
        "|---|---|---|---|---|---|",
    ]
    held: dict[str, list[bool]] = {}
    for cell, seeds in sorted(cells.items()):
        auc = {
            name: np.array([found[name]["auc"] for found in seeds.values()])
            for name in next(iter(seeds.values()))
            if name not in _OURS_TOO and all(name in found for found in seeds.values())
        }
        own = auc.pop(_DEFAULT)
        best = max(auc, key=lambda name: float(auc[name].mean()))
        gaps = own - auc[best]
        error = float(gaps.std(ddof=1)) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
        problem, kind, rate = cell.split("/")
        held.setdefault(problem, []).append(bool(gaps.mean() >= -error))
        precisions = [
            " / ".join(
                f"{np.mean([found[name][f'precision_at_{at}'] for found in seeds.values()]):.2f}"
                for name in _SHOWN
            )
            for at in (10, 50)
        ]
        lines.append(
            f"| {problem}, {kind} {float(rate):.0%} | {own.mean():.3f} | {best} {auc[best].mean():.3f} "
            f"| {gaps.mean():+.3f} ± {error:.3f} | {' | '.join(precisions)} |"
        )
    said = ", ".join(f"{sum(one)} of {len(one)} on {name}" for name, one in sorted(held.items()))
    return "\n".join([*lines, "", f"First, or within one standard error of the first: {said}."])


def ghost_table(problems: dict[str, Any]) -> str:
    """Rates of fresh ghosts, and their share of the lists they are mixed into."""
    lines = [
        "| problem | ghost pairs | p < 0.05 | p < 0.01 | p < 1e-3 | p < 1e-4 "
        "| ghosts' share of q <= 0.1 lists (at most 0.05) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in sorted(problems.items()):
        ghosts = found["ghosts"]
        below = ghosts["below"]
        lines.append(
            f"| {name} | {ghosts['pairs']:,} | {below['0.05']:.4f} | {below['0.01']:.4f} "
            f"| {below['0.001']:.5f} | {below['0.0001']:.6f} "
            f"| {ghosts['ghosts_share_of_lists']:.3f} +- {ghosts['ghosts_share_error']:.3f} |"
        )
    return "\n".join(lines)


def finetuned_table(title: str, found: dict[str, Any]) -> str:
    """Methods on a fine-tuned BERT, the best first."""
    ceiling = found["ceiling"]
    lines = [
        f"**{title}.** Halves: {found['accuracy_of_halves']:.0%} of the targets right. Ceilings: "
        f"{ceiling['raw']:.2f} / {ceiling['class_removed']:.2f}.",
        "",
        "| method | raw | class-removed | seconds |",
        "|---|---|---|---|",
    ]
    methods = found["methods"].items()
    for name, one in sorted(methods, key=lambda item: -item[1]["class_removed"][0]):
        cells = (_interval(one["raw"]), _interval(one["class_removed"]))
        name = name.replace("*", "\\*")
        lines.append(f"| {name} | {' | '.join(cells)} | {one['seconds']:.0f} |")
    return "\n".join(lines)


def language_table(found: dict[str, Any]) -> str:
    """Methods on a fine-tuned language model, the best first, and those that failed."""
    references = [one for one in language_board.REFERENCES if one in found["methods"]]
    lines = [
        f"**{found['title']}.** Ceiling of the halves: {found['ceiling']:.2f}.",
        "",
        f"| method | halves | without 5% | {' | '.join(f'minus {one}' for one in references)} | seconds |",
        "|---" * (len(references) + 4) + "|",
    ]
    methods = found["methods"].items()
    for name, one in sorted(methods, key=lambda item: -item[1].get("halves", [-2])[0]):
        if "error" in one:
            lines.append(f"| {name} | failed: {one['error']} {'| ' * (len(references) + 3)}|")
            continue
        cells = [_interval(one["halves"]), _interval(one["leave_5%"])]
        cells += [_interval(one["minus"].get(other, {}).get("halves")) for other in references]
        lines.append(f"| {name} | {' | '.join(cells)} | {one['seconds']:.0f} |")
    return "\n".join(lines)


def _interval(found: list[float] | None) -> str:
    if found is None:
        return ""
    mean, low, high = found
    return f"{mean:.3f} ({low:.2f} to {high:.2f})"


def replaced(text: str, marker: str, content: str, page: Path = DOCS) -> str:
    """The text with what lies between a marker's two comments replaced."""
    begin, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no markers {begin} and {end}")
    return f"{before}{begin}\n\n{content.strip()}\n\n{end}{after}"


def main() -> None:
    text = DOCS.read_text()
    if board.RESULTS.exists():
        problems = json.loads(board.RESULTS.read_text())["problems"]
        tables = [problem_table(name, found) for name, found in sorted(problems.items())]
        text = replaced(text, "board", "\n\n".join(tables))
        text = replaced(text, "ghosts", ghost_table(problems))
    if mislabels.RESULTS.exists():
        found = json.loads(mislabels.RESULTS.read_text())
        text = replaced(text, "mislabels", mislabel_table(found["auc"]))
        text = replaced(text, "standing", standing_table(found["runs"]))
    if finetuned.RESULTS.exists():
        found = json.loads(finetuned.RESULTS.read_text())
        tables = [finetuned_table(title, found[kind]) for kind, title in _FINE_TUNED.items()]
        text = replaced(text, "finetuned", "\n\n".join(tables))
    if language_board.RESULTS.exists():
        found = json.loads(language_board.RESULTS.read_text())
        text = replaced(text, "language", "\n\n".join(map(language_table, found.values())))
    DOCS.write_text(text)
    if relabel.RESULTS.exists():
        found = json.loads(relabel.RESULTS.read_text())["accuracy"]
        content = relabel.page_table(found)
        LABELS.write_text(replaced(LABELS.read_text(), "relabel", content, LABELS))


if __name__ == "__main__":
    main()
