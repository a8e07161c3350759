"""Sentences per second through the demo's BERT with LoRA, by landmarks, and what 100,000 would take.

Numbers of sentences run in processes of their own, so that their peak memory is their own. The time of
100,000 is extrapolated from the last two.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.fidelity import features
from benchmarks.memory import peak_gib
from turnover import Gram, Influence, MaskSpec
from turnover.batches import Batch
from turnover.data import demo
from turnover.data.text import TextData
from turnover.models.text import ClassifierConfig
from turnover.runs.run import Run
from turnover.tasks.fit import FitConfig, fit
from turnover.tasks.training import TrainingConfig

from . import Json

SENTENCES, FAR = (1000, 2000, 4000), 100_000
LANDMARKS, TARGETS, TOP = 1000, 32, 20
_TRAIN, _HEAD_UNITS, _BATCH = 1000, 32768, 32
_DROPPED = 0.1
_FEW = 8


def sentences(count: int) -> TextData:
    """Movie-review sentences; beyond those that there are, copies with words dropped and shuffled."""
    texts, labels = features.sentences()
    generator = np.random.default_rng(0)
    made = [texts[row] if row < len(texts) else "" for row in range(count)]
    for row in range(len(texts), count):
        words = texts[row % len(texts)].split()
        kept = [word for word in words if generator.random() >= _DROPPED] or words
        made[row] = " ".join(kept[at] for at in generator.permutation(len(kept)))
    kinds = [int(labels[row % len(texts)]) for row in range(count)]
    keys = [str(row) for row in range(count)]
    return TextData(made, kinds, torch.arange(count), keys, ["fresh", "rotten"])


def trained(folder: Path) -> Path:
    """Folder of the demo's BERT, trained for an epoch on the first sentences."""
    out = folder / "bert"
    if not out.exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = FitConfig(
            ClassifierConfig(str(demo.model_folder()), _HEAD_UNITS),
            TrainingConfig(epochs=1, head_learning_rate=5e-5),
            MaskSpec(seed=0),
            compare=False,
            curve_rows=_BATCH,
        )
        data = sentences(_TRAIN + 200)
        fit(config, data.take(range(_TRAIN)), data.take(range(_TRAIN, len(data))), out)
    return out


def measured(folder: Path, count: int) -> Json:
    """Seconds and peak memory of one number of sentences, in this process.

    The passes alone are timed with a few landmarks, whose inner products are few.
    """
    run = Run.load(folder / "bert", "cpu")
    data = run.encode(sentences(count))
    rows = [
        replace(data.batch(chunk), ids=torch.tensor(chunk))
        for chunk in data.chunks(range(count), _BATCH)
    ]
    passes, _ = _fitted(run, rows, _FEW)
    seconds, influence = _fitted(run, rows, LANDMARKS)
    targets = run.encode(run.test)
    start = time.perf_counter()
    found = influence.estimate([targets.batch(range(TARGETS))], top=TOP)
    assert found.scores.shape == (TARGETS, 2 * TOP)
    return {
        "passes_s": passes,
        "fit_s": seconds,
        "top_s": time.perf_counter() - start,
        "peak_gib": peak_gib(),
    }


def _fitted(run: Run, rows: Sequence[Batch], landmarks: int) -> tuple[float, Influence]:
    start = time.perf_counter()
    influence = Influence(run.network, method=Gram(landmarks=landmarks)).fit(rows)
    return time.perf_counter() - start, influence


def rates(folder: Path) -> Json:
    """Seconds and peak memory by number of sentences, and those of 100,000 on a line through the last two."""
    trained(folder)
    found = {}
    for count in SENTENCES:
        command = [sys.executable, "-m", "benchmarks.gram_scale", "--sentences", str(count)]
        command += ["--folder", str(folder)]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[str(count)] = json.loads(said)
        print(f"{count:,} sentences, {LANDMARKS} landmarks: {found[str(count)]}", flush=True)
    line = extrapolated({int(count): one["fit_s"] for count, one in found.items()})
    print(f"{FAR:,} sentences, EXTRAPOLATED: {line}", flush=True)
    settings = {"landmarks": LANDMARKS, "targets": TARGETS, "top": TOP}
    return settings | {"sentences": found, "extrapolated": line}


def extrapolated(seconds: dict[int, float]) -> Json:
    """Sentences per second beyond a start that all share, and hours of 100,000.

    Args:
        seconds: of a fit, by number of sentences.
    """
    (few, early), (many, late) = sorted(seconds.items())[-2:]
    per_second = (many - few) / (late - early)
    return {
        "sentences": FAR,
        "per_second": per_second,
        "fit_h": (late + (FAR - many) / per_second) / 3600,
    }
