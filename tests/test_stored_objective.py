"""What a stored result belongs to: not the name of an objective, but what it computes."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import tiny
import turnover
from turnover import Batch, Influence, InputError, MaskSpec, objectives
from turnover.results.location import ROOT
from turnover.results.manifest import STARTED, manifest_of, seal

IDS = torch.arange(40) * 7919
METHODS = ("linear", "exact", "rerank")
CLASSES = 3


def network(activation=nn.GELU):
    model = tiny.mlp(12)
    model[1], model[3] = activation(), activation()
    return turnover.attach(tiny.randomise(model).eval(), "mlp", MaskSpec(seed=0))


def batches(rows=24, size=8):
    """Targets whose labels are sorted, so that the last class comes late."""
    labels = torch.arange(rows) * CLASSES // rows
    batch = Batch(tiny.features(rows), labels, torch.arange(rows) + 50)
    return [batch.rows(start, start + size) for start in range(0, rows, size)]


def score(objective, out=None, method="linear", net=None, given=None, **options):
    method = tiny.method(method, candidates=5)
    estimator = Influence(net or network(), objective, method, ghosts=30)
    extra = {} if out is None else {"out": out, **options}
    result = estimator.estimate(given or batches(), IDS, **extra)
    return result if out is None else result.load()


class Interrupted(Exception):
    pass


def begin(objective, out, method="linear", net=None, given=None):
    """Begin a result: its first targets are announced and scored."""

    def cut_off():
        yield from (given or batches())
        raise Interrupted

    # The last, unfinished block of targets is not scored, so the first must be whole.
    estimator = Influence(net or network(), objective, tiny.method(method, candidates=5), ghosts=30)
    with pytest.raises(Interrupted):
        estimator.estimate(cut_off(), IDS, out=out)


def scaled(outputs, batch, factor):
    return factor * objectives.margin(outputs, batch)


def closure(factor):
    def cost(outputs, batch):
        return factor * objectives.margin(outputs, batch)

    return cost


class Cost:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, outputs, batch):
        return self.factor * objectives.margin(outputs, batch)

    of = __call__


def by_class(weights):
    def cost(outputs, batch):
        return torch.tensor(weights)[batch.labels] * objectives.margin(outputs, batch)

    return cost


def of_label(used):
    def cost(outputs, batch):
        labels = batch.labels if used else torch.zeros_like(batch.labels)
        return objectives.margin(outputs, Batch(batch.inputs, labels))

    return cost


def of_target(number, factor):
    """Another objective on one target alone."""

    def cost(outputs, batch):
        own = objectives.margin(outputs, batch)
        return torch.where(batch.inputs[:, 0] == tiny.features(24)[number, 0], factor, 1.0) * own

    return cost


def hinge(factor):
    """Zero at the whole network on many targets, whatever the factor."""

    def cost(outputs, batch):
        return factor * objectives.margin(outputs, batch).clamp(min=6.0)

    return cost


PAIRS = {
    "partials": (partial(scaled, factor=1.0), partial(scaled, factor=100.0)),
    "closures": (closure(1), closure(-1)),
    "lambdas": (lambda o, b: objectives.margin(o, b), lambda o, b: objectives.cross_entropy(o, b)),
    "instances": (Cost(1.0), Cost(1.001)),
    "methods": (Cost(1.0).of, Cost(2.0).of),
    "a class that comes late": (by_class([1.0, 1.0, 1.0]), by_class([1.0, 1.0, 2.0])),
    "labels": (of_label(True), of_label(False)),
    "one target": (of_target(21, 1.0), of_target(21, 3.0)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pair", PAIRS)
def test_another_objective_of_one_name_does_not_get_the_first_ones_scores(pair, method, tmp_path):
    one, other = PAIRS[pair]
    stored = score(one, tmp_path / "r", method)
    with pytest.raises(InputError, match=r"another objective, .* give another path, or delete it"):
        score(other, tmp_path / "r", method)
    np.testing.assert_array_equal(score(one, tmp_path / "r", method).scores, stored.scores)


@pytest.mark.parametrize("method", METHODS)
def test_nor_does_it_go_on_with_what_the_first_one_began(method, tmp_path):
    many = batches(1200 if method == "linear" else 48, 8)
    begin(closure(1), tmp_path / "r", method, given=many)
    with pytest.raises(InputError, match="another objective, which has the name 'cost' as well"):
        score(closure(2), tmp_path / "r", method, given=many)
    found = score(closure(1), tmp_path / "r", method, given=many)
    tiny.assert_same(found, score(closure(1), method=method, given=many))


def test_an_objective_that_differs_under_masks_alone_is_another(tmp_path):
    net, given = network(), batches()
    with torch.no_grad():
        margins = torch.cat([objectives.margin(net.model(b.inputs), b) for b in given])
    assert margins.max() < 6, (
        "else the objectives differ at the whole network, and this says nothing"
    )
    plain = score(hinge(1.0), tmp_path / "r", "exact")
    assert np.abs(plain.scores).max() > 0
    with pytest.raises(InputError, match="another objective"):
        score(hinge(5.0), tmp_path / "r", "exact")


def test_an_objective_of_another_derivative_is_another(tmp_path):
    def make(share):
        def cost(outputs, batch):
            own = objectives.margin(outputs, batch)
            return share * own + (1 - share) * own.detach()

        return cost

    score(make(1.0), tmp_path / "r")
    with pytest.raises(InputError, match="another objective"):
        score(make(0.5), tmp_path / "r")


@pytest.mark.parametrize("method", METHODS)
def test_a_network_of_the_same_weights_that_computes_something_else_is_refused(method, tmp_path):
    score(objectives.margin, tmp_path / "r", method)
    other = network(nn.ReLU)
    assert other.digest() == network().digest()
    with pytest.raises(InputError, match="another network of the same weights"):
        score(objectives.margin, tmp_path / "r", method, net=other)


def test_one_network_of_several_that_computes_something_else_is_refused(tmp_path):
    def nets(activation):
        one = network()
        model = tiny.mlp(12)
        model[1] = activation()
        return [one, turnover.attach(tiny.randomise(model, 1).eval(), ["1", "3"], MaskSpec(seed=1))]

    score(objectives.margin, tmp_path / "r", net=nets(nn.GELU))
    score(objectives.margin, tmp_path / "r", net=nets(nn.GELU))
    with pytest.raises(InputError, match="another network"):
        score(objectives.margin, tmp_path / "r", net=nets(nn.SiLU))


@pytest.mark.parametrize("method", METHODS)
def test_the_same_objective_made_anew_goes_on_also_on_another_machine(method, tmp_path):
    stored = score(closure(1.0), tmp_path / "r", method)
    again = score(closure(1.0), tmp_path / "r", method, given=batches(size=3))
    tiny.assert_same(again, stored)
    # Another machine adds up in another order.
    tiny.assert_same(score(closure(1 + 3e-5), tmp_path / "r", method), stored)


def test_an_adapter_that_gives_other_labels_or_inputs_is_refused(tmp_path):
    def make(labels, inputs=1.0):
        return Influence(
            network(), adapter=lambda raw: Batch(raw[0] * inputs, raw[1] + labels), ghosts=30
        )

    given = [(tiny.features(6), torch.zeros(6, dtype=torch.int64))]
    make(0).estimate(given, IDS, out=tmp_path / "r")
    make(0).estimate(given, IDS, out=tmp_path / "r")
    for other in (make(1), make(0, 2.0)):
        with pytest.raises(InputError, match="other targets: target 0"):
            other.estimate(given, IDS, out=tmp_path / "r")


def test_settings_of_torch_that_change_scores_are_compared(tmp_path):
    score(objectives.margin, tmp_path / "r")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InputError, match=r'precision\.autocast is null there, "torch\.bfloat16"'),
    ):
        score(objectives.margin, tmp_path / "r")
    torch.set_default_dtype(torch.float64)
    try:
        net, given = network(), batches()
        with pytest.raises(InputError, match=r"network|targets|precision"):
            score(objectives.margin, tmp_path / "r", net=net, given=given)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(InputError, match=r'precision\.float32_matmul is "highest" there'):
            score(objectives.margin, tmp_path / "r")
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", torch.bfloat16):
        score(objectives.margin, tmp_path / "half")
        score(objectives.margin, tmp_path / "half")


def test_weights_of_another_type_are_another_network(tmp_path):
    score(objectives.margin, tmp_path / "r")
    net = network()
    net.model.double()
    given = [Batch(batch.inputs.double(), batch.labels) for batch in batches()]
    with pytest.raises(InputError, match="network is"):
        score(objectives.margin, tmp_path / "r", net=net, given=given)


def test_an_objective_that_takes_no_batch_of_one_row_is_still_stored(tmp_path):
    class Squeezing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny.randomise(tiny.mlp(12))

        def forward(self, x):
            return self.body(x).squeeze()

    net = turnover.attach(Squeezing().eval(), "mlp")
    given = batches(80, 40)
    plain = score(objectives.margin, net=net, given=given)
    for _ in range(2):
        tiny.assert_same(score(objectives.margin, tmp_path / "r", net=net, given=given), plain)
    score(by_class([1.0, 1.0, 1.1]), tmp_path / "s", net=net, given=given)
    with pytest.raises(InputError, match="another objective"):
        score(by_class([1.0, 1.0, 1.2]), tmp_path / "s", net=net, given=given)


def older(folder):
    """Make a result what versions before wrote, which noted the objective's name alone."""
    for key in (STARTED, ROOT):
        if (folder / key).exists():
            document = json.loads((folder / key).read_text())
            begun_with = manifest_of(document)
            del begun_with["sizes"]["signature"], begun_with["identity"]["precision"]
            (folder / key).write_bytes(seal(document, begun_with))
    shutil.rmtree(folder / "progress" / "signature")


@pytest.mark.parametrize("method", METHODS)
def test_a_result_of_an_older_version_is_read_and_gone_on_with_and_it_is_said(method, tmp_path):
    many = batches(1200 if method == "linear" else 48, 8)
    score(closure(1), tmp_path / "finished", method, given=many)
    begin(closure(1), tmp_path / "begun", method, given=many)
    whole = score(closure(1), method=method, given=many)
    for name in ("finished", "begun"):
        older(tmp_path / name)
        for _ in range(2):
            with pytest.warns(UserWarning, match=r"older version, .*'cost'.* is not checked"):
                found = score(closure(1), tmp_path / name, method, given=many)
            tiny.assert_same(found, whole)
        with pytest.raises(InputError, match='objective is "cost" there, "margin" here'):
            score(objectives.margin, tmp_path / name, method, given=many)
    tiny.assert_same(turnover.open_result(tmp_path / "finished").load(), whole)


def test_numbers_of_the_objective_that_are_gone_are_missed(tmp_path):
    score(closure(1), tmp_path / "r")
    (chunk,) = (tmp_path / "r" / "progress" / "signature" / "c").glob("*/*")
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="progress/signature/c/0/0 is damaged"):
        score(closure(2), tmp_path / "r")
    chunk.unlink()
    with pytest.raises(InputError, match="progress/signature is missing or damaged"):
        score(closure(2), tmp_path / "r")


def test_targets_far_apart_are_looked_at_where_every_label_is_another(tmp_path):
    """As in regression: the last target is one of those that are compared."""

    def make(factor):
        def cost(outputs, batch):
            error = (outputs[:, 0] - batch.labels) ** 2
            return torch.where(batch.labels == 299, factor, 1.0) * error

        return cost

    batch = Batch(tiny.features(300), torch.arange(300).float())
    score(make(1.0), tmp_path / "r", given=[batch])
    with pytest.raises(InputError, match=r"another objective, .* for target 299 "):
        score(make(2.0), tmp_path / "r", given=[batch])


def test_a_result_cut_off_before_its_targets_were_announced_is_begun_anew(tmp_path):
    given = batches()
    score(closure(1), tmp_path / "r", given=given)
    (tmp_path / "r" / ROOT).unlink()
    shutil.rmtree(tmp_path / "r" / "progress" / "digest" / "c")
    shutil.rmtree(tmp_path / "r" / "progress" / "signature" / "c")
    tiny.assert_same(score(closure(1), tmp_path / "r"), score(closure(1)))
    with pytest.raises(InputError, match="another objective"):
        score(closure(3), tmp_path / "r")
