"""Puts what each tool needs into ``docs/compare.md``, between its markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.fidelity.table import replaced

RESULTS = Path(__file__).parents[1] / "results" / "effort.json"
DOCS = Path(__file__).parents[2] / "docs" / "compare.md"
_HEADER = (
    "",
    "lines added or changed",
    "functions to write",
    "passes over the training data, its own training apart",
    "on disk",
    "peak memory",
    "CPU seconds: training + after it",
    "mislabel AUC",
    "LDS: raw / class-removed",
)


def effort(found: dict[str, Any]) -> str:
    """The table, and how it was measured."""
    rows, machine = dict(found["rows"]), found["machine"]
    base = rows.pop("base")
    cells = [_HEADER, ("---",) * len(_HEADER), _row(base, None)]
    cells += [_row(one, base) for one in rows.values()]
    made = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    packages = ", ".join(dict.fromkeys(one["package"] for one in rows.values()))
    runs = sorted({one["runs"] for one in found["rows"].values()})
    said = (
        f"Medians of {' or '.join(map(str, runs))} timed runs on {machine['threads']} thread; LDS by "
        f"{found['subsets']} half-subsets x {found['seeds']} seeds. {packages}; torch "
        f"{machine['torch']}; {machine['date']}, commit {machine['commit']}."
    )
    return f"{made}\n\n{said}"


def _row(one: dict[str, Any], base: dict[str, Any] | None) -> tuple[str, ...]:
    needs = ("", "", "")
    if base is not None:
        passes = one["passes"] - base["passes"]
        needs = (str(one["lines"]), str(one["functions"]), f"{passes:.0f}")
    auc, raw, removed = (one[name] for name in ("mislabel_auc", "lds", "lds_class_removed"))
    return (
        one["title"],
        *needs,
        _bytes(one["stored_bytes"]),
        _bytes(one["peak_bytes"]),
        f"{one['train_seconds']:.1f} + {one['seconds']:.2f}",
        "" if auc is None else f"{auc:.3f}",
        "" if raw is None else f"{raw:.2f} / {removed:.2f}",
    )


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def main() -> None:
    found = json.loads(RESULTS.read_text())
    DOCS.write_text(replaced(DOCS.read_text(), "effort", effort(found)))


if __name__ == "__main__":
    main()
