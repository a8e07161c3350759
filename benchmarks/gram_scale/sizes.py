"""Seconds and peak memory by number of instances, up to a million of made features.

Sizes run in processes of their own, so that their peak memory is their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.memory import peak_gib
from turnover import Gram, Influence

from . import Json

SIZES, LANDMARKS, TARGETS, TOP = (62_500, 250_000, 1_000_000), 1000, 1000, 100
FEATURES, HIDDEN, BATCH, DRAWN = 384, 256, 1000, 8


class Drawn:
    """Batches of made features, drawn anew in each pass; labels are a noisy function of them."""

    def __init__(self, rows: int, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._rule = torch.randn((FEATURES, DRAWN), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return -(-self._rows // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for start in range(0, self._rows, BATCH):
            count = min(BATCH, self._rows - start)
            generator = torch.Generator().manual_seed(self._seed + start)
            x = 4 * functional.normalize(torch.randn((count, FEATURES), generator=generator), dim=1)
            noise = torch.randn(count, generator=generator)
            y = ((x @ self._rule).tanh().sum(dim=1) + noise > 0).long()
            yield x, y, torch.arange(start, start + count)


def measured(rows: int) -> Json:
    """Seconds and peak memory of one size, in this process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for x, y, _ in Drawn(60_000, seed=2**40):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    influence = Influence(model.eval(), method=Gram(landmarks=LANDMARKS))
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # the second reads what the first has stored
            start = time.perf_counter()
            influence.fit(Drawn(rows, seed=1), out=f"{folder}/fit")
            seconds.append(time.perf_counter() - start)
        stored = sum(one.stat().st_size for one in Path(folder).rglob("*") if one.is_file())
    start = time.perf_counter()
    found = influence.estimate(Drawn(TARGETS, seed=2**41), top=TOP)
    assert found.scores.shape == (TARGETS, 2 * TOP)
    return {
        "fit_s": seconds[0],
        "read_s": seconds[1],
        "top_s": time.perf_counter() - start,
        "stored_gib": stored / 2**30,
        "peak_gib": peak_gib(),
    }


def sizes() -> Json:
    """Seconds and peak memory by number of instances."""
    found = {}
    for rows in SIZES:
        command = [sys.executable, "-m", "benchmarks.gram_scale", "--rows", str(rows)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[str(rows)] = json.loads(said)
        print(f"{rows:,} instances, {LANDMARKS} landmarks: {found[str(rows)]}", flush=True)
    last = found[str(SIZES[-1])]
    named = {f"million_{name}": value for name, value in last.items()}
    return {"landmarks": LANDMARKS, "targets": TARGETS, "top": TOP, "sizes": found} | named
