"""Gram's metric, and the gradients of labels that the model draws."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import tiny
from test_gram import cut, problem
from test_gram_gradients import by_hand
from test_gram_language import causal
from test_language_models import passages
from turnover import Batch, Gram, Influence, InputError, objectives
from turnover.influence.gram.disk import Limits
from turnover.influence.gram.factors import Tokens

DAMPING = 0.3


class Dead(nn.Module):
    """Its second layer sees nothing of inputs up to 3."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3, bias=False)

    def forward(self, x):
        return self.first(x) + self.second(1e3 * (x - 3).clamp_min(0))


class Layers(nn.Module):
    """Every form of gradients: words, linear layers with and without tokens, convolutions, a norm."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.patches = nn.Conv1d(8, 6, 2, groups=2)
        self.wide = nn.Conv1d(6, 4, 1, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        hidden = torch.tanh(self.norm(self.mix(self.table(tokens)))).mT
        return self.head(torch.tanh(self.wide(torch.tanh(self.patches(hidden)))).mean(dim=2))


def layers():
    torch.manual_seed(2)
    return tiny.randomise(Layers()).eval()


def tokens(rows, length=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, 30, (rows, length), generator=generator)
    return Batch(inputs, torch.randint(0, 3, (rows,), generator=generator), torch.arange(rows))


def gradients(model, batch, objective=objectives.cross_entropy):
    """Gradients of each row by parameter: rows first."""
    found = {name: [] for name, _ in model.named_parameters()}
    for row in range(len(batch)):
        one = batch.rows(row, row + 1)
        cost = objective(model(one.inputs), one).sum()
        parts = torch.autograd.grad(cost, list(model.parameters()))
        for name, part in zip(found, parts, strict=True):
            found[name].append(part.detach().double())
    return {name: torch.stack(parts) for name, parts in found.items()}


def seen(model, batch):
    """Inputs of the layers with two sides, and the gradients of their outputs: (groups, tokens, width)."""
    inputs, outputs = {}, {}

    def hook(module, args, output, name):
        output.retain_grad()
        inputs[name], outputs[name] = args[0].detach(), output

    named = [
        (name, module) for name, module in model.named_children() if name not in ("table", "norm")
    ]
    handles = [m.register_forward_hook(partial(hook, name=name)) for name, m in named]
    objectives.cross_entropy(model(batch.inputs), batch).sum().backward()
    model.zero_grad()
    for handle in handles:
        handle.remove()
    found = {}
    for name, module in named:
        x, back = inputs[name], outputs[name].grad
        groups = 1
        if isinstance(module, nn.Conv1d):
            groups, kernel = module.groups, module.kernel_size[0]
            x = x.unfold(2, kernel, 1).permute(0, 2, 1, 3)  # (rows, positions, channels, kernel)
            x = x.reshape(*x.shape[:2], groups, -1).permute(2, 0, 1, 3)
            back = back.mT.reshape(len(back), back.shape[2], groups, -1).permute(2, 0, 1, 3)
        else:
            x, back = (v.reshape(1, len(v), -1, v.shape[-1]) for v in (x, back))
        if module.bias is not None:
            x = functional.pad(x, (0, 1), value=1.0)
        found[name] = x.flatten(1, 2).double(), back.flatten(1, 2).double(), groups
    return found


def whitened_by_hand(model, train, targets):
    """Gradients of the rows of both in the metric, as matrices."""
    ours, theirs = gradients(model, train), gradients(model, targets)
    pieces = []
    for name, (x, back, groups) in seen(model, train).items():
        a = x.mT @ x / x.shape[1]
        b = back.mT @ back / len(train)

        def inverse(moments):
            mean = moments.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
            return torch.linalg.inv(moments + DAMPING * mean * torch.eye(moments.shape[1]))

        left, right = (torch.linalg.cholesky(inverse(one)) for one in (b, a))
        pair = []
        for one in (ours, theirs):
            weight = one[f"{name}.weight"]
            weight = weight.reshape(len(weight), groups, weight.shape[1] // groups, -1)
            if f"{name}.bias" in one:
                bias = one[f"{name}.bias"].reshape(len(weight), groups, -1, 1)
                weight = torch.cat([weight, bias], dim=3)
            pair.append((left.mT @ weight @ right).flatten(1))
        pieces.append(pair)
    for names in (["table.weight"], ["norm.weight", "norm.bias"]):
        first, second = (torch.cat([o[n].flatten(1) for n in names], dim=1) for o in (ours, theirs))
        squares = first.square().mean(dim=0)
        scale = (squares + DAMPING * squares.mean()).rsqrt()
        pieces.append([first * scale, second * scale])
    return [torch.cat(parts, dim=1).numpy() for parts in zip(*pieces, strict=True)]


def expected_scores(model, train, targets, ridge=1.0):
    own, others = whitened_by_hand(model, train, targets)
    k = own @ own.T
    return np.linalg.solve(k + ridge * np.diag(k).mean() * np.eye(len(k)), own @ others.T).T


def limited(influence, **limits):
    influence._driver._limits = Limits(**limits)
    return influence


METHOD = Gram(whiten=DAMPING, directions=0)


@pytest.mark.parametrize("size", [1, 5, 24])
def test_whitened_scores_are_those_of_explicit_gradients_in_the_metric(size):
    model, train, targets = layers(), tokens(24), tokens(4, seed=1)
    influence = Influence(model, objective=objectives.cross_entropy, method=METHOD)
    result = influence.fit(cut(train, size)).estimate(cut(targets, 3))
    expected = expected_scores(model, train, targets)
    np.testing.assert_allclose(result.scores, expected, atol=2e-4 * np.abs(expected).max())
    assert np.isfinite(result.standard_error).all()


def test_on_disk_and_by_several_networks_it_is_the_same():
    model, train, targets = layers(), tokens(24), tokens(4, seed=1)

    def scores(influence):
        return influence.fit(cut(train, 5)).estimate(cut(targets, 3)).scores

    make = partial(Influence, objective=objectives.cross_entropy, method=METHOD)
    there = scores(limited(make(model), memory=0))
    np.testing.assert_allclose(there, scores(make(model)), atol=1e-5 * np.abs(there).max())
    other = layers()
    with torch.no_grad():
        other.mix.weight.mul_(1.5)
    mean = (there + scores(make(other))) / 2
    np.testing.assert_allclose(scores(make([model, other])), mean, atol=2e-5 * np.abs(mean).max())


def test_a_second_fit_forgets_the_first_metric():
    model, train, targets = layers(), tokens(24), tokens(4, seed=1)
    influence = Influence(model, objective=objectives.cross_entropy, method=METHOD)
    first = influence.fit(cut(train, 8)).estimate(cut(targets, 4)).scores
    influence.fit(cut(tokens(12, seed=7), 8))
    again = influence.fit(cut(train, 8)).estimate(cut(targets, 4)).scores
    np.testing.assert_array_equal(first, again)


def test_a_second_fit_that_fails_changes_nothing():
    model, train, targets = layers(), tokens(24), tokens(4, seed=1)
    influence = Influence(model, objective=objectives.cross_entropy, method=METHOD)
    first = influence.fit(cut(train, 8)).estimate(cut(targets, 4))
    other = tokens(12, seed=7)
    for bad, named in (([other, other], "given twice"), (cut(other.rows(0, 3), 2), "at least 4")):
        with pytest.raises(InputError, match=named):
            influence.fit(bad)
    again = influence.estimate(cut(targets, 4))
    np.testing.assert_array_equal(first.scores, again.scores)
    np.testing.assert_array_equal(first.train_ids, again.train_ids)


class Halves(nn.Module):
    """Rows go through one of two layers, and one of them does not run for a batch that has none for it."""

    def __init__(self):
        super().__init__()
        self.first, self.experts = nn.Linear(6, 8), nn.ModuleList(nn.Linear(8, 3) for _ in range(2))

    def forward(self, x):
        hidden, chosen = torch.tanh(self.first(x)), (x[:, 0] > 0).long()
        out = x.new_zeros(len(x), 3)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                out = out.index_add(0, rows, expert(hidden[rows]))
        return out


class Gated(nn.Module):
    """A layer that runs for batches with a certain row alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        gate = (x[:, :1] > 0.8).float()
        return self.first(x) + (gate * self.second(x) if gate.any() else 0)


@pytest.mark.filterwarnings("ignore:turnover. gram knows no rule")
@pytest.mark.parametrize(("kind", "sizes"), [(Halves, (24, 5, 2)), (Gated, (24, 5, 1))])
def test_layers_that_run_for_some_batches_have_one_metric(kind, sizes):
    torch.manual_seed(1)
    model = tiny.randomise(kind()).eval()
    train = Batch(tiny.features(24), tiny.labels(24), torch.arange(24))
    targets = Batch(tiny.features(5, seed=3), tiny.labels(5, seed=3))
    found = []
    for size in sizes:
        influence = Influence(model, objective=objectives.cross_entropy, method=METHOD)
        found.append(influence.fit(cut(train, size)).estimate([targets]).scores)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5 * np.abs(found[0]).max())


def test_a_token_whose_gradient_is_rounding_does_not_count():
    generator = torch.Generator().manual_seed(0)
    inputs, back = (torch.randn((3, 1, 4, 5), generator=generator) for _ in range(2))
    moments = []
    for noise in (0.0, 1e-9):
        back[:, :, 0] = noise
        moments.append(Tokens(inputs, back.clone(), True).moments())
    assert moments[0].tokens == moments[1].tokens == 9
    torch.testing.assert_close(moments[0].inputs, moments[1].inputs)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_a_fitted_influence_scores(again):
    model, batch = causal("gpt2", tied=True), passages(8)
    influence = Influence(model, objectives.completion, "gram").fit(cut(batch, 4))
    expected = influence.estimate([batch]).scores
    np.testing.assert_allclose(again(influence).estimate([batch]).scores, expected, rtol=1e-5)


def test_draws_tell_ids_apart_in_all_their_bits():
    model, train, _ = problem()
    ids = torch.arange(len(train)) * 2**32
    same = Batch(train.inputs[:1].repeat(len(train), 1), train.labels[:1].repeat(len(train)), ids)
    influence = Influence(model, objective=objectives.cross_entropy, method=Gram(samples=1))
    influence.fit([same])
    drawn = influence._driver._fitted[0].k.diagonal()[1::2]
    assert len(drawn.unique()) > 1


def test_moments_without_an_inverse_are_refused_by_name():
    model, train, _ = problem()
    rows = Batch(train.inputs[:1].repeat(8, 1), train.labels[:1].repeat(8))
    with pytest.raises(InputError, match="give a larger one"):
        Influence(model, method=Gram(whiten=1e-17)).fit([rows])


def test_weak_whitening_is_close_to_none():
    model, train, targets = problem()
    results = []
    for whiten in (False, 1e9):
        method = Gram(whiten=whiten)
        results.append(Influence(model, method=method).fit(cut(train, 8)).estimate(cut(targets, 4)))
    # Each layer has a factor of its own then, and the layers' shares differ.
    correlation = np.corrcoef(results[0].scores.ravel(), results[1].scores.ravel())[0, 1]
    assert 0.7 < correlation < 0.9999


def test_a_layer_that_no_training_instance_moves_adds_nothing():
    torch.manual_seed(0)
    model = Dead().eval()
    with torch.no_grad():
        model.second.weight.zero_()
    train = Batch(tiny.features(30).clamp(-3, 3), tiny.labels(30))
    targets = Batch(tiny.features(5) + 20, tiny.labels(5))
    found = []
    for trained in (True, False):
        model.second.weight.requires_grad_(trained)
        influence = Influence(model, objective=objectives.cross_entropy, method=METHOD)
        found.append(influence.fit(cut(train, 7)).estimate([targets]).scores)
    np.testing.assert_allclose(*found, rtol=1e-4)


@pytest.mark.parametrize("whiten", [0, -0.1, float("nan"), "much"])
def test_a_damping_that_is_none_is_refused(whiten):
    with pytest.raises(InputError, match="whiten"):
        Gram(whiten=whiten)


def test_scores_with_drawn_labels_are_those_of_the_fisher_matrix():
    """With many draws, those of the exact one."""
    model, train, targets = problem(train=30)
    method = Gram(0.5, samples=100)
    influence = Influence(model, objective=objectives.cross_entropy, method=method)
    scores = influence.fit(cut(train, 7)).estimate(cut(targets, 2)).scores
    own, others = (
        by_hand(model, train, objectives.cross_entropy),
        by_hand(model, targets, objectives.cross_entropy),
    )
    classes = tiny.labels(1000).max().item() + 1
    chances = model(train.inputs).softmax(dim=1).detach().double().numpy()
    fisher, size = 0.0, 0.0
    for label in range(classes):
        labeled = Batch(train.inputs, torch.full((len(train),), label), train.ids)
        rows = (
            by_hand(model, labeled, objectives.cross_entropy) * np.sqrt(chances[:, label])[:, None]
        )
        fisher, size = fisher + rows.T @ rows, size + np.square(rows).sum() / len(train)
    system = fisher + 0.5 * size * np.eye(len(fisher))
    expected = others @ np.linalg.solve(system, own.T)
    np.testing.assert_allclose(scores, expected, atol=0.08 * np.abs(expected).max())
    itself = influence.self_influence().scores
    diagonal = np.einsum("np,pn->n", own, np.linalg.solve(system, own.T))
    np.testing.assert_allclose(itself, diagonal, atol=0.08 * diagonal.max())


def test_drawn_labels_depend_on_ids_alone():
    model, train, targets = problem()
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    turned = Batch(train.inputs[order], train.labels[order], train.ids[order])
    found = []
    for rows, size in ((train, 8), (train, 40), (turned, 3)):
        make = Influence(model, objective=objectives.cross_entropy, method=Gram(samples=2))
        result = make.fit(cut(rows, size)).estimate(cut(targets, 2), train.ids)
        found.append(result.scores)
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-5 * np.abs(found[0]).max())


def test_drawn_labels_need_no_ids_and_leave_the_global_generator_alone():
    model, train, targets = problem()
    plain = Batch(train.inputs, train.labels)
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    influence = Influence(model, objective=objectives.cross_entropy, method=Gram(samples=1))
    result = influence.fit(cut(plain, 9)).estimate(cut(targets, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert result.train_ids.tolist() == list(range(len(train)))
    assert (result.standard_error > 0).all()


def test_on_disk_drawn_labels_give_the_same():
    model, train, targets = problem()
    make = partial(Influence, model, objective=objectives.cross_entropy)
    results = []
    for limits in ({}, {"memory": 0, "rows": 20, "landmarks": 10}):
        influence = limited(make(method=Gram(samples=2)), **limits).fit(cut(train, 9))
        results.append((influence.estimate(cut(targets, 2)), influence.self_influence()))
    for one, other in zip(*results, strict=True):
        scale = np.abs(one.scores).max()
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4 * scale)
        np.testing.assert_allclose(one.standard_error, other.standard_error, atol=1e-3 * scale)


@pytest.mark.parametrize(
    ("options", "objective", "named"),
    [
        ({"samples": 2}, objectives.margin, "samples="),
        ({"samples": 2, "directions": 1}, objectives.cross_entropy, "directions"),
        ({"samples": 2, "ridge": "gcv"}, objectives.cross_entropy, "gcv"),
        ({"samples": 2, "features": "masks"}, objectives.cross_entropy, "masks"),
        ({"samples": -1}, objectives.cross_entropy, "samples"),
        ({"samples": 1.5}, objectives.cross_entropy, "samples"),
    ],
)
def test_drawn_labels_that_cannot_be_are_refused(options, objective, named):
    with pytest.raises(InputError, match=named):
        Influence(problem()[0], objective=objective, method=Gram(**options))
