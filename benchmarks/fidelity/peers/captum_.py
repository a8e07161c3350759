"""TracInCP: gradient products over checkpoints (Pruthi et al. 2020)."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import TensorDataset

from ..methods import Attribution, Scored


def tracin(task: Attribution) -> Scored:
    """TracInCP on four checkpoints; the weights of each are what is stored."""
    from captum.influence import TracInCP

    train, test = task.problem.train, task.problem.test

    def restore(model: nn.Module, index: str) -> float:
        model.load_state_dict(task.checkpoints[int(index)])
        return task.problem.recipe.learning_rate

    start = time.perf_counter()
    method: Any = TracInCP(
        copy.deepcopy(task.models[0]),
        TensorDataset(train.x, train.y),
        [str(index) for index in range(len(task.checkpoints))],
        restore,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=250,
        sample_wise_grads_per_batch=True,
    )
    scores = method.influence((test.x, test.y)).detach().numpy()
    seconds = time.perf_counter() - start
    own = method.self_influence().detach().numpy() if task.suspicions else None
    stored = sum(v.numel() * 4 for state in task.checkpoints for v in state.values())
    return Scored(scores.astype(np.float32), own, 0.0, seconds, stored)
