"""An estimator in one module: what anyone writes to add a method. Registered as ``"toy"`` when imported."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turnover import Batch
from turnover.influence.engine import Engine, Scores, TargetBlock
from turnover.influence.protocol import Estimator, Method, register
from turnover.objectives import logits_of


@dataclass(frozen=True)
class Toy(Method):
    """Inner products of the logits of targets with those of training instances.

    Attributes:
        scale: of the scores.
    """

    needs_fit = True

    scale: float = 1.0


class ToyEstimator(Estimator):
    """Looks at the training set; ghosts have random logits."""

    def __init__(self, options: Toy, engines: Sequence[Engine], ghosts: int) -> None:
        super().__init__(options, engines, ghosts)
        self.features: dict[int, list[Tensor]] = {}

    def fit(self, batches: Iterable[Batch]) -> None:
        """Keep the logits of every training instance under each network."""
        for batch in batches:
            assert batch.ids is not None
            found = [logits(engine, [batch]) for engine in self.engines]
            for row, one in enumerate(batch.ids.tolist()):
                self.features[one] = [values[row] for values in found]

    def scores(self, block: TargetBlock, ids: Tensor) -> Scores:
        """Inner products by each network, averaged."""

        def product(engine: Engine, batches: Sequence[Batch]) -> Tensor:
            number = self.engines.index(engine)
            train = [self._train(one, number) for one in ids.tolist()]
            return self.options.scale * logits(engine, batches) @ torch.stack(train).T

        return block.scores(product)

    def identity(self) -> dict[str, Any]:
        """The options, and the training set."""
        hashed = hashlib.blake2b(digest_size=8)
        for one, values in sorted(self.features.items()):
            hashed.update(str(one).encode() + b"".join(v.numpy().tobytes() for v in values))
        return super().identity() | {"fitted": hashed.hexdigest()}

    def _train(self, one: int, number: int) -> Tensor:
        found = self.features.get(one)
        return random_logits(one) if found is None else found[number]


register("toy", Toy, ToyEstimator)


def logits(engine: Engine, batches: Sequence[Batch]) -> Tensor:
    with torch.no_grad():
        found = [logits_of(engine.moved(one).call(engine.network.model)) for one in batches]
    return torch.cat(found)


def random_logits(ghost: int) -> Tensor:
    return torch.randn(3, generator=torch.Generator().manual_seed(abs(ghost)))
