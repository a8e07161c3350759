"""Metagradients (MAGIC, Ilyas and Engstrom 2025): how a chunk's weight in its training moves every target.

An implementation of our own: AdamW's steps are repeated backward, each with its second derivatives.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import optimizer as optimizers

from . import language
from .language_methods import Attribution, Floats, gradients


@dataclass
class _Step:
    """Of one step, all parameters in one: their values before it, and AdamW's moments after it."""

    before: Tensor
    first: Tensor
    second: Tensor


def metagradients(given: Attribution) -> Floats:
    """Derivatives of the targets' likelihood by the weights of the chunks in the training."""
    problem = given.problem
    steps, trained = _recorded(problem)
    group = trained.optimizer.param_groups[0]
    rate, decay, epsilon = group["lr"], group["weight_decay"], group["eps"]
    beta, beta_of_squares = group["betas"]
    model: Any = copy.deepcopy(trained.model).train()
    model.set_attn_implementation("eager")  # the others have no second derivatives
    found = torch.zeros(len(problem.test), len(problem.train))
    # By the parameters and AdamW's moments after a step: (targets, parameters).
    by_weights = -gradients(model, problem.test)
    by_first, by_second = torch.zeros_like(by_weights), torch.zeros_like(by_weights)
    batches = list(language.batches(len(problem.train), seed=0))
    for number in range(len(steps), 0, -1):
        step, rows = steps[number - 1], batches[number - 1]
        unbias, unbias_squares = 1 - beta**number, 1 - beta_of_squares**number
        root = (step.second / unbias_squares).sqrt()
        divisor = root + epsilon
        slope = step.first / (2 * unbias_squares * root * divisor**2)
        slope[root == 0] = 0
        by_first -= by_weights * (rate / (unbias * divisor))
        by_second += by_weights * (rate / unbias * slope)
        gradient, weights, parameters = _gradient(model, step.before, problem.train[rows])
        flat = torch.cat([one.detach().flatten() for one in gradient])
        by_gradient = (1 - beta) * by_first + 2 * (1 - beta_of_squares) * flat * by_second
        for target, direction in enumerate(by_gradient):
            *curved, by_rows = torch.autograd.grad(
                gradient,
                [*parameters, weights],
                _like(direction, gradient),
                retain_graph=True,
                materialize_grads=True,
            )
            by_weights[target] *= 1 - rate * decay
            by_weights[target] += torch.cat([one.flatten() for one in curved])
            found[target, rows] += by_rows
        by_first *= beta
        by_second *= beta_of_squares
    return np.asarray(found.numpy())


def _recorded(problem: language.Problem) -> tuple[list[_Step], language.FineTuned]:
    """The steps of the attributed training, which is repeated."""
    steps: list[_Step] = []

    def flat(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([one.detach().flatten() for one in parts])

    def before(optimizer: Any, *_: Any) -> None:
        weights = optimizer.param_groups[0]["params"]
        steps.append(_Step(flat(weights), torch.empty(0), torch.empty(0)))

    def after(optimizer: Any, *_: Any) -> None:
        states = [optimizer.state[one] for one in optimizer.param_groups[0]["params"]]
        steps[-1].first = flat([one["exp_avg"] for one in states])
        steps[-1].second = flat([one["exp_avg_sq"] for one in states])

    hooks = (
        optimizers.register_optimizer_step_pre_hook(before),
        optimizers.register_optimizer_step_post_hook(after),
    )
    try:
        return steps, problem.training()
    finally:
        for hook in hooks:
            hook.remove()


def _gradient(
    model: nn.Module, values: Tensor, tokens: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, list[nn.Parameter]]:
    """The gradient of a batch's weighted loss at some values of the parameters, with its graph."""
    parameters = [one for one in model.parameters() if one.requires_grad]
    for one, value in zip(parameters, _like(values, parameters), strict=True):
        one.data.copy_(value)
    weights = torch.ones(len(tokens), requires_grad=True)
    loss = (weights * language.losses(model(tokens).logits, tokens)).sum() / weights.sum()
    return torch.autograd.grad(loss, parameters, create_graph=True), weights, parameters


def _like(flat: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    pieces = torch.split(flat, [one.numel() for one in parts])
    return [piece.view_as(one) for piece, one in zip(pieces, parts, strict=True)]
