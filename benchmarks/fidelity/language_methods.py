"""Methods on a fine-tuned language model: each gives scores (targets, chunks), positive = helpful."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

import turnover
from turnover import Batch, objectives

from . import language
from .peers import kronfluence_

_ROWS = 50
_TRAK_SEEDS = 3
_TRAK_NUMBERS = 2048
_COLUMNS_AT_ONCE = 8192

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Attribution:
    """What a method is given.

    Attributes:
        problem: chunks and targets, and trainings with other seeds or under masks.
        trained: the attributed network.
        folder: for files of the method.
    """

    problem: language.Problem
    trained: language.FineTuned
    folder: Path


def gram(given: Attribution, **options: Any) -> Floats:
    """Gram, with its defaults but for the options that are named."""
    method = turnover.Gram(**options)
    influence = turnover.Influence(given.trained.model, objectives.completion, method)
    influence.fit(_batches(given.problem.train))
    return influence.estimate(_batches(given.problem.test)).scores


def turn_over(given: Attribution) -> Floats:
    """Turn-over dropout at the units of the multilayer perceptrons, one network trained under masks."""
    network = given.problem.training(masks=turnover.MaskSpec(keep=0.5)).network
    assert network is not None
    influence = turnover.Influence(network, objectives.completion)
    ids = torch.arange(len(given.problem.train))
    return influence.estimate(_batches(given.problem.test), ids).scores


def _batches(tokens: Tensor) -> list[Batch]:
    ids = torch.arange(len(tokens))
    parts = zip(torch.split(tokens, _ROWS), torch.split(ids, _ROWS), strict=True)
    return [Batch({"input_ids": part}, part, ids=rows) for part, rows in parts]


def ekfac(given: Attribution, *, head: bool = True) -> Floats:
    """EK-FAC (Grosse et al. 2023) by kronfluence on the linear layers that were trained."""
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    model = linear(given.trained.model)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.weight.requires_grad
        and (head or name != "lm_head")
    ]

    class Completion(Task):  # type: ignore[misc, unused-ignore]
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            tokens, logits = batch[0], model(batch[0]).logits
            if sample:
                drawn = logits.detach()[:, :-1].softmax(dim=2).flatten(0, 1).multinomial(1)
                tokens = torch.cat([tokens[:, :1], drawn.view(len(tokens), -1)], dim=1)
            cost: Tensor = language.losses(logits, tokens).sum() * (tokens.shape[1] - 1)
            return cost

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

    train, test = TensorDataset(given.problem.train), TensorDataset(given.problem.test)
    torch.manual_seed(0)  # of the sampled labels
    folder = given.folder / "kronfluence"
    return kronfluence_.pairs("language", model, Completion(), train, test, folder, _ROWS)


def linear(model: nn.Module) -> nn.Module:
    """A copy that computes the same with ``nn.Linear`` alone, its head apart from its embeddings."""
    from transformers.pytorch_utils import Conv1D

    made = copy.deepcopy(model)
    for module in list(made.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Conv1D):
                layer = nn.Linear(child.nx, child.nf)
                layer.weight.data, layer.bias.data = (
                    child.weight.data.T.contiguous(),
                    child.bias.data,
                )
                layer.requires_grad_(child.weight.requires_grad)
                setattr(module, name, layer)
            elif name == "lm_head":
                child.weight = copy.deepcopy(child.weight)
    return made


def trak(given: Attribution) -> Floats:
    """TRAK (Park et al. 2023), an implementation of our own: the margins' gradients, projected.

    With more numbers than chunks the inverse is the pseudoinverse.
    """
    products, wrong = [], []
    for seed in range(_TRAK_SEEDS):
        model = given.trained.model if seed == 0 else given.problem.fine_tuned(seed=seed)
        rows = torch.cat([given.problem.train, given.problem.test])
        features = _projected(gradients(model, rows, _margins), _TRAK_NUMBERS, seed).double()
        train, test = torch.split(features, [len(given.problem.train), len(given.problem.test)])
        products.append(test @ torch.linalg.pinv(train))
        with torch.no_grad():
            wrong.append(1 - _likelihoods(model(given.problem.train).logits, given.problem.train))
    each = torch.stack(wrong).mean(dim=(0, 2))
    return np.asarray((torch.stack(products).mean(dim=0) * each).numpy())


def _likelihoods(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of the tokens after the first: (rows, tokens - 1)."""
    return logits[:, :-1].softmax(dim=2).gather(2, tokens[:, 1:, None]).squeeze(2)


def _margins(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the tokens' log-odds: (rows,)."""
    each = _likelihoods(logits, tokens).clamp(max=1 - 1e-6).logit()
    return each.sum(dim=1)


def _projected(rows: Tensor, numbers: int, seed: int) -> Tensor:
    """Rows (rows, parameters) by a Gaussian matrix: (rows, numbers)."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.zeros(len(rows), numbers)
    for part in torch.split(rows, _COLUMNS_AT_ONCE, dim=1):
        made += part @ torch.randn(part.shape[1], numbers, generator=generator)
    made /= numbers**0.5
    return made


def gradients(
    model: nn.Module, tokens: Tensor, cost: Callable[[Tensor, Tensor], Tensor] = language.losses
) -> Tensor:
    """Gradients of every row's cost by the trained parameters: float32 (rows, parameters)."""
    trained = [one for one in model.parameters() if one.requires_grad]
    made = torch.empty(len(tokens), sum(one.numel() for one in trained))
    for row, one in enumerate(torch.split(tokens, 1)):
        parts = torch.autograd.grad(cost(model(one).logits, one).sum(), trained)
        torch.cat([part.flatten() for part in parts], out=made[row])
    return made


def gradient_product(given: Attribution, *, cosine: bool = False) -> Floats:
    """Inner products of the gradients of the loss, or their cosines."""
    train, test = (
        gradients(given.trained.model, rows) for rows in (given.problem.train, given.problem.test)
    )
    if cosine:
        train, test = functional.normalize(train), functional.normalize(test)
    return np.asarray((test @ train.T).numpy())


def bm25(given: Attribution) -> Floats:
    """Okapi BM25 of the chunks' words."""
    from rank_bm25 import BM25Okapi

    words = _words(given)
    index = BM25Okapi(words[: language.CHUNKS])
    return np.stack([index.get_scores(one) for one in words[language.CHUNKS :]])


def shared_words(given: Attribution) -> Floats:
    """How many different words two chunks share."""
    words = [set(one) for one in _words(given)]
    chunks = words[: language.CHUNKS]
    return np.array([[len(one & other) for other in chunks] for one in words[language.CHUNKS :]])


def _words(given: Attribution) -> list[list[str]]:
    return [re.findall(r"\w+", text.lower()) for text in given.problem.texts]


def anything(given: Attribution) -> Floats:
    """Gaussian noise."""
    shape = (len(given.problem.test), len(given.problem.train))
    return np.random.default_rng(1).standard_normal(shape)
