"""The network that ``turnover fit`` trains, on a problem's inputs: a wide head from a small start."""

from __future__ import annotations

import math
import time

import torch
from torch import nn
from torch.nn import functional

import turnover

from .problems import Problem

UNITS = 32_768
STEPS = 400
_ROWS = 50
_BELOW_RATE = 1e-3
_HEAD_RATE = 1e-4


def train(problem: Problem, seed: int, keep: float) -> tuple[nn.Module, float]:
    """AdamW under masks at the rates of ``turnover fit``, the same number of steps on every problem.

    Below the head is what the problem's network has below its first masked layer: nothing, or
    convolutions.

    Args:
        problem: data and architecture.
        seed: of weights, order and masks.
        keep: of the masks.

    Returns:
        The model in eval mode, its head under the name ``"1"``, and the seconds of the training.
    """
    start = time.perf_counter()
    x, y, count = problem.train.x, problem.train.y, len(problem.train)
    layers = list(problem.wide(seed).children())[: int(problem.sites[0]) - 1]
    below = nn.Sequential(*layers, nn.Flatten())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        features = below(x)
        head = turnover.WideHead(features.shape[1], UNITS, problem.classes)
        head.standardize(features)
    model = nn.Sequential(below, head)
    network = turnover.attach(model, ["head"], turnover.MaskSpec(keep, seed=seed))
    groups = [
        {"params": list(below.parameters()), "lr": _BELOW_RATE},
        {"params": list(head.parameters()), "lr": _HEAD_RATE},
    ]
    optimiser = torch.optim.AdamW([one for one in groups if one["params"]], weight_decay=0.0)
    steps = math.ceil(count / _ROWS)
    epochs = math.ceil(STEPS / steps)
    rates = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, epochs * steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(count, generator=order), _ROWS):
            with network.exposed(rows):
                loss = functional.cross_entropy(model(x[rows]), y[rows])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            rates.step()
    network.detach()
    return model.eval(), time.perf_counter() - start
