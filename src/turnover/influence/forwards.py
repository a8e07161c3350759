"""Forwards of one network under both masks of many ids, which share what the ids have in common.

Strategies are tried from the one that shares most. Each is compared with the definition, the target
repeated at the model's inputs, before it is trusted. Models may branch on data, so the first two also prove
for every target that the model computes what they assume; where they cannot, or anything fails, the
definition runs.

1. The one masked layer feeds the linear layer that makes the logits: all ids are one matrix product.
2. The first masked layer feeds a linear or convolution layer: that layer runs for the exposed rows, and
   the hidden rows are the rest of the whole.
3. One row becomes many at the first masked layer, or where an enclosing module begins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from turnover.batches import Batch, shapes
from turnover.dropout.modules import device_of
from turnover.dropout.network import Network
from turnover.ids import ghost_ids
from turnover.influence.gradients import check_reached
from turnover.influence.halving import IDS, ROWS, Halving
from turnover.influence.linear import LinearScorer
from turnover.influence.sharing import (
    AT_INPUTS,
    AT_SITE,
    Strategy,
    Trace,
    deriving,
    expanding,
    following,
    holds_nothing_else,
    logits_in,
    recording,
    with_logits,
)
from turnover.objectives import Objective, costs, cross_entropy, logits_of, margin

_log = logging.getLogger(__name__)

_PROBES = ghost_ids(3, start=2**40)
"""Ghosts that strategies are compared on; far from the noise floor's."""
_CACHED = {"cpu": 2**23}
"""Bytes of the largest output of a module in one forward that the caches hold."""
_LARGEST = {"cpu": 2**26}
"""Bytes of it that a forward of 64 ids may take."""
_ELSEWHERE = 2**28
"""Both, on a GPU: what keeps it busy."""
_SOME_IDS = 64
_COEFFICIENTS, _LOGITS = 2**28, 2**25
"""Bytes of coefficients in one product, and of logits that the objective takes at a time."""
_PRODUCT_IDS = 256
_OF_LABELS = (cross_entropy, margin)
"""Objectives of logits and labels alone: they take all targets at once."""


@cache
def _keep_freed_memory() -> None:
    """Let the C library keep memory that a forward frees for the next one.

    glibc returns large freed blocks to the system, and fresh pages take longer than the outputs that they
    hold. The size of a freed block teaches it to keep up to twice as much; this one is never touched.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


class Forwards:
    """Exact influence of ids on targets, sharing what they have in common.

    Args:
        network: the network; its model should be in eval mode.
        objective: callable (outputs, batch) -> (rows,).
        block: ids in one forward; ``None``: as many as the caches hold.
        sites: masked sites; at others the network runs whole. ``None``: all.
        halving: bounds the ids in a forward, and the rows of a batch; ``None``: nothing does yet.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        block: int | None = None,
        sites: Sequence[str] | None = None,
        halving: Halving | None = None,
    ) -> None:
        self._network = network
        self._objective = objective
        self._block = block
        self._halving = halving or Halving()
        self._sites = network.sites if sites is None else list(sites)
        self._strategies: dict[tuple[tuple[int, ...], ...], Strategy] = {}
        self._last: Strategy | None = None
        self._advance: Callable[[int], None] = lambda _: None

    def forget(self) -> None:
        """Drop the strategies: earlier targets must not change the bits of later ones."""
        self._strategies.clear()
        self._last = None

    @property
    def nbytes(self) -> int:
        """Bytes of the outputs of modules in a forward of both sides, by the strategies so far."""
        elements = max((strategy.elements for strategy in self._strategies.values()), default=1)
        return 8 * elements * 2 * self._ids_at_once(elements)

    @property
    def strategy(self) -> str | None:
        """Strategy of the last targets, in words; ``None`` before the first."""
        return None if self._last is None else str(self._last)

    def scores(
        self, batches: Sequence[Batch], ids: Tensor, advance: Callable[[int], None] | None = None
    ) -> Tensor:
        """Score ids on the targets of some batches: float32 (targets, ids).

        Args:
            advance: takes the number of further pairs scored; 0 after preparations.
        """
        self._advance = advance or (lambda _: None)
        _keep_freed_memory()
        return self._halving.whole(lambda: self._scores(batches, ids))

    def _scores(self, batches: Sequence[Batch], ids: Tensor) -> Tensor:
        batches = [part for batch in batches for part in self._parts(batch)]
        with torch.no_grad():
            strategies = [self._strategy(batch) for batch in batches]
            self._advance(0)  # finding strategies takes time once
            counts = [len(batch) for batch in batches]
            scores = torch.empty((sum(counts), len(ids)), device=device_of(self._network.model))
            blocks = torch.split(scores, counts)
            forwards = []
            for index, strategy in enumerate(strategies):
                try:
                    with self._halving.forward(ROWS, len(batches[index])):
                        made = self._product(batches[index], strategy, ids, blocks[index])
                except Exception:  # noqa: BLE001 - an error of the user's comes again below
                    made = _fell_back(strategy)
                if made:
                    self._advance(blocks[index].numel())
                else:
                    forwards.append(index)
            if forwards:
                self._forward(batches, strategies, forwards, ids, blocks)
        return scores

    def _parts(self, batch: Batch) -> list[Batch]:
        size = self._halving.size(ROWS, len(batch))
        starts = range(0, len(batch), size)
        return [batch.rows(start, min(start + size, len(batch))) for start in starts]

    def _product(self, batch: Batch, strategy: Strategy, ids: Tensor, scores: Tensor) -> bool:
        """Fill in scores (rows, ids) by one product; False where the model does not allow it."""
        found = self._coefficients(batch, strategy) if strategy.logits else None
        if found is None:
            return False
        whole, coefficients = found
        spec, units_by_site = self._network.spec, self._network.known_units(self._sites)
        rows, classes, units = coefficients.shape
        group = max(1, _COEFFICIENTS // (4 * classes * units))
        for first in range(0, rows, group):
            some = slice(first, min(first + group, rows))
            scorer = LinearScorer(coefficients[some].flatten(0, 1), spec, units_by_site)
            part = batch.rows(some.start, some.stop)
            logits_part = with_logits(whole, logits_of(whole)[some])
            count = some.stop - some.start
            size = self._block or max(_PRODUCT_IDS, _LOGITS // (2 * 4 * classes * count))
            start = 0
            for block in torch.split(ids, self._halving.size(IDS, size)):
                with self._halving.forward(IDS, len(block)):
                    change = scorer.by_id(block).view(len(block), count, classes)
                    values = self._of_logits(part, logits_part, change)
                scores[some, start : start + len(block)] = values
                start += len(block)
        return True

    def _coefficients(self, batch: Batch, strategy: Strategy) -> tuple[Any, Tensor] | None:
        """Outputs of the whole network, and what each unit adds to each logit: (rows, classes, units).

        ``None`` if the layer did not make the logits of the site's one output.
        """
        assert strategy.affine is not None and strategy.split is not None
        layer = self._network.model.get_submodule(strategy.affine)
        site = self._network.masking.sites[strategy.split].module
        with following(self._network.model, site) as trace, self._network.mean():
            predicted = batch.call(self._network.model)
        if not self._are_made_by(layer, predicted, trace):
            return None
        weight, given = layer.weight, trace.output
        assert isinstance(weight, Tensor) and given is not None
        return predicted, weight.float() * given.float()[:, None]

    def _are_made_by(self, layer: nn.Module, outputs: Any, trace: Trace) -> bool:
        """Whether the objective depends on the site through a linear layer's one output alone."""
        logits = logits_in(outputs)
        return (
            trace.uses == 1
            and type(layer) is nn.Linear
            and "forward" not in vars(layer)
            and any(made is logits and of is layer for of, made in trace.unchanged())
            and (self._objective in _OF_LABELS or holds_nothing_else(outputs))
        )

    def _of_logits(self, batch: Batch, outputs: Any, change: Tensor) -> Tensor:
        """Scores (rows, ids) from the hidden minus the exposed logits (ids, rows, classes)."""
        keep, (ids, rows, classes) = self._network.spec.keep, change.shape
        whole = logits_of(outputs).float()  # (rows, classes) = keep * exposed + (1 - keep) * hidden
        logits = whole.new_empty((2, ids, rows, classes))
        torch.add(whole, change, alpha=-(1 - keep), out=logits[0])
        torch.add(whole, change, alpha=keep, out=logits[1])
        if self._objective in _OF_LABELS and batch.labels is not None:
            labels = batch.labels.expand(2 * ids, rows).reshape(-1)
            flat = logits.view(-1, classes)
            values = costs(self._objective, flat, Batch(flat, labels)).view(2, ids, rows)
            return (values[1] - values[0]).T
        scores = []
        for row in range(rows):
            target = batch.rows(row, row + 1).expanded(2 * ids)
            own = with_logits(outputs, logits[:, :, row].reshape(-1, classes))
            values = costs(self._objective, own, target)
            scores.append(values[ids:] - values[:ids])
        return torch.stack(scores)

    def _forward(
        self,
        batches: Sequence[Batch],
        strategies: Sequence[Strategy],
        chosen: Sequence[int],
        ids: Tensor,
        scores: Sequence[Tensor],
    ) -> None:
        block = self._ids_at_once(max(strategies[index].elements for index in chosen))
        splits = {strategies[index].split for index in chosen}
        start = 0
        for part in torch.split(ids, block):
            # A single exposed row would be taken for one that all ids share.
            bound = part if len(part) > 1 else part.expand(2)
            with self._halving.forward(IDS, len(part)):
                # The masks of a block serve all targets.
                bindings = {
                    split: self._network.masking.bind_both(bound, self._sites, split=split)
                    for split in splits
                }
                for index in chosen:
                    strategy, batch = strategies[index], batches[index]
                    for row in range(len(batch)):
                        target = batch.rows(row, row + 1)
                        values = self._scored(target, strategy, bindings[strategy.split], bound)
                        scores[index][row, start : start + len(part)] = values[: len(part)]
                        self._advance(len(part))
            start += len(part)

    def _ids_at_once(self, elements: int) -> int:
        return self._halving.size(IDS, self._block or self._cached_ids(elements))

    def _cached_ids(self, elements: int) -> int:
        device = device_of(self._network.model).type
        per_id = 2 * 4 * elements
        cached = _CACHED.get(device, _ELSEWHERE) // per_id
        some = min(_SOME_IDS, _LARGEST.get(device, _ELSEWHERE) // per_id)
        ids = max(1, cached, some)
        return int(min(2 ** (ids.bit_length() - 1), 4096))

    def _scored(self, target: Batch, strategy: Strategy, binding: Any, ids: Tensor) -> Tensor:
        try:
            values = self._shared(target, strategy, binding, len(ids))[0]
        except torch.OutOfMemoryError:
            raise
        except Exception:  # noqa: BLE001 - the model may treat this target in another way
            _fell_back(strategy)
            values = self._plain(target, ids)[0]
        return values[1] - values[0]

    def _shared(
        self, target: Batch, strategy: Strategy, binding: Any, ids: int
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`_plain`, by a strategy that shares work."""
        network = self._network
        repeated = target.expanded(2 * ids)
        with (
            network.masking.open(binding),
            expanding(network.model, strategy.place, 2 * ids),
            deriving(network, strategy),
        ):
            outputs = (repeated if strategy.place == AT_INPUTS else target).call(network.model)
        values = costs(self._objective, outputs, repeated)
        logits = logits_in(outputs)
        return values.view(2, ids), None if logits is None else logits.reshape(
            2, ids, *logits.shape[1:]
        )

    def _plain(self, target: Batch, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """By definition, the objective (2, ids) of the exposed and the hidden side, and the logits.

        The target is repeated at the model's inputs, once for each side.
        """
        repeated = target.expanded(len(ids))
        sides, logits, masking = [], [], self._network.masking
        for hidden in (False, True):
            with masking.open(masking.bind(ids, hidden, sites=self._sites)):
                outputs = repeated.call(self._network.model)
            sides.append(costs(self._objective, outputs, repeated))
            logits.append(logits_in(outputs))
        found = [one for one in logits if one is not None]
        return torch.stack(sides), torch.stack(found) if len(found) == 2 else None

    def _strategy(self, batch: Batch) -> Strategy:
        target = batch.rows(0, 1)
        # A strategy that serves inputs of one shape may not serve those of another.
        shape = shapes(target.inputs)
        if shape not in self._strategies:
            self._strategies[shape] = self._choose(target)
        self._last = self._strategies[shape]
        return self._last

    def _choose(self, target: Batch) -> Strategy:
        with self._halving.forward(IDS, 1):
            plain = self._plain(target, _PROBES)
            found = list(self._candidates(target))
        for strategy in found:
            try:
                if self._agrees(target, strategy, *plain):
                    return strategy
            except Exception:  # noqa: BLE001 - whatever fails in a user's model rules the strategy out
                _fell_back(strategy)
        return Strategy(AT_INPUTS, elements=found[-1].elements)

    def _agrees(
        self, target: Batch, strategy: Strategy, plain: Tensor, plain_logits: Tensor | None
    ) -> bool:
        kinds = {parameter.dtype for parameter in self._network.model.parameters()}
        half = not kinds.isdisjoint((torch.float16, torch.bfloat16))
        coarse = half or torch.is_autocast_enabled(plain.device.type)
        # Errors of the two sides, not of their difference, which may be small.
        allowed = (1e-2 if coarse else 1e-5) * (1 + plain.abs().amax(dim=0))
        difference = plain[1] - plain[0]
        if strategy.logits:
            scores = torch.empty((1, len(_PROBES)), device=plain.device)
            made = self._product(target, strategy, _PROBES, scores)
            return made and bool(((scores[0] - difference).abs() <= allowed).all())
        binding = self._network.masking.bind_both(_PROBES, self._sites, split=strategy.split)
        values, logits = self._shared(target, strategy, binding, len(_PROBES))
        if not bool(((values[1] - values[0] - difference).abs() <= allowed).all()):
            return False
        if logits is None or plain_logits is None:
            return logits is plain_logits
        # An objective that is saturated on this target would let anything pass.
        most = (3e-2 if coarse else 1e-5) * (1 + plain_logits.abs().max())
        return bool(((logits - plain_logits).abs() <= most).all())

    def _candidates(self, target: Batch) -> Iterator[Strategy]:
        network = self._network
        with torch.enable_grad(), network.masking.probing(self._sites) as probes:
            target.call(network.model)
        check_reached(self._sites, probes)
        reached = list(probes)  # sites are recorded in the order in which they ran
        site = network.masking.sites[reached[0]].module
        names = {id(module): name for name, module in network.model.named_modules()}
        with (
            recording(network.model.modules()) as outputs,
            network.mean(),
            following(network.model, site) as trace,
        ):
            predicted = target.call(network.model)
        sizes = [o.numel() // len(o) for o in outputs.values() if o.dim() and len(o)]
        strategy = partial(Strategy, elements=max(sizes, default=1))
        if trace.fed:
            behind = trace.fed[0][0]
            split = {"split": reached[0], "affine": names[id(behind)]}
            alone = len(reached) == len(self._sites) == 1
            if alone and self._are_made_by(behind, predicted, trace):
                yield strategy(AT_SITE, logits=True, **split)
            yield strategy(AT_SITE, **split)
        if self._last is not None and self._last.affine is None:
            yield strategy(self._last.place)
        yield strategy(AT_SITE)
        path = names[id(site)].split(".")
        for length in range(len(path), 0, -1):
            yield strategy(".".join(path[:length]))


def _fell_back(strategy: Strategy) -> bool:
    """Log the exception that made a strategy give way to the next; always False."""
    _log.debug("strategy %r failed, running without it", str(strategy), exc_info=True)
    return False
