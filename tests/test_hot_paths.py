"""What runs in every step and for every block never waits for a GPU: shown on ``meta`` tensors.

These have no values, and are on a device of their own. A guard sees every operation. What waits by design is
outside of it: tables that the first step makes, checks that a block's numbers are finite, and results.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tiny
import turnover
from turnover import Batch, MaskSpec, objectives
from turnover.influence import gradients, linear, products
from turnover.influence.forwards import Forwards
from turnover.influence.gradients import mask_gradients
from turnover.influence.gram import capture as gram
from turnover.influence.linear import LinearScorer

aten = torch.ops.aten
IDS = torch.tensor([3, 2**24 + 1, 2**62, 7, 8])
ROWS = len(IDS)
WAITING = {
    *(aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select),
    *(aten._unique2, aten.unique_consecutive, aten.unique_dim),
}
"""Operations that wait for values, or for the size of their result."""


class Waits(Exception):
    pass


class Guard(TorchDispatchMode):
    """Refuses operations that wait for the device, or that mix devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        away = [value for value in given if value.device.type != "cpu"]
        packet = func.overloadpacket
        if packet in (aten._to_copy, aten.copy_):
            self.check_copy(packet, args, kwargs)
        elif away:
            masked = packet is aten.index and any(v.dtype == torch.bool for v in given[1:])
            if packet in WAITING or masked:
                raise Waits(f"{func} waits for the device")
            if any(value.device.type == "cpu" and value.dim() for value in given):
                raise Waits(f"{func} mixes devices")
        return func(*args, **kwargs)

    @staticmethod
    def check_copy(packet, args, kwargs):
        if packet is aten.copy_:
            to, source = args[0].device, args[1].device
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        else:
            source = args[0].device
            to = torch.device(kwargs.get("device") or source)
            non_blocking = kwargs.get("non_blocking", False)
        if to.type == "cpu" and source.type != "cpu":
            raise Waits(f"{packet} to the CPU")
        if to.type != "cpu" and source.type == "cpu" and not non_blocking:
            raise Waits(f"{packet} to the device waits for it")


def perceptron(keep: float = 0.5) -> tuple[turnover.Network, Batch]:
    network = turnover.attach(tiny.randomise(tiny.mlp(9)), "mlp", MaskSpec(keep))
    return network, Batch(tiny.features(ROWS), tiny.labels(ROWS))


def images(keep: float = 0.5) -> tuple[turnover.Network, Batch]:
    network = turnover.attach(tiny.ConvNet(), ["channels", "mlp"], MaskSpec(keep))
    return network, Batch(tiny.features(ROWS, 1, 8, 8), tiny.labels(ROWS))


def texts(keep: float = 0.5) -> tuple[turnover.Network, Batch]:
    pytest.importorskip("peft")
    network = turnover.attach(tiny.bert(), ["lora", "head"], MaskSpec(keep))
    # With attention masks transformers itself asks whether they hold any padding.
    return network, Batch({"input_ids": tiny.texts(ROWS)["input_ids"]}, tiny.labels(ROWS))


every_model = pytest.mark.parametrize("problem", [perceptron, images, texts])


@contextmanager
def on_meta(network: turnover.Network, batch: Batch) -> Iterator[tuple[Guard, Batch]]:
    """The network and the batch without values, on a device of their own."""
    with torch.no_grad(), network.mean():
        batch.call(network.model.eval())  # learns the widths of the sites
    network.model.to("meta").train()
    away = batch.mapped(lambda value: torch.empty_like(value, device="meta"))
    for side in (network.exposed(IDS), network.hidden(IDS), network.bind(IDS, IDS > 7)):
        with torch.no_grad(), side:
            away.call(network.model)  # makes tables
    yield Guard(), away


@every_model
@pytest.mark.parametrize("keep", [0.5, 0.3])
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_a_training_step_does_not_wait(problem, keep, where):
    network, batch = problem(keep)
    ids, sides = IDS.to(where), (IDS > 7).to(where)
    with on_meta(network, batch) as (guard, batch), guard:
        optimizer = torch.optim.SGD(network.model.parameters(), 0.1, momentum=0.9, foreach=False)
        for side in (network.exposed(ids), network.hidden(ids), network.bind(ids, sides)):
            with side:
                logits = tiny.logits(batch.call(network.model))
                loss = functional.cross_entropy(logits, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    trained = [p for p in network.model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.is_meta for p in trained)


def test_the_guard_fails_a_step_that_waits():
    network, batch = perceptron()
    with on_meta(network, batch) as (guard, batch), guard, network.exposed(IDS):
        loss = functional.cross_entropy(batch.call(network.model), batch.labels)
        for wait in (
            loss.item,
            loss.cpu,
            lambda: bool(loss > 0),
            lambda: loss[None].nonzero(),
            lambda: loss[None][loss[None] > 0],
            lambda: IDS.to("meta"),
            lambda: loss + torch.ones(1),
        ):
            with pytest.raises(Waits):
                wait()


@every_model
@pytest.mark.parametrize("keep", [0.5, 0.3])
@pytest.mark.parametrize("integers", [False, True])
def test_mask_derivatives_and_linear_scores_do_not_wait(problem, keep, integers, monkeypatch):
    monkeypatch.setattr(gradients, "finite", lambda values, _: values)
    monkeypatch.setattr(linear, "usable", lambda _: integers)
    network, batch = problem(keep)
    ids, units = IDS.to("meta"), network.known_units
    products._table_on(ids.device)
    with on_meta(network, batch) as (guard, batch), guard:
        network.model.eval()
        known = {(site, 0) for site in network.sites}
        found = mask_gradients(network, objectives.margin, batch, independent=known)
        scorer = LinearScorer(found, network.spec, units())
        assert scorer.scores(ids).is_meta and scorer.by_id(ids).is_meta and scorer.own(ids).is_meta
        assert found.shape == (ROWS, network.mask_units)


STRATEGIES = {
    perceptron: "hidden rows derived",
    images: "at the site",
    texts: "bert.encoder",
}


@pytest.mark.parametrize("problem", [perceptron, images, texts, "head"])
def test_exact_forwards_do_not_wait_once_a_strategy_is_chosen(problem, monkeypatch):
    if problem == "head":
        network = turnover.attach(tiny.randomise(tiny.FunctionalHead()), "head")
        batch, wanted = Batch(tiny.features(ROWS), tiny.labels(ROWS)), "one product"
    else:
        (network, batch), wanted = problem(), STRATEGIES[problem]
    network.model.eval()
    here, there = (Forwards(network, objectives.margin, block=2) for _ in range(2))
    here.scores([batch], IDS)
    assert str(here.strategy).startswith(wanted), here.strategy
    with on_meta(network, batch) as (guard, batch):
        network.model.eval()
        there._strategies = here._strategies
        monkeypatch.setattr(there, "_plain", None)  # it runs where a strategy fails
        ids = IDS.to("meta")
        there.scores([batch], ids)  # makes tables
        with guard:
            assert there.scores([batch], ids).shape == (ROWS, ROWS)


@every_model
def test_gram_captures_a_batch_without_waiting(problem, monkeypatch):
    """Along the objective: directions in the outputs take eigenvectors, for which torch waits."""
    network, batch = problem()
    make = {"residuals": True, "within": network.mean}
    here = gram.Capture(network.model, objectives.cross_entropy, **make)
    here.rows(batch)
    for name in ("finite", "all_finite"):
        monkeypatch.setattr(gram, name, lambda values, _: values)
    with on_meta(network, batch) as (guard, batch):
        there = gram.Capture(network.model, objectives.cross_entropy, **make)
        there._independent, there._verified = True, here._verified
        with guard:
            rows = there.rows(batch)
    assert rows.costs.is_meta and set(rows.parts) == set(here._parts)


def test_a_label_that_is_no_class_makes_its_row_nan_where_an_error_would_wait(monkeypatch):
    logits, batch = tiny.features(4, 3), Batch(torch.zeros(4, 1), torch.tensor([0, 3, -1, 2]))
    with pytest.raises(turnover.InputError, match="labels must lie in"):
        objectives.margin(logits, batch)
    asked = objectives._where_asking_waits
    monkeypatch.setattr(objectives, "_where_asking_waits", lambda _: True)
    for objective in (objectives.margin, objectives.cross_entropy):
        found = objective(logits, batch)
        assert found.isnan().tolist() == [False, True, True, False]
        good = Batch(torch.zeros(2, 1), batch.labels[[0, 3]])
        assert torch.equal(found[[0, 3]], objective(logits[[0, 3]], good))
        with pytest.raises(turnover.InputError, match=r"rows \[1, 2\].*no classes"):
            gradients.finite(found, "the objective")
    assert asked(torch.empty(1, device="meta")) and not asked(torch.empty(1))
