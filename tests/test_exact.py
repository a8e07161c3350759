"""Every way of sharing work between ids gives what the definition gives."""

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import tiny
import turnover
from turnover import Batch, Influence, MaskSpec, objectives
from turnover.dropout.sites import Site
from turnover.influence.forwards import Forwards

ROWS = 3
IDS = torch.tensor([0, 4, 2**24 + 1, 2**62, 11, 12, 13])
Pair = namedtuple("Pair", ["hidden", "logits"])


class Dense(nn.Module):
    """first -> act -> (between) -> last, with what happens around them to be overridden."""

    def __init__(self, units=9, bias=True):
        super().__init__()
        self.first, self.act = nn.Linear(6, units), nn.Tanh()
        self.between, self.last = nn.Dropout(0.5), nn.Linear(units, tiny.CLASSES, bias=bias)

    def forward(self, x):
        return self.last(self.between(self.act(self.first(x))))


class Deep(Dense):
    def __init__(self):
        super().__init__()
        self.middle, self.relu = nn.Linear(9, 9), nn.ReLU()

    def forward(self, x):
        return self.last(self.relu(self.middle(self.between(self.act(self.first(x))))))


class Residual(Deep):
    def forward(self, x):
        hidden = self.act(self.first(x))
        return self.last(hidden + self.relu(self.middle(hidden)))


class TwoHeads(Dense):
    """The site feeds two linear layers."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(9, tiny.CLASSES)

    def forward(self, x):
        hidden = self.act(self.first(x))
        return self.last(hidden) * self.other(hidden).sigmoid()


class Twice(Deep):
    """One site module that runs twice."""

    def forward(self, x):
        return self.last(self.act(self.middle(self.act(self.first(x)))))


class TwiceAside(Deep):
    """The first use is added to the logits, the second feeds the layer that makes them."""

    def forward(self, x):
        aside = self.act(self.first(x))
        logits = self.last(self.act(self.middle(self.first(x))))
        logits += aside[:, : tiny.CLASSES]
        return logits


class SharedLast(Dense):
    """The layer behind the site runs again on what it made."""

    def __init__(self):
        super().__init__(units=tiny.CLASSES)

    def forward(self, x):
        return self.last(torch.tanh(self.last(self.act(self.first(x)))))


class InPlaceResidual(Deep):
    def forward(self, x):
        hidden = self.act(self.first(x))
        hidden += self.first(x).square()
        return self.last(self.relu(self.middle(hidden)))


class Tokens(nn.Module):
    def __init__(self, pool="after"):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, tiny.CLASSES)
        self.pool = pool

    def forward(self, x):
        hidden = self.act(self.first(x))
        if self.pool == "before":
            return self.last(hidden.mean(1))
        if self.pool == "after":
            return self.last(hidden).mean(1)
        return self.last(hidden).logsumexp(1)


class Images(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.act = nn.Conv2d(1, 5, 3, padding=1), nn.ReLU()
        self.second = nn.Conv2d(5, 4, 3, **options)
        self.last = nn.Linear(4, tiny.CLASSES)

    def forward(self, x):
        return self.last(torch.tanh(self.second(self.act(self.first(x)))).mean((2, 3)))


class Series(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act = nn.Conv1d(2, 5, 3), nn.Tanh()
        self.second, self.last = nn.Conv1d(5, 4, 3, bias=False), nn.Linear(4, tiny.CLASSES)

    def forward(self, x):
        return self.last(torch.tanh(self.second(self.act(self.first(x)))).mean(2))


PLAIN = (6,)
PICTURE = (1, 7, 7)
DERIVED, PRODUCT, SITE = "hidden rows derived", "one product", "at the site"
MODELS = {
    "linear": (Dense, "act", PLAIN, PRODUCT),
    "no bias": (lambda: Dense(bias=False), "act", PLAIN, PRODUCT),
    "one unit": (lambda: Dense(units=1), "act", PLAIN, PRODUCT),
    "two sites": (Deep, ["act", "relu"], PLAIN, DERIVED),
    "middle": (Deep, "act", PLAIN, DERIVED),
    "residual": (Residual, "act", PLAIN, SITE),
    "two heads": (TwoHeads, "act", PLAIN, SITE),
    "twice": (Twice, "act", PLAIN, SITE),
    "twice aside": (TwiceAside, "act", PLAIN, SITE),
    "shared last": (SharedLast, "act", PLAIN, None),
    "in place": (InPlaceResidual, "act", PLAIN, None),
    "tokens": (Tokens, "act", (4, 6), DERIVED),
    "tokens before": (lambda: Tokens("before"), "act", (4, 6), SITE),
    "tokens bent": (lambda: Tokens("bent"), "act", (3, 6), DERIVED),
    "whole tokens": (Tokens, Site("act", axis=1), (4, 6), DERIVED),
    "blocks": (Dense, Site("act", unit_size=3), PLAIN, None),
    "conv": (Images, "act", PICTURE, DERIVED),
    "conv stride": (lambda: Images(stride=2, bias=False), "act", PICTURE, DERIVED),
    "conv circular": (
        lambda: Images(padding=1, padding_mode="circular"),
        "act",
        PICTURE,
        DERIVED,
    ),
    "conv reflect": (lambda: Images(padding=1, padding_mode="reflect"), "act", PICTURE, DERIVED),
    "conv dilated": (lambda: Images(dilation=2), "act", PICTURE, DERIVED),
    "conv 1d": (Series, "act", (2, 9), DERIVED),
}


def build(make, sites, keep=0.5, seed=0):
    model = tiny.randomise(make()).eval()
    return turnover.attach(model, sites, MaskSpec(keep, seed=seed))


def check(network, objective, batch, ids=IDS, tolerance=1e-5, block=None):
    """Compare the exact scores with the definition; returns the strategy."""
    batch.call(network.model)
    expected = tiny.definition(network, objective, batch, ids)
    assert np.abs(expected).max() > 1e-4
    estimator = Forwards(network, objective, block)
    with torch.no_grad():
        found = estimator.scores([batch], ids).numpy()
        again = estimator.scores([batch.rows(1, 2)], ids).numpy()
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(again, expected[1:2], rtol=tolerance, atol=tolerance)
    return estimator.strategy


def batch_of(shape, rows=ROWS):
    return Batch(tiny.features(rows, *shape), tiny.labels(rows))


@pytest.mark.parametrize("block", [None, 1, 3])
@pytest.mark.parametrize("keep", [0.5, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_every_way_gives_the_definition(name, keep, block):
    make, sites, shape, way = MODELS[name]
    found = check(build(make, sites, keep), objectives.cross_entropy, batch_of(shape), block=block)
    assert way is None or found.startswith(way)


@pytest.mark.parametrize("name", ["linear", "middle", "residual", "conv"])
def test_a_single_id_is_no_special_case(name):
    make, sites, shape, _ = MODELS[name]
    check(build(make, sites), objectives.margin, batch_of(shape), IDS[3:4], block=1)


def weighted_by_inputs(outputs, batch):
    return objectives.cross_entropy(outputs, batch) * batch.inputs.flatten(1).sum(1).abs()


def brier(outputs, batch):
    wanted = functional.one_hot(batch.labels, tiny.CLASSES)
    return (objectives.logits_of(outputs).softmax(1) - wanted).square().sum(1)


@pytest.mark.parametrize("objective", [weighted_by_inputs, brier])
@pytest.mark.parametrize("name", ["linear", "middle", "residual", "conv"])
def test_objectives_of_the_users_own(name, objective):
    make, sites, shape, _ = MODELS[name]
    check(build(make, sites), objective, batch_of(shape))


@dataclass
class Record:
    logits: torch.Tensor


def model_output(logits, hidden):
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(logits=logits)


def with_hidden(logits, hidden):
    from transformers.modeling_outputs import SequenceClassifierOutput

    return SequenceClassifierOutput(logits=logits, hidden_states=(hidden,))


KINDS = {
    "ModelOutput": (model_output, PRODUCT),
    "ModelOutput with more": (with_hidden, None),
    "dict": (lambda logits, hidden: {"logits": logits}, PRODUCT),
    "namedtuple": (lambda logits, hidden: Pair(hidden, logits), None),
    "dataclass": (lambda logits, hidden: Record(logits), None),
    "namespace": (lambda logits, hidden: SimpleNamespace(logits=logits, other=hidden), None),
    "tuple": (lambda logits, hidden: (logits, hidden), None),
    "list": (lambda logits, hidden: [logits], None),
}


class Wrapped(Dense):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        hidden = self.act(self.first(x))
        return self.kind(self.last(hidden), hidden)


def reads_attribute(outputs, batch):
    return -outputs.logits.log_softmax(1)[torch.arange(len(batch)), batch.labels]


def reads_key(outputs, batch):
    return -outputs["logits"].log_softmax(1)[torch.arange(len(batch)), batch.labels]


def reads_position(outputs, batch):
    return -outputs[0].log_softmax(1)[torch.arange(len(batch)), batch.labels]


@pytest.mark.parametrize("name", KINDS)
def test_outputs_of_every_kind(name):
    kind, way = KINDS[name]
    found = check(build(lambda: Wrapped(kind), "act"), objectives.margin, batch_of(PLAIN))
    assert way is None or found.startswith(way)
    own = [reads_attribute] if name not in {"dict", "tuple", "list"} else [reads_position]
    if name.startswith(("ModelOutput", "dict")):
        own = [reads_key]
    for objective in [*own, brier]:
        check(build(lambda: Wrapped(kind), "act"), objective, batch_of(PLAIN))


def test_objectives_that_read_more_than_logits():
    def penalised(outputs, batch):
        """The first target's hidden activations do not matter; those of the others do."""
        more = getattr(outputs, "hidden_states", None)
        extra = 0 if more is None else more[0].square().sum(1) * (batch.inputs[:, 0] > 0)
        return objectives.cross_entropy(outputs, batch) + extra

    batch = batch_of(PLAIN)
    batch.inputs[:, 0] = torch.tensor([-1.0, 1.0, 1.0])
    check(build(lambda: Wrapped(with_hidden), "act"), penalised, batch)


class ClampsInPlace(Dense):
    """Logits changed in place, where the first target does not show it."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.clamp_(-1.5, 1.5) if self.small(x) else logits.mul_(1)

    def small(self, x):
        return True


def test_logits_that_are_bent_in_place_only_for_some_targets():
    batch = batch_of(PLAIN)
    batch.inputs[0] *= 0.01
    batch.inputs[1:] *= 5
    network = build(ClampsInPlace, "act")
    with torch.no_grad():
        network.model.last.weight.mul_(2)
        network.model.last.bias.mul_(0.1)
        network.model.first.bias.zero_()
    check(network, brier, batch)


class ResidualForSome(Deep):
    """A residual written in place, which is zero for the first target."""

    def forward(self, x):
        hidden = self.act(self.first(x))
        hidden += self.first(x) * x[:, :1].clamp(min=0)
        return self.last(self.relu(self.middle(hidden)))


class TwiceForSome(Deep):
    """The site's first use reaches the logits of some targets alone."""

    def forward(self, x):
        aside = self.act(self.first(x)) * x[:, :1].clamp(min=0)
        return self.last(self.act(self.middle(self.first(x) + aside)))


class SharedForSome(Dense):
    def __init__(self):
        super().__init__(units=tiny.CLASSES)

    def forward(self, x):
        once = self.last(self.act(self.first(x)))
        return once if bool((x[:, 0] <= 0).all()) else self.last(once.tanh())


class BranchesForSome(Dense):
    """Logits are bent for some targets, by a branch on data."""

    def forward(self, x):
        logits = self.last(self.act(self.first(x)))
        return logits if bool((x[:, 0] <= 0).all()) else logits.tanh() * 3


class BypassesForSome(Deep):
    """The layer that hidden rows are derived behind is left out for some targets."""

    def forward(self, x):
        hidden = self.act(self.first(x))
        if bool((x[:, 0] <= 0).all()):
            hidden = self.relu(self.middle(hidden))
        return self.last(hidden.sin())


@pytest.mark.parametrize("objective", [objectives.cross_entropy, brier])
@pytest.mark.parametrize(
    "make", [ResidualForSome, TwiceForSome, SharedForSome, BranchesForSome, BypassesForSome]
)
def test_models_whose_first_target_says_nothing_of_the_others(make, objective):
    network = build(make, "act")
    batch = batch_of(PLAIN)
    batch.inputs[:, 0] = torch.tensor([-1.0, 1.0, 2.0])
    batch.call(network.model)
    parts = [batch.rows(i, i + 1) for i in range(ROWS)]
    expected = np.concatenate([tiny.definition(network, objective, part, IDS) for part in parts])
    found = Influence(network, objective, "exact", ghosts=10).estimate(parts, IDS).scores
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


class BatchCoupled(Dense):
    """Right for one row, whatever the number of its copies; wrong where rows are expanded inside."""

    def forward(self, x):
        rows = len(x)
        hidden = self.act(self.first(x))
        return self.last(hidden * (len(hidden) / rows))


def test_a_first_target_that_is_saturated_does_not_let_a_wrong_way_pass():
    class Saturated(BatchCoupled):
        def forward(self, x):
            return super().forward(x) + x[:, :3]

    network = build(Saturated, "act")
    batch = batch_of(PLAIN)
    batch.inputs[0, :3] = torch.tensor([60.0, -60.0, -60.0])
    batch.labels[0] = 0
    check(network, objectives.cross_entropy, batch)


@pytest.mark.parametrize("name", ["linear", "middle", "tokens", "conv", "residual"])
def test_half_precision(name):
    make, sites, shape, _ = MODELS[name]
    network = build(make, sites)
    batch = batch_of(shape)
    batch.call(network.model)
    expected = tiny.definition(network, objectives.margin, batch, IDS)
    network.model.bfloat16()
    half = Batch(batch.inputs.bfloat16(), batch.labels)
    with torch.no_grad():
        found = Forwards(network, objectives.margin).scores([half], IDS).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=0.06 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["linear", "middle", "two sites"])
def test_double_precision_and_autocast(name):
    make, sites, shape, _ = MODELS[name]
    network = build(make, sites)
    batch = batch_of(shape)
    batch.call(network.model)
    expected = tiny.definition(network, objectives.margin, batch, IDS)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = Forwards(network, objectives.margin).scores([batch], IDS).numpy()
    np.testing.assert_allclose(found, expected, atol=0.06 * np.abs(expected).max())
    network.model.double()
    check(network, objectives.margin, Batch(batch.inputs.double(), batch.labels))


def overridden(layer, change=lambda x: x):
    """Give a layer a ``forward`` of its own, as accelerate does."""
    inner, calls = layer.forward, []

    def forward(*args):
        calls.append(len(args[0]))
        return change(inner(*args))

    layer.forward = forward
    return forward, calls


@pytest.mark.parametrize("change", [lambda x: x, lambda x: 2 * x, torch.sin])
@pytest.mark.parametrize("name", ["linear", "middle"])
def test_a_forward_that_another_library_put_there_is_used_and_put_back(name, change):
    make, sites, shape, _ = MODELS[name]
    network = build(make, sites)
    layer = network.model.last if name == "linear" else network.model.middle
    own, calls = overridden(layer, change)
    check(network, objectives.margin, batch_of(shape))
    assert vars(layer)["forward"] is own
    assert calls


def hooks_of(model):
    return {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), vars(m).get("forward"))
        for name, m in model.named_modules()
    }


class OutOfOrderError(Exception):
    pass


class Failing(nn.Module):
    """Runs a number of times, then raises."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, x):
        self.times -= 1
        if self.times < 0:
            raise OutOfOrderError
        return x


@pytest.mark.parametrize("times", range(14))
@pytest.mark.parametrize("name", ["linear", "middle", "residual"])
def test_a_model_that_raises_is_left_as_it_was(name, times):
    make, sites, shape, _ = MODELS[name]
    network = build(make, sites)
    batch = batch_of(shape)
    model = network.model
    influence = Influence(network, objectives.margin, "exact", ghosts=10)
    expected = influence.estimate([batch], IDS).scores
    before = hooks_of(model)
    model.last = nn.Sequential(Failing(times), model.last)
    fresh = Influence(network, objectives.margin, "exact", ghosts=10)
    try:
        found = fresh.estimate([batch], IDS).scores
    except OutOfOrderError:
        pass
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    model.last = model.last[1]
    assert hooks_of(model) == before
    assert network.masking.active is None
    again = Influence(network, objectives.margin, "exact", ghosts=10).estimate([batch], IDS)
    np.testing.assert_array_equal(again.scores, expected)


def test_sites_that_are_left_out_need_no_width():
    batch = batch_of(PLAIN)
    own = Batch(batch.inputs, batch.labels, IDS[:ROWS])
    for method in ("linear", "exact"):
        network = build(Deep, ["act", "relu"])
        assert None in network.units.values()
        chosen = Influence(network, method=method, ghosts=10, sites=["relu"])
        result = chosen.estimate([batch], IDS)
        whole = build(Deep, "relu")
        alone = Influence(whole, method=method, ghosts=10).estimate([batch], IDS)
        np.testing.assert_allclose(result.scores, alone.scores, rtol=1e-5, atol=1e-6)
        network = build(Deep, ["act", "relu"])
        chosen = Influence(network, method=method, ghosts=10, sites=["relu"])
        diagonal = np.diag(result.scores[:, :ROWS])
        scores = chosen.self_influence([own]).scores
        np.testing.assert_allclose(scores, diagonal, rtol=1e-5, atol=1e-6)


def test_other_inputs_that_are_no_tensors_are_another_way():
    class Switched(Dense):
        def forward(self, x, bent):
            logits = super().forward(x)
            return logits.tanh() if bent else logits

    network = build(Switched, "act")
    batch = batch_of(PLAIN, 1)
    network.model(batch.inputs, False)
    parts = [Batch({"x": batch.inputs, "bent": bent}, batch.labels) for bent in (False, True)]
    expected = np.concatenate([tiny.definition(network, objectives.margin, p, IDS) for p in parts])
    found = Influence(network, objectives.margin, "exact", ghosts=10).estimate(parts, IDS)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_models():
    network = build(Deep, ["act", "relu"])
    batch = batch_of(PLAIN)
    batch.call(network.model)
    expected = tiny.definition(network, objectives.margin, batch, IDS)
    model = tiny.randomise(Deep()).eval()
    compiled = turnover.attach(torch.compile(model, backend="eager"), ["act", "relu"])
    compiled.model(batch.inputs)
    found = Influence(compiled, objectives.margin, "exact", ghosts=10).estimate([batch], IDS)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
