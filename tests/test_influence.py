import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import tiny
import turnover
from turnover import Batch, BindingError, Influence, InputError, MaskSpec, objectives
from turnover.influence.forwards import Forwards

ROWS = 3
IDS = torch.tensor([0, 4, 2**24 + 1, 2**62, 11, 12, 13])


def brier(outputs, batch):
    """A cost of the user's own."""
    wanted = nn.functional.one_hot(batch.labels, tiny.CLASSES).float()
    return (tiny.logits(outputs).softmax(dim=1) - wanted).square().sum(dim=1)


OBJECTIVES = [objectives.cross_entropy, objectives.margin, brier]


class Tupled(nn.Module):
    """A block that returns a tuple, within a model that does."""

    def __init__(self):
        super().__init__()
        self.block, self.last = TupleBlock(), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        hidden, extra = self.block(x)
        return self.last(hidden), extra


class TupleBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x):
        return torch.tanh(self.linear(x)), x.sum()


class Remembering(nn.Module):
    """Looks at its batch size before its sites run, so that rows may only be repeated outside."""

    def __init__(self, silent=False):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)
        self.silent = silent

    def forward(self, x):
        rows = x.shape[0]
        hidden = self.act(self.first(x))
        if self.silent:
            return self.last(hidden)[:rows]
        return self.last(hidden.reshape(rows, -1))


MODELS = {
    "mlp": (tiny.mlp, "mlp", lambda: tiny.features(ROWS)),
    "conv": (tiny.ConvNet, ["channels", "mlp"], lambda: tiny.features(ROWS, 1, 8, 8)),
    "head": (tiny.FunctionalHead, "head", lambda: tiny.features(ROWS)),
    "bert": (tiny.bert, ["lora", "head"], lambda: tiny.texts(ROWS)),
    "gpt2": (tiny.gpt2, "mlp", lambda: tiny.texts(ROWS)),
    "tuple": (Tupled, "block", lambda: tiny.features(ROWS)),
    "fragile": (Remembering, "act", lambda: tiny.features(ROWS)),
    "silent": (lambda: Remembering(silent=True), "act", lambda: tiny.features(ROWS)),
}


def build(name, keep=0.5):
    torch.manual_seed(5)
    make, sites, inputs = MODELS[name]
    model = tiny.randomise(make()).eval()
    network = turnover.attach(model, sites, MaskSpec(keep))
    batch = Batch(inputs(), tiny.labels(ROWS))
    batch.call(model)
    return network, batch


@pytest.mark.parametrize("keep", [0.5, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_exact_is_the_plain_loop_of_two_forwards(name, keep):
    network, batch = build(name, keep)
    for objective in OBJECTIVES[:2]:
        expected = tiny.definition(network, objective, batch, IDS)
        result = Influence(network, objective, turnover.Exact(4), ghosts=10).estimate([batch], IDS)
        assert np.abs(expected).max() > 1e-4
        np.testing.assert_allclose(result.scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("mlp", "hidden rows derived behind"),
        ("conv", "at the site"),
        ("head", "one product with"),
        ("tuple", "one product with"),
        ("bert", "bert.encoder.layer.0"),
        ("fragile", "at the inputs"),
        ("silent", "at the inputs"),
    ],
)
def test_work_is_shared_as_far_as_the_model_allows(name, way):
    network, batch = build(name)
    estimator = Forwards(network, objectives.margin, 8)
    estimator.scores([batch.rows(0, 1)], IDS)
    assert estimator.strategy.startswith(way)


def test_the_frozen_encoder_runs_on_one_row():
    network, batch = build("head")
    rows = []
    network.model.encoder.register_forward_hook(lambda m, a, output: rows.append(len(output)))
    estimator = Forwards(network, objectives.margin, 64)
    estimator.scores([batch.rows(0, 1)], torch.arange(50))
    rows.clear()
    estimator.scores([batch.rows(1, 2)], torch.arange(50))
    assert set(rows) == {1}


def test_a_place_is_checked_anew_for_inputs_of_another_shape():
    class Mixed(Remembering):
        def forward(self, x):
            self.silent = x.shape[1] > 2
            hidden = self.act(self.first(x.mean(1)))
            return self.last(hidden)[: x.shape[0]] if self.silent else self.last(hidden)

    model = tiny.randomise(Mixed()).eval()
    network = turnover.attach(model, "act")
    batches = [Batch(tiny.features(1, tokens, 6), tiny.labels(1)) for tokens in (1, 5, 2)]
    influence = Influence(network, objectives.margin, "exact", ghosts=10)
    result = influence.estimate(batches, IDS)
    expected = [tiny.definition(network, objectives.margin, batch, IDS)[0] for batch in batches]
    np.testing.assert_allclose(result.scores, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=20)
@given(block=st.integers(1, 40))
def test_block_size_changes_nothing_but_rounding(block):
    network, batch = build("mlp")
    result = Influence(network, objectives.margin, turnover.Exact(block), ghosts=10).estimate(
        [batch], IDS
    )
    expected = tiny.definition(network, objectives.margin, batch, IDS)
    np.testing.assert_allclose(result.scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_one_block_grid_gives_the_same_bits(method):
    results = []
    for _ in range(2):
        network, batch = build("bert")
        influence = Influence(network, method=tiny.method(method, block=8), ghosts=10)
        results.append(influence.estimate([batch], IDS))
    assert (results[0].scores == results[1].scores).all()
    assert (results[0].p == results[1].p).all()


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_a_single_id_is_enough(method):
    network, batch = build("bert")
    one = tiny.method(method, block=1)
    result = Influence(network, method=one, ghosts=10).estimate([batch], IDS[2:3])
    every = Influence(network, method=method, ghosts=10).estimate([batch], IDS)
    np.testing.assert_allclose(result.scores[:, 0], every.scores[:, 2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("keep", [0.5, 0.3])
def test_linear_is_the_derivative_times_the_difference_of_masks(keep, objective):
    network, batch = build("mlp", keep)
    model, spec = network.model, network.spec
    expected = np.empty((ROWS, len(IDS)))
    for row in range(ROWS):
        target = batch.rows(row, row + 1)
        masks = [torch.ones(1, 16, requires_grad=True) for _ in range(2)]
        first = nn.functional.gelu(model[0](target.inputs)) * masks[0]
        second = nn.functional.gelu(model[2](first)) * masks[1]
        derivatives = torch.autograd.grad(objective(model[4](second), target).sum(), masks)
        total = torch.zeros(len(IDS))
        for derivative, site in zip(derivatives, ("1", "3"), strict=True):
            bits = spec.exposed(IDS, site, 16).float()
            exposed, hidden = bits / keep, (1 - bits) / (1 - keep)
            total += ((hidden - exposed) * derivative).sum(dim=1)
        expected[row] = total.detach().numpy()
    result = Influence(network, objective, "linear", ghosts=10).estimate([batch], IDS)
    np.testing.assert_allclose(result.scores, expected, rtol=1e-5, atol=1e-5)


def test_linear_counts_every_use_of_a_module_that_runs_twice():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
            self.act, self.last = nn.Tanh(), nn.Linear(8, 3)

        def forward(self, x, mask=1):
            hidden = self.act(self.second(self.act(self.first(x)) * mask)) * mask
            return self.last(hidden)

    model = tiny.randomise(Shared()).eval()
    x, y = tiny.features(1), tiny.labels(1)
    mask = torch.ones(1, 8, requires_grad=True)
    objectives.margin(model(x, mask), Batch(x, y)).backward()
    network = turnover.attach(model, "act")
    bits = network.spec.exposed(IDS, "act", 8).float()
    expected = ((2 - 4 * bits) * mask.grad).sum(dim=1)
    result = Influence(network, objectives.margin, "linear", ghosts=10).estimate([(x, y)], IDS)
    np.testing.assert_allclose(result.scores[0], expected, rtol=1e-5, atol=1e-5)


def test_linear_works_through_gradient_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body = nn.Linear(6, 6), tiny.mlp()

        def forward(self, x):
            h = self.first(x)
            if not self.recompute:
                return self.body(h)
            return torch.utils.checkpoint.checkpoint(self.body, h, use_reentrant=False)

    model = tiny.randomise(Checkpointed())
    network = turnover.attach(model, "body.[13]")
    scores = []
    for model.recompute in (False, True):
        result = Influence(network, ghosts=10).estimate([(tiny.features(2), tiny.labels(2))], IDS)
        scores.append(result.scores)
    np.testing.assert_array_equal(*scores)


@pytest.fixture(scope="module")
def trained():
    """A wide MLP that has memorised noisy labels: 60 instances, 20 targets of the same kind."""
    torch.manual_seed(0)
    model = tiny.mlp(width=256)
    network = turnover.attach(model, "mlp")
    x, ids = tiny.features(80), torch.arange(60) * 1009
    y = x[:, :3].argmax(dim=1)
    flipped = torch.rand(80, generator=torch.Generator().manual_seed(1)) < 0.2
    y = torch.where(flipped, (y + 1) % 3, y)
    tiny.train(network, x[:60], y[:60], ids, epochs=100, rate=3e-3)
    return network, Batch(x[:60], y[:60], ids), Batch(x[60:], y[60:])


@pytest.mark.parametrize("method", ["exact", "linear"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_instance_that_was_trained_on_helped_itself(trained, method, objective):
    network, training, _ = trained
    result = Influence(network, objective, method, ghosts=100).self_influence([training])
    assert result.scores.shape == result.noise_floor.shape == (60,)
    assert (result.scores > 0).mean() > 0.9
    assert result.z.mean() > 1
    assert result.train_ids.tolist() == training.ids.tolist()
    fresh = Batch(training.inputs, training.labels, torch.arange(60) + 10**6)
    untrained = Influence(network, objective, method, ghosts=100).self_influence([fresh])
    assert abs(untrained.z.mean()) < 0.6


def test_linear_ranks_like_exact(trained):
    network, training, targets = trained
    scores = [
        Influence(network, objectives.margin, method, ghosts=10)
        .estimate([targets], training.ids)
        .scores
        for method in ("exact", "linear")
    ]
    correlations = [stats.spearmanr(*pair).statistic for pair in zip(*scores, strict=True)]
    assert np.mean(correlations) > 0.7


@pytest.mark.parametrize("method", ["exact", "linear"])
@pytest.mark.parametrize("objective", OBJECTIVES[:2])
def test_fresh_ghosts_are_significant_as_often_as_chance_says(trained, method, objective):
    network, _, targets = trained
    ghosts = 1000
    fresh = turnover.ghost_ids(1500, start=ghosts)
    result = Influence(network, objective, method, ghosts=ghosts).estimate([targets], fresh)
    assert 0.005 < (result.p < 0.01).mean() < 0.02
    assert (result.q < 0.05).mean() < 0.005


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_aggregate_is_the_mean_over_targets(method):
    network, batch = build("mlp")
    influence = Influence(network, objectives.margin, tiny.method(method, block=4), ghosts=30)
    parts = [batch.rows(0, 2), batch.rows(2, 3)]
    pairs = influence.estimate(parts, IDS)
    mean = influence.aggregate(parts, IDS)
    assert mean.scores.shape == mean.z.shape == mean.p.shape == mean.q.shape == (len(IDS),)
    assert mean.noise_floor.shape == ()
    np.testing.assert_allclose(mean.scores, pairs.scores.mean(axis=0), rtol=1e-5, atol=1e-5)
    assert mean.noise_floor > 0


@pytest.mark.parametrize("method", ["exact", "linear", "rerank"])
def test_aggregate_with_weights_is_that_sum_over_targets(method):
    network, batch = build("mlp")
    influence = Influence(network, objectives.margin, method, ghosts=30)
    parts, weights = [batch.rows(0, 2), batch.rows(2, 3)], [0.5, -1.0, 2.0]
    pairs = influence.estimate(parts, IDS).scores
    found = influence.aggregate(parts, IDS, weights=weights)
    ghosts = influence.estimate(parts, turnover.ghost_ids(30, start=30)).scores
    np.testing.assert_allclose(found.scores, weights @ pairs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.noise_floor, (weights @ ghosts).std(), rtol=0.5)
    even = influence.aggregate(parts, IDS, weights=torch.full((3,), 1 / 3))
    np.testing.assert_allclose(even.scores, influence.aggregate(parts, IDS).scores, rtol=1e-4)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1.0, 1.0], "2 weights for more targets"),
        ([1.0] * 4, "4 weights for 3 targets"),
        ([1.0, float("nan"), 1.0], "finite numbers"),
        (torch.ones(3, 1), "shape"),
    ],
)
@pytest.mark.parametrize("method", ["linear", "gram"])
def test_weights_are_one_finite_number_for_each_target(method, weights, said):
    network, batch = build("mlp")
    influence = Influence(network, objectives.margin, method, ghosts=10)
    if method == "gram":
        influence.fit([Batch(torch.randn(6, batch.inputs.shape[1]), torch.arange(6) % 2)])
    with pytest.raises(InputError, match=said):
        influence.aggregate(
            [batch.rows(0, 2), batch.rows(2, 3)],
            IDS[:3] if method != "gram" else None,
            weights=weights,
        )


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_self_influence_is_the_diagonal(method):
    network, batch = build("bert")
    batch = Batch(batch.inputs, batch.labels, IDS[:ROWS])
    influence = Influence(network, objectives.margin, method, ghosts=20)
    pairs = influence.estimate([batch], IDS[:ROWS])
    own = influence.self_influence([batch.rows(0, 2), batch.rows(2, 3)])
    np.testing.assert_allclose(own.scores, np.diag(pairs.scores), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(own.z, np.diag(pairs.z), rtol=1e-3, atol=1e-3)
    assert pairs.target_ids.tolist() == IDS[:ROWS].tolist()


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_scores_z_and_noise_floor_fit_together(method):
    network, batch = build("mlp", keep=0.3)
    result = Influence(network, objectives.cross_entropy, method, ghosts=50).estimate([batch], IDS)
    noise = Influence(network, objectives.cross_entropy, method, ghosts=10)
    drawn = noise.estimate([batch], turnover.ghost_ids(40, start=10)).scores
    np.testing.assert_allclose(result.noise_floor, drawn.std(axis=1, ddof=1), rtol=0.35)
    spread = (result.scores[:, :1] - result.scores[:, 1:]) / result.noise_floor[:, None]
    np.testing.assert_allclose(result.z[:, :1] - result.z[:, 1:], spread, rtol=1e-3, atol=1e-3)


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.dropout = tiny.mlp(), nn.Dropout(0.5)

    def forward(self, x):
        return self.body(self.dropout(x))


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_dropout_and_training_mode_do_not_matter_and_modes_are_put_back(method):
    model = tiny.randomise(WithDropout()).eval()
    network = turnover.attach(model, "mlp")
    batch = Batch(tiny.features(ROWS), tiny.labels(ROWS), IDS[:ROWS])
    influence = Influence(network, method=method, ghosts=10)
    expected = influence.estimate([batch], IDS).scores
    model.train()
    model.body[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    np.testing.assert_array_equal(influence.estimate([batch], IDS).scores, expected)
    with pytest.raises(InputError):
        influence.estimate([], IDS)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("method", ["exact", "linear"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_without_autograd_are_served(method, context):
    network, batch = build("bert")
    influence = Influence(network, method=method, ghosts=10)
    expected = influence.estimate([batch], IDS).scores
    with context():
        np.testing.assert_array_equal(influence.estimate([batch], IDS).scores, expected)


def test_unknown_methods_are_answered_with_those_that_are_built():
    network, _ = build("mlp")
    with pytest.raises(InputError, match=r"'magic'.*auto, exact, gram, linear,.* rerank"):
        Influence(network, method="magic")
    with pytest.raises(InputError, match="ghosts"):
        Influence(network, ghosts=9)
    with pytest.raises(InputError, match="block"):
        turnover.Exact(block=0)


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_ids_that_make_no_sense_are_refused_before_any_forward(method):
    network, batch = build("mlp")
    influence = Influence(network, method=method, ghosts=10)
    calls = []
    network.model.register_forward_hook(lambda *_: calls.append(1))
    for ids, named in (
        ([1, 2, 2], r"twice: \[2\]"),
        ([], "no training ids"),
        ([3, -10], "ghosts of the noise floor"),
    ):
        for estimate in (influence.estimate, influence.aggregate):
            with pytest.raises(InputError, match=named):
                estimate([batch], ids)
    with pytest.raises(TypeError, match="integers"):
        influence.estimate([batch], [0.5])
    for ids in ([1, 2, 1], [1, 2, -1], [1, 2]):
        with pytest.raises(InputError, match="ids"):
            influence.self_influence([Batch(batch.inputs, batch.labels, torch.tensor(ids))])
    with pytest.raises(InputError, match="needs the ids"):
        influence.self_influence([batch])
    assert not calls


def test_an_id_in_two_training_batches_is_refused():
    network, batch = build("mlp")
    batch = Batch(batch.inputs, batch.labels, IDS[:ROWS])
    with pytest.raises(InputError, match=r"twice: \[0, 4"):
        Influence(network, ghosts=10).self_influence([batch, batch])


def test_nothing_to_explain_is_refused():
    influence = Influence(build("mlp")[0], ghosts=10)
    for estimate in (influence.estimate, influence.aggregate):
        with pytest.raises(InputError, match="no targets"):
            estimate([], IDS)
    with pytest.raises(InputError, match="no training batches"):
        influence.self_influence([])
    with pytest.raises(InputError, match="no rows"):
        influence.estimate([(torch.empty(0, 6), torch.empty(0, dtype=torch.int64))], IDS)


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_an_objective_that_is_not_finite_names_its_rows(method):
    network, batch = build("mlp")
    batch.inputs[1] = float("nan")
    influence = Influence(network, method=method, ghosts=10)
    for estimate in (influence.estimate, influence.aggregate):
        with pytest.raises(InputError, match=r"NaN.*rows \[1\]"):
            estimate([batch], IDS)


@pytest.mark.parametrize("method", ["exact", "linear"])
@pytest.mark.parametrize(
    ("labels", "named"),
    [
        (None, "has none"),
        (torch.rand(ROWS), "regression"),
        (torch.zeros(ROWS, 3, dtype=torch.int64), "multi-label"),
        (torch.tensor([0, 1, 3]), r"\[0, 3\)"),
        (torch.tensor([0, -100, 1]), "-100"),
    ],
)
def test_labels_that_are_not_classes_are_refused_with_the_reason(method, labels, named):
    network, batch = build("mlp")
    for objective in OBJECTIVES[:2]:
        with pytest.raises(InputError, match=named):
            Influence(network, objective, method, ghosts=10).estimate([(batch.inputs, labels)], IDS)


@pytest.mark.parametrize("method", ["exact", "linear"])
@pytest.mark.parametrize(
    "objective",
    [
        lambda outputs, batch: outputs.mean(),
        lambda outputs, batch: outputs,
        lambda outputs, batch: [0.0],
    ],
)
def test_objectives_that_do_not_cost_each_row_are_refused(method, objective):
    network, batch = build("mlp")
    with pytest.raises(InputError, match="rows"):
        Influence(network, objective, method, ghosts=10).estimate([batch], IDS)


def test_objectives_without_a_derivative_are_refused_by_the_linear_method_alone():
    network, batch = build("mlp")

    def wrong(outputs, batch):
        return (outputs.argmax(dim=1) != batch.labels).float()

    with pytest.raises(InputError, match='method="exact"'):
        Influence(network, wrong, "linear", ghosts=10).estimate([batch], IDS)
    result = Influence(network, wrong, "exact", ghosts=10).estimate([batch], IDS)
    assert result.objective == "wrong"


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_a_forward_that_comes_by_no_site_is_refused(method):
    class Bypassing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.used = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.used(x)

    network = turnover.attach(Bypassing(), "linear")
    batch = Batch(tiny.features(2), tiny.labels(2))
    with pytest.raises(BindingError, match="linear"):
        Influence(network, method=method, ghosts=10).estimate([batch], IDS)


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_a_target_that_no_mask_touches_is_never_significant(method):
    network, batch = build("mlp")
    with torch.no_grad():
        network.model[4].weight.zero_()
    result = Influence(network, method=method, ghosts=10).estimate([batch], IDS)
    for values, expected in ((result.scores, 0), (result.z, 0), (result.p, 1), (result.q, 1)):
        assert (values == expected).all()
    assert (result.noise_floor == 0).all()


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_silent_targets_do_not_change_the_noise_of_the_others(method):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = tiny.mlp()

        def forward(self, x):
            return self.body(x) * x[:, :1]

    network = turnover.attach(tiny.randomise(Gated()).eval(), "mlp")
    x, y = tiny.features(3), tiny.labels(3)
    x[0, 0] = 0
    influence = Influence(network, objectives.cross_entropy, method, ghosts=11)
    every = influence.estimate([(x, y)], IDS)
    others = influence.estimate([(x[1:], y[1:])], IDS)
    assert (every.p[0] == 1).all()
    np.testing.assert_allclose(every.p[1:], others.p, rtol=1e-3)


@pytest.mark.parametrize("estimate", ["estimate", "aggregate", "self_influence"])
def test_results_become_labelled_datasets(estimate):
    xarray = pytest.importorskip("xarray")
    network, batch = build("mlp")
    batch = Batch(batch.inputs, batch.labels, IDS[:ROWS])
    influence = Influence(network, objectives.margin, ghosts=10)
    arguments = [[batch]] if estimate == "self_influence" else [[batch], IDS]
    result = getattr(influence, estimate)(*arguments)
    dataset = result.to_xarray()
    again = xarray.Dataset.from_dict(dataset.to_dict())
    for name, values in (
        ("score", result.scores),
        ("z", result.z),
        ("p", result.p),
        ("q", result.q),
        ("noise_floor", result.noise_floor),
        ("train", result.train_ids),
    ):
        np.testing.assert_array_equal(again[name].values, values)
    if estimate == "estimate":
        assert dict(dataset.sizes) == {"target": ROWS, "train": len(IDS)}
        assert dataset.target.values.tolist() == IDS[:ROWS].tolist()
    assert dataset.attrs == {"method": "linear", "objective": "margin", "network": network.digest()}


def test_a_result_names_its_network():
    network, batch = build("mlp")
    before = Influence(network, ghosts=10).estimate([batch], IDS)
    assert before.network == network.digest()
    with torch.no_grad():
        network.model[0].weight[0, 0] += 1
    after = Influence(network, ghosts=10).aggregate([batch], IDS)
    other = Influence(build("mlp", 0.3)[0], ghosts=10).estimate([batch], IDS)
    assert len({before.network, after.network, other.network}) == 3


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_batches_of_every_accepted_kind_give_the_same_scores(method):
    network, batch = build("mlp")
    x, y = batch.inputs, batch.labels
    kinds = [
        batch,
        (x, y),
        [x, y, IDS[:ROWS]],
        (x, y.tolist()),
        (x, y.numpy(), IDS[:ROWS].tolist()),
        Batch((x,), y),
        {"input": x, "labels": y},
        {"input": x, "label": y, "id": IDS[:ROWS]},
        (x, y.int()),
    ]
    influence = Influence(network, method=method, ghosts=10)
    expected = influence.estimate([batch], IDS).scores
    for kind in kinds:
        np.testing.assert_array_equal(influence.estimate([kind], IDS).scores, expected)
    adapted = Influence(
        network, method=method, ghosts=10, adapter=lambda raw: Batch(raw["features"], raw["class"])
    )
    scores = adapted.estimate([{"features": x, "class": y}], IDS).scores
    np.testing.assert_array_equal(scores, expected)


def test_batches_that_are_not_understood_are_refused():
    network, batch = build("mlp")
    influence = Influence(network, ghosts=10)
    for raw, named in (
        ("text", "type str"),
        ((batch.inputs, ["a", "b", "c"]), "labels"),
        ((batch.inputs, batch.labels, IDS), "one id for each row"),
    ):
        with pytest.raises(InputError, match=named):
            influence.estimate([raw], IDS)
    with pytest.raises(TypeError, match="integers"):
        influence.estimate([(batch.inputs, batch.labels, [0.5] * ROWS)], IDS)


def test_structured_inputs_keep_their_kind_and_shared_tensors():
    class Structured(nn.Module):
        def forward(self, pair, options, scale):
            assert isinstance(pair, list)
            assert options["rate"] == 2
            return (pair[0] + pair[1]) * scale

    x = tiny.features(4)
    batch = Batch(([x, x + 1], {"rate": 2}, torch.tensor(3.0)), tiny.labels(4), torch.arange(4))
    part = batch.rows(1, 3)
    assert len(batch) == 4
    assert len(part) == 2
    assert part.ids.tolist() == [1, 2]
    torch.testing.assert_close(part.call(Structured()), batch.call(Structured())[1:3])
    repeated = batch.rows(1, 2).expanded(5)
    assert repeated.labels.shape == repeated.ids.shape == (5,)
    assert repeated.call(Structured()).shape == (5, 6)


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_what_is_trained_stays_trainable_even_after_a_failure(method):
    network = turnover.attach(tiny.mlp().eval(), "mlp")
    network.model[0].bias = nn.Parameter(torch.zeros(16), requires_grad=False)
    before = [p.requires_grad for p in network.model.parameters()]
    Influence(network, method=method, ghosts=10).estimate(
        [(tiny.features(2), tiny.labels(2))], [1, 2]
    )
    assert [p.requires_grad for p in network.model.parameters()] == before
    with pytest.raises(InputError):
        Influence(network, method=method, ghosts=10).estimate(
            [(tiny.features(2) * torch.nan, tiny.labels(2))], [1, 2]
        )
    assert [p.requires_grad for p in network.model.parameters()] == before


def test_planted_copies_rise_above_the_noise():
    """Copies of a target are significantly helpful, copies with another label significantly harmful."""
    torch.manual_seed(0)
    model = tiny.mlp(width=4096)
    network = turnover.attach(model, "mlp")
    inputs, labels, ids = tiny.features(80), tiny.labels(80), torch.arange(80)
    targets = Batch(tiny.features(6, seed=9), tiny.labels(6, seed=9))
    inputs[:6], labels[:6] = targets.inputs, targets.labels
    inputs[6:12], labels[6:12] = targets.inputs, (targets.labels + 1) % tiny.CLASSES
    tiny.train(network, inputs, labels, ids)
    result = Influence(network, method="linear").estimate([targets], ids)
    rows = np.arange(6)
    assert (result.scores[rows, rows] > 0).all() and (result.q[rows, rows] <= 0.05).all()
    harmful = result.q[rows, rows + 6] <= 0.05
    assert harmful.sum() >= 5 and (result.scores[rows, rows + 6][harmful] < 0).all()


def test_a_method_in_the_objectives_place_is_refused_with_the_word_that_is_missing():
    with pytest.raises(InputError, match="method='gram'"):
        turnover.Influence(torch.nn.Linear(6, 2), "gram")


def test_one_batch_in_place_of_a_list_of_batches_is_told_so():
    net = turnover.attach(torch.nn.Sequential(turnover.WideHead(6, 16, 2)).eval(), "head")
    with pytest.raises(InputError, match=r"list of batches \(inputs, labels\)"):
        turnover.Influence(net).estimate((torch.randn(4, 6), torch.tensor([0, 1, 0, 1])), range(3))
