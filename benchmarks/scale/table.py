"""Puts what was measured into ``docs/scale.md``, between its markers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.fidelity.table import replaced

RESULTS = Path(__file__).parents[1] / "results" / "scale.json"
DOCS = Path(__file__).parents[2] / "docs" / "scale.md"


def nodes(found: dict[str, Any]) -> str:
    """One worker against two, and nodes that fail."""
    head = ("", "one process", "one worker", "two workers", "two against one")
    rows: list[tuple[str, ...]] = [head, ("---",) * 5]
    for name in ("exact", "linear"):
        by = found["scaling"]["seconds"][name]
        seconds = (f"{sorted(by[w])[len(by[w]) // 2]:.1f} s" for w in "012")
        rows.append((name, *seconds, f"{found['scaling'][name]:.2f} x"))
    lost = [("a node", "chunks written before", "seconds", "same bits"), ("---",) * 4]
    for key, name in (
        ("node_killed", "killed (SIGKILL to all of it)"),
        ("node_cut_off", "cut off the network"),
    ):
        if key in found:
            one = found[key]
            written = f"{one['written_before']} of {one['chunks']}"
            lost.append((name, written, f"{one['seconds']:.0f}", _yes(one["identical"])))
    same = ", ".join(f"{name}: {_yes(is_same)}" for name, is_same in found["same_bits"].items())
    where = "each in a network namespace" if found["namespaces"] else "on one network"
    machine = found["machine"]
    return (
        f"{_table(rows)}\n\nThe same files, byte for byte, as one process writes: {same}.\n\n"
        f"{_table(lost)}\n\n"
        f"Two raylets on one machine of two cores, {where}, one thread each; medians of "
        f"{len(found['scaling']['seconds']['exact']['1'])} rounds; torch {machine['torch']}; "
        f"{machine['date']}, commit {machine['commit']}."
    )


def memory(found: dict[str, Any]) -> str:
    """Peak memory of workers and driver."""
    rows = [("method", "ids", "targets", "kept", "worker", "driver"), ("---",) * 6]
    rows += [
        (
            one["method"],
            f"{one['ids']:,}",
            f"{one['targets']:,}",
            f"top {one['top']}" if "top" in one else "all",
            f"{one['worker_peak_gib']:.2f} GiB",
            f"{one['driver_peak_gib']:.2f} GiB",
        )
        for one in found["memory"]
    ]
    return _table(rows)


def model(found: dict[str, Any]) -> str:
    """Seconds that the model says, and that were taken."""
    rows = [("result", "run by", "model", "measured", "model / measured"), ("---",) * 5]
    for one in found["model"]["validated"]:
        kept = f", top {one['top']}" if "top" in one else ""
        where = f"{one['workers']} workers" if one["workers"] > 1 else "1 worker"
        rows.append(
            (
                f"{one['method']}{kept}, {one['targets']:,} x {one['ids']:,}",
                where if one["workers"] else "one process",
                f"{one['predicted']:.1f} s",
                f"{one['seconds']:.1f} s",
                f"{one['predicted'] / one['seconds']:.2f}",
            )
        )
    return _table(rows)


def far(found: dict[str, Any]) -> str:
    """1e9 ids, 1e6 targets, 7e9 parameters."""
    head = (
        "mask units",
        "kept",
        "on the store",
        "chunks",
        "core hours: passes",
        "core hours: scores",
    )
    rows = [head, ("---",) * 6]
    rows += [
        (
            f"{one['units']:,}",
            one["what"],
            _bytes(one["stored_bytes"]),
            f"{one['chunks']:,.0f}",
            f"{one['core_hours_passes']:,.0f}",
            f"{one['core_hours_scores']:,.0f}",
        )
        for one in found["model"]["far"]
    ]
    crowd = [("workers", "hours", "of which lost to failures", "busy"), ("---",) * 4]
    crowd += [
        (
            f"{one['workers']:,}",
            f"{one['hours']:,.1f}",
            f"{one['lost_hours']:,.2f}",
            f"{100 * one['busy']:.0f}%",
        )
        for one in found["model"]["crowd"]
    ]
    return f"{_table(rows)}\n\n{_table(crowd)}"


def write(found: dict[str, Any]) -> None:
    """All tables whose figures are there."""
    text = DOCS.read_text()
    parts = {"nodes": (nodes, "scaling"), "memory": (memory, "memory")}
    parts |= {"model": (model, "model"), "far": (far, "model")}
    for name, (made, needed) in parts.items():
        if needed in found:
            text = replaced(text, name, made(found))
    DOCS.write_text(text)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _yes(true: bool) -> str:
    return "yes" if true else "NO"


def _bytes(count: float) -> str:
    for size, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB")):
        if count >= size:
            return f"{count / size:.0f} {unit}"
    return f"{count / 1e6:.0f} MB"


if __name__ == "__main__":
    write(json.loads(RESULTS.read_text()))
