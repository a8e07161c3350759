"""Rows that any real method must beat."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from turnover import InputError

from .methods import Attribution, Floats, Scored

_ROWS = 250


def timed(find: Callable[[Attribution], Tensor | Floats]) -> Callable[[Attribution], Scored]:
    """A row of pairs that prepares and stores nothing."""

    def run(task: Attribution) -> Scored:
        start = time.perf_counter()
        scores = np.asarray(find(task), dtype=np.float32)
        return Scored(scores, None, 0.0, time.perf_counter() - start, 0)

    return run


def same_class(task: Attribution) -> Tensor:
    """1 where the labels are the same."""
    return (task.problem.test.y[:, None] == task.problem.train.y).float()


def anything(task: Attribution) -> Floats:
    """Gaussian noise."""
    shape = (len(task.problem.test), len(task.problem.train))
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def input_similarity(task: Attribution) -> Tensor:
    """Cosine of the inputs, negative where the labels differ."""
    test, train = task.problem.test.x.flatten(1), task.problem.train.x.flatten(1)
    return _signed(task, _cosine(test, train))


def representation_similarity(task: Attribution) -> Tensor:
    """Cosine of the last hidden layer, negative where the labels differ."""
    body = cast(nn.Sequential, task.models[0])[:-1]
    with torch.no_grad():
        test, train = (
            torch.cat([body(x) for x in torch.split(split.x, _ROWS)])
            for split in (task.problem.test, task.problem.train)
        )
    return _signed(task, _cosine(test, train))


def sentence_similarity(*, signed: bool) -> Callable[[Attribution], Tensor]:
    """Cosine of the sentence embeddings that the features are."""

    def find(task: Attribution) -> Tensor:
        # The features' mean is common to all sentences, and says nothing.
        mean = task.problem.train.x.mean(dim=0)
        similar = _cosine(task.problem.test.x - mean, task.problem.train.x - mean)
        return _signed(task, similar) if signed else similar

    return find


def bm25(*, signed: bool) -> Callable[[Attribution], Tensor]:
    """Okapi BM25 of the words."""

    def find(task: Attribution) -> Tensor:
        from rank_bm25 import BM25Okapi

        test, train = task.problem.test.texts, task.problem.train.texts
        if test is None or train is None:
            raise InputError("BM25 needs texts")
        index = BM25Okapi([text.lower().split() for text in train])
        found = np.stack([index.get_scores(text.lower().split()) for text in test])
        similar = torch.from_numpy(found.astype(np.float32))
        return _signed(task, similar) if signed else similar

    return find


def gradient_product(task: Attribution) -> Scored:
    """Inner product of the gradients of the loss, over all parameters."""
    model = task.models[0]
    parameters = dict(model.named_parameters())
    start = time.perf_counter()

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = torch.func.functional_call(model, values, (x[None],))
        return functional.cross_entropy(outputs, y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def rows(x: Tensor, y: Tensor) -> Tensor:
        found = gradients({k: v.detach() for k, v in parameters.items()}, x, y)
        return torch.cat([one.flatten(1) for one in found.values()], dim=1)

    test = rows(task.problem.test.x, task.problem.test.y)
    train, scores, own = task.problem.train, [], []
    for x, y in zip(torch.split(train.x, _ROWS), torch.split(train.y, _ROWS), strict=True):
        part = rows(x, y)
        scores.append(test @ part.T)
        own.append(part.square().sum(dim=1))
    found = torch.cat(scores, dim=1).numpy()
    return Scored(found, torch.cat(own).numpy(), 0.0, time.perf_counter() - start, 0)


def loss(checkpoint: int) -> Callable[[Attribution], Scored]:
    """Plain loss of every training instance, at a checkpoint; of mislabels alone."""

    def run(task: Attribution) -> Scored:
        start = time.perf_counter()
        state, train = task.checkpoints[checkpoint], task.problem.train
        with torch.no_grad():
            outputs = torch.func.functional_call(task.models[0], state, (train.x,))
            values = functional.cross_entropy(outputs, train.y, reduction="none").numpy()
        return Scored(None, values, 0.0, time.perf_counter() - start, 0)

    return run


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    return functional.normalize(one, dim=1) @ functional.normalize(other, dim=1).T


def _signed(task: Attribution, similar: Tensor) -> Tensor:
    return similar * (2 * same_class(task) - 1)
