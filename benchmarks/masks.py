"""Cost of making masks beside ``torch.rand(shape) < p``, in one process, as a ratio.

Prints a table and writes ``benchmarks/results/masks.json``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from turnover import MaskSpec

ROWS, UNITS, REPEATS = 1000, 8192, 15


def seconds(*functions: Callable[[], object]) -> list[float]:
    """Median seconds of each, interleaved so that a busy moment hits all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(REPEATS):
        for index, function in enumerate(functions):
            start = time.perf_counter()
            function()
            times[index].append(time.perf_counter() - start)
    return [statistics.median(values[1:]) for values in times]


def main() -> None:
    ids = torch.arange(ROWS)
    rows = []
    print(f"{ROWS} x {UNITS} masks, {torch.get_num_threads()} threads")
    print(f"{'keep':>6} {'balanced':>9} {'masks ms':>9} {'rand ms':>8} {'ratio':>6}")
    for keep, balanced in ((0.5, True), (0.5, False), (0.25, False), (0.3, False), (0.9, False)):
        spec = MaskSpec(keep, 0, balanced)

        def masks(spec: MaskSpec = spec) -> torch.Tensor:
            return spec.exposed(ids, "site", UNITS)

        def rand(keep: float = keep) -> torch.Tensor:
            return torch.rand(ROWS, UNITS) < keep

        ours, theirs = seconds(masks, rand)
        rows.append({"keep": keep, "balanced": balanced, "ratio": ours / theirs})
        print(
            f"{keep:>6} {balanced!s:>9} {ours * 1e3:>9.1f} {theirs * 1e3:>8.1f} {ours / theirs:>6.2f}"
        )
    out = Path(__file__).parent / "results" / "masks.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"rows": ROWS, "units": UNITS, "table": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
