"""Puts what was measured into ``docs/scale.md``, between its markers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fidelity.table import replaced

from . import RESULTS, Json
from .networks import WAYS

DOCS = Path(__file__).parents[2] / "docs" / "scale.md"
COLUMNS = (*WAYS, "random projection", "TRAK")


def retrained(found: Json) -> str:
    """Ratios to exact gram's scores with class counts removed, then the scores themselves."""
    head = ("problem, instances", "number of landmarks", *COLUMNS, "TRAK, as on the board")
    ratios: list[Sequence[str]] = [head, ("---",) * len(head)]
    scores: list[Sequence[str]] = [(*head[:2], "exact gram", *head[2:]), ("---",) * (len(head) + 1)]
    for name, problem in sorted(found.items()):
        by = problem["rows"]
        for count in problem["landmarks"]:
            named = f"{name}, {problem['instances']:,}", f"{count:,}"
            cells = [by[f"{way}, {count}"] for way in COLUMNS] + [by["TRAK, the board's"]]
            ratios.append((*named, *map(_ratio, cells)))
            scores.append((*named, *map(_scores, [by["exact gram"], *cells])))
    return f"{_table(ratios)}\n\nThe scores, raw / with class counts removed:\n\n{_table(scores)}"


def rate(found: Json) -> str:
    """Seconds by number of sentences, and those of many, extrapolated."""
    head = (
        "sentences",
        "passes alone",
        "fit",
        f"`top={found['top']}` for {found['targets']} targets",
        "peak memory of the process",
    )
    rows: list[Sequence[str]] = [head, ("---",) * len(head)]
    rows += [
        (
            f"{int(count):,}",
            f"{one['passes_s']:.0f} s",
            f"{one['fit_s']:.0f} s",
            f"{one['top_s']:.0f} s",
            f"{one['peak_gib']:.1f} GiB",
        )
        for count, one in found["sentences"].items()
    ]
    far = found["extrapolated"]
    return (
        f"{_table(rows)}\n\nFrom the last two rows: {far['per_second']:.0f} sentences per second. "
        f"Extrapolated, and not measured: a fit of {far['sentences']:,} takes {far['fit_h']:.1f} hours."
    )


def write(found: Json) -> None:
    """All tables whose figures are there."""
    text = DOCS.read_text()
    for part, made in (("retrained", retrained), ("rate", rate)):
        if part in found:
            text = replaced(text, part, made(found[part]), DOCS)
    DOCS.write_text(text)


def _ratio(row: Json) -> str:
    if "ratio" not in row:
        return "failed"
    middle, low, high = row["ratio"]
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def _scores(row: Json) -> str:
    if "raw" not in row:
        return "failed"
    return f"{row['raw'][0]:.2f} / {row['class_removed'][0]:.2f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    write(json.loads(RESULTS.read_text()))
