"""EK-FAC influence (Grosse et al. 2023)."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from ..methods import Attribution, Scored

_ROWS = 250


def ekfac(task: Attribution) -> Scored:
    """EK-FAC with the package's defaults: factors from sampled labels, the loss as measurement."""
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):  # type: ignore[misc, unused-ignore]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, y = batch
            outputs = model(x)
            if sample:
                y = outputs.detach().softmax(dim=1).multinomial(1).flatten()
            return functional.cross_entropy(outputs, y, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            x, y = batch
            return functional.cross_entropy(model(x), y, reduction="sum")

    train = TensorDataset(task.problem.train.x, task.problem.train.y)
    test = TensorDataset(task.problem.test.x, task.problem.test.y)
    folder = task.workdir / "kronfluence"
    start = time.perf_counter()
    analyzer, fitted = _fitted(
        "fidelity", copy.deepcopy(task.models[0]), Classification(), train, folder, _ROWS
    )
    # A tenth of the mean eigenvalue, as in the paper; the package's own 1e-8 reads lower here.
    arguments = ScoreArguments(damping_factor=None)
    found = _pairs(analyzer, train, test, queries=len(test), rows=_ROWS)
    scored = time.perf_counter()
    own = None
    if task.suspicions:
        analyzer.compute_self_scores(
            "self",
            "ekfac",
            train,
            per_device_train_batch_size=_ROWS,
            score_args=arguments,
            overwrite_output_dir=True,
        )
        own = analyzer.load_self_scores("self")["all_modules"].float().numpy()
    factors = folder / "fidelity" / "factors_ekfac"
    stored = sum(file.stat().st_size for file in factors.rglob("*") if file.is_file())
    return Scored(found, own, fitted - start, scored - fitted, stored)


def pairs(
    name: str,
    model: nn.Module,
    task: Any,
    train: Dataset[Any],
    test: Dataset[Any],
    folder: Path,
    rows: int,
) -> NDArray[np.floating[Any]]:
    """Scores (test, train) of a model that a task describes, so many rows at a time, kept in a folder."""
    analyzer, _ = _fitted(name, model, task, train, folder, rows)
    return _pairs(analyzer, train, test, queries=rows, rows=rows)


def _fitted(
    name: str, model: nn.Module, task: Any, train: Dataset[Any], folder: Path, rows: int
) -> tuple[Any, float]:
    """An analyzer with its factors, and when they were there."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments

    analyzer = Analyzer(
        name,
        prepare_model(model, task),
        task,
        cpu=True,
        output_dir=str(folder),
        disable_tqdm=True,
        disable_model_save=True,
    )
    analyzer.fit_all_factors(
        "ekfac",
        train,
        per_device_batch_size=rows,
        factor_args=FactorArguments(strategy="ekfac"),
        overwrite_output_dir=True,
    )
    return analyzer, time.perf_counter()


def _pairs(
    analyzer: Any, train: Dataset[Any], test: Dataset[Any], *, queries: int, rows: int
) -> NDArray[np.floating[Any]]:
    """Scores (test, train), with a damping of a tenth of the mean eigenvalue."""
    from kronfluence.arguments import ScoreArguments

    analyzer.compute_pairwise_scores(
        "pairs",
        "ekfac",
        test,
        train,
        per_device_query_batch_size=queries,
        per_device_train_batch_size=rows,
        score_args=ScoreArguments(damping_factor=None),
        overwrite_output_dir=True,
    )
    return np.asarray(analyzer.load_pairwise_scores("pairs")["all_modules"].float().numpy())
