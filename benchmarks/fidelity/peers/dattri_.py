"""TRAK (Park et al. 2023) and influence functions by conjugate gradients (Koh and Liang 2017)."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from ..methods import Attribution, Scored
from ..problems import Split

_NUMBERS = 100_000_000  # of the gradients that are held at once
_TARGETS = 25  # at once by conjugate gradients, each with activations of the whole training set
# The steadiest of 0.01, 0.03 and 0.1 on the networks of problem A: 20 steps at 0.01 do better on some
# of them, and far worse on others.
_REGULARISATION = 3e-2
_ITERATIONS = 20


def trak(count: int, numbers: int | None = None) -> Callable[[Attribution], Scored]:
    """TRAK on so many networks.

    Args:
        count: of networks.
        numbers: that gradients are projected to; ``None``: a fifth of the training instances, at most 512.
    """

    def run(task: Attribution) -> Scored:
        from dattri.algorithm.trak import TRAKAttributor
        from dattri.task import AttributionTask

        model = copy.deepcopy(task.models[0])
        width = numbers or min(len(task.problem.train) // 5, 512)
        rows = _rows(model)
        train = _loader(task.problem.train, rows)

        def margin(parameters: Any, row: Any) -> Tensor:
            outputs = _one(model, parameters, row)
            log_probability = -functional.cross_entropy(outputs, row[1][None])
            return log_probability - torch.log1p(-log_probability.exp().clamp(max=1 - 1e-6))

        def probability(parameters: Any, row: Any) -> Tensor:
            return torch.exp(-functional.cross_entropy(_one(model, parameters, row), row[1][None]))

        def attributor() -> Any:
            states = [dict(one.state_dict()) for one in task.models[:count]]
            given = AttributionTask(loss_func=margin, model=model, checkpoints=states)
            projector = {
                "proj_dim": width,
                "proj_max_batch_size": 32,
                "proj_seed": 0,
                "device": "cpu",
            }
            return TRAKAttributor(given, probability, projector_kwargs=projector)

        start = time.perf_counter()
        # Its progress bars cannot be turned off.
        with redirect_stderr(io.StringIO()), torch.no_grad():
            method = attributor()
            method.cache(train)
            fitted = time.perf_counter()
            scores = method.attribute(_loader(task.problem.test, rows)).T
            scored = time.perf_counter()
            # A second pass over the training set, which ten networks would not repay.
            asked = count == 1 and task.suspicions
            own = attributor().self_attribute(train).flatten() if asked else None
        networks = min(count, len(task.models))
        # Between the two it keeps a solved projection and a residual for each instance.
        stored = 4 * len(task.problem.train) * (networks * width + 1)
        return Scored(
            scores.float().numpy(),
            None if own is None else own.float().numpy(),
            fitted - start,
            scored - fitted,
            stored,
            networks,
        )

    return run


def conjugate_gradients(task: Attribution) -> Scored:
    """Inverse Hessian products by 20 steps of conjugate gradients, for every target.

    The Hessian is that of the whole training set in one batch: of several batches the package sums the
    inverses, which is another quantity and ranks worse.
    """
    from dattri.algorithm.influence_function import IFAttributorCG
    from dattri.task import AttributionTask

    model = copy.deepcopy(task.models[0])
    train, test = task.problem.train, task.problem.test

    def loss(parameters: Any, batch: Any) -> Tensor:
        x, y = batch
        return functional.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    start = time.perf_counter()
    given = AttributionTask(loss_func=loss, model=model, checkpoints=dict(model.state_dict()))
    method = IFAttributorCG(given, max_iter=_ITERATIONS, regularization=_REGULARISATION)
    method.cache(_loader(train, len(train)))
    fitted = time.perf_counter()
    # The steps of its attribute(), which would solve anew for every batch of training instances.
    with torch.no_grad():
        solved = torch.cat(
            [
                method.transform_test_rep(0, method.generate_test_rep(0, _batch(part)))
                for part in _loader(test, _TARGETS)
            ]
        )
        parts = [
            method.generate_train_rep(0, _batch(part)) @ solved.T
            for part in _loader(train, _rows(model))
        ]
    scored = time.perf_counter()
    scores = torch.cat(parts).T.float().contiguous().numpy()
    return Scored(scores, None, fitted - start, scored - fitted, 0)


def _one(model: nn.Module, parameters: Any, row: Any) -> Tensor:
    outputs: Tensor = torch.func.functional_call(model, parameters, (row[0][None],))
    return outputs


def _rows(model: nn.Module) -> int:
    """Rows of a batch: the more, the fewer times a projection is drawn."""
    return max(1, _NUMBERS // sum(parameter.numel() for parameter in model.parameters()))


def _batch(part: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(one[None] for one in part)


def _loader(split: Split, rows: int) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(split.x, split.y), batch_size=rows, shuffle=False)
