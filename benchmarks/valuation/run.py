"""Values the training rows of OpenDataVal's data sets, judges the values by its experiments, and writes
``benchmarks/results/valuation.json``.

What has finished is kept in ``runs/valuation``, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.fidelity.board import machine
from turnover.evaluation import mislabel

from .methods import METHODS

KEPT = Path("runs/valuation")
RESULTS = Path(__file__).parent.parent / "results" / "valuation.json"
SIZES = {
    "digits": (500, 100, 500),
    "breast_cancer": (300, 100, 169),
    "gaussian_classifier": (500, 100, 500),
    "gaussian_classifier_high_dim": (500, 100, 500),
}
"""Training, validation and test rows of each data set."""
NOISE = {"labels": "mix_labels", "features": "add_gauss_noise", "clean": "mix_labels"}
"""OpenDataVal's noise; ``"clean"``: in the training labels alone."""
ON_CLEAN = (
    "gram, validation",
    "turn-over, validation",
    "LossVal, 30 epochs",
    "KNN-Shapley",
    "LAVA",
    "DVRL",
)
"""Methods that use the validation data, and are judged with clean ones too."""
RATE, SEEDS, BINS = 0.2, 3, 10
LAYERS, UNITS = 3, 100
FIT = {"epochs": 10, "batch_size": 128, "lr": 0.01}
"""Training of the network that most methods explain or train again, and of those of the curves."""
Json = dict[str, Any]


def fetch(data: str, noise: str, seed: int) -> Any:
    """Data of one cell: standardized features, then OpenDataVal's own split and noise.

    Its noise reaches the validation labels, or inputs, at the same rate.
    """
    from opendataval.dataloader import DataFetcher

    np.random.seed(seed)  # noqa: NPY002  the synthetic data sets draw by the global generator
    fetcher = DataFetcher(data, random_state=seed)
    spread = fetcher.covar.std(axis=0)
    fetcher.covar = (fetcher.covar - fetcher.covar.mean(axis=0)) / np.where(spread > 0, spread, 1)
    fetcher.split_dataset_by_count(*SIZES[data]).noisify(NOISE[noise], noise_rate=RATE)
    if noise == "clean":
        fetcher.y_valid = fetcher.labels[fetcher.valid_indices]
    return fetcher


def judge(method: str, data: str, noise: str, seed: int) -> Json:
    """Values of one method in one cell, and what OpenDataVal's experiments say of them."""
    from opendataval.experiment import exper_methods
    from opendataval.model import ClassifierMLP

    fetcher = fetch(data, noise, seed)
    shape = (*fetcher.covar_dim, *fetcher.label_dim)
    torch.manual_seed(seed)
    model = ClassifierMLP(*shape, layers=LAYERS, hidden_dim=UNITS)
    evaluator = METHODS[method].made(seed)
    torch.manual_seed(seed)
    start = time.process_time()
    evaluator.train(fetcher, model, **FIT)
    values = np.asarray(evaluator.data_values, dtype=np.float64)
    found: Json = {"seconds": time.process_time() - start}
    noisy = np.zeros(len(values), dtype=bool)
    noisy[fetcher.noisy_train_indices] = True
    count = int(noisy.sum())
    judged = mislabel(-values, noisy, at=[count])
    found["auc"], found["precision"] = judged.auc, judged.precision_at[count]
    found["kmeans_f1"] = exper_methods.noisy_detection(evaluator, fetcher)["kmeans_f1"]
    discovered = exper_methods.discover_corrupted_sample(evaluator, fetcher, percentile=1 / BINS)
    found["found"] = discovered["corrupt_found"][: BINS + 1]
    if noise == "labels":
        torch.manual_seed(seed)
        curves = exper_methods.remove_high_low(
            evaluator, fetcher, model, percentile=1 / BINS, train_kwargs=FIT
        )
        for end, name in (("least", "without_low"), ("most", "without_high")):
            (curve,) = (curves[key] for key in curves if key.startswith(f"remove_{end}"))
            found[name] = curve[:BINS]
    return found


def jobs(seeds: int = SEEDS) -> dict[str, Callable[[], Json]]:
    """The computations by name, seed by seed, so that a part of the board is a board of fewer seeds."""
    return {
        f"{data}/{noise}/{method}/{seed}": partial(judge, method, data, noise, seed)
        for seed, data, noise, method in product(range(seeds), SIZES, NOISE, METHODS)
        if noise != "clean" or method in ON_CLEAN
    }


def _path(name: str) -> Path:
    return KEPT / f"{name.replace('/', '-').replace(' ', '_')}.json"


def _rounded(found: Json) -> Json:
    return {
        key: [round(one, 4) for one in value] if isinstance(value, list) else round(value, 4)
        for key, value in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    KEPT.mkdir(parents=True, exist_ok=True)
    missing = {name: job for name, job in jobs(options.seeds).items() if not _path(name).is_file()}
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # pin_memory, on a CPU
        for name, job in tqdm(missing.items(), unit=" values"):
            _path(name).write_text(json.dumps(_rounded(job()), indent=1))
    results = {name: json.loads(_path(name).read_text()) for name in jobs(options.seeds)}
    RESULTS.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
