"""TRAK (Park et al. 2023) and influence functions by conjugate gradients (Koh and Liang 2017)."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from ..methods import Attribution, Scored
from ..problems import Split

_ROWS = 100
_REGULARISATION = (
    1e-2  # the best of three in a comparison on digits; a tenth of it halves the score
)
_ITERATIONS = 20


def trak(count: int) -> Callable[[Attribution], Scored]:
    """TRAK on so many networks, projected to a fifth of the training instances, at most 512."""

    def run(task: Attribution) -> Scored:
        from dattri.algorithm.trak import TRAKAttributor
        from dattri.task import AttributionTask

        model = copy.deepcopy(task.models[0])
        width = min(len(task.problem.train) // 5, 512)

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
        method = attributor()
        method.cache(_loader(task.problem.train))
        fitted = time.perf_counter()
        with torch.no_grad():
            scores = method.attribute(_loader(task.problem.test)).T
        scored = time.perf_counter()
        own = attributor().self_attribute(_loader(task.problem.train)) if count == 1 else None
        stored = 4 * count * len(task.problem.train) * width
        return Scored(
            scores.float().numpy(),
            None if own is None else own.detach().float().numpy(),
            fitted - start,
            scored - fitted,
            stored,
            min(count, len(task.models)),
        )

    return run


def conjugate_gradients(task: Attribution) -> Scored:
    """Inverse Hessian products by 20 steps of conjugate gradients, for every target."""
    from dattri.algorithm.influence_function import IFAttributorCG
    from dattri.task import AttributionTask

    model = copy.deepcopy(task.models[0])

    def loss(parameters: Any, batch: Any) -> Tensor:
        x, y = batch
        return functional.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    start = time.perf_counter()
    given = AttributionTask(loss_func=loss, model=model, checkpoints=dict(model.state_dict()))
    method = IFAttributorCG(given, max_iter=_ITERATIONS, regularization=_REGULARISATION)
    method.cache(_loader(task.problem.train))
    fitted = time.perf_counter()
    with torch.no_grad():
        scores = method.attribute(_loader(task.problem.train), _loader(task.problem.test)).T
    scored = time.perf_counter()
    return Scored(scores.float().numpy(), None, fitted - start, scored - fitted, 0)


def _one(model: nn.Module, parameters: Any, row: Any) -> Tensor:
    outputs: Tensor = torch.func.functional_call(model, parameters, (row[0][None],))
    return outputs


def _loader(split: Split) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(split.x, split.y), batch_size=_ROWS, shuffle=False)
