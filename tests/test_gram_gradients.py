"""Gram: inner products of gradients of every kind of layer against autograd, row by row."""

import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from turnover import Batch, InputError, objectives
from turnover.influence.gradients import all_finite
from turnover.influence.gram import factors as factors_module
from turnover.influence.gram import kernel as kernel_module
from turnover.influence.gram.capture import Capture
from turnover.influence.gram.factors import Explicit
from turnover.influence.gram.kernel import block_of, cross_of, gram_of
from turnover.influence.gram.rules import Rule, register

ROWS = 6


class Grouped(nn.Module):
    """Convolutions of every kind, and normalisation with a scale and a shift."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, (3, 1), dilation=2, padding="same", padding_mode="circular"),
            nn.BatchNorm2d(6),
            nn.Flatten(2),
            nn.Conv1d(6, 3, 3, bias=False),
            nn.Flatten(),
            nn.LazyLinear(tiny.CLASSES),
        )
        self.layers(tiny.features(2, 2, 9, 9))

    def forward(self, x):
        return self.layers(x)


class Recurring(nn.Module):
    """A layer that is called three times, and an embedding whose weight is used again at the end."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 5, padding_idx=0)
        self.step, self.norm = nn.Linear(5, 5), nn.LayerNorm(5)
        self.last = nn.Linear(5, 9, bias=False)
        self.last.weight = self.table.weight

    def forward(self, tokens):
        hidden = self.table(tokens)
        for _ in range(3):
            hidden = torch.tanh(self.norm(self.step(hidden)))
        return self.last(hidden.mean(dim=1))[:, : tiny.CLASSES]


class SharedByThree(Recurring):
    """No embedding and one linear layer have it alone."""

    def __init__(self):
        super().__init__()
        self.also = nn.Linear(5, 9, bias=False)
        self.also.weight = self.table.weight

    def forward(self, tokens):
        return super().forward(tokens) + self.also(self.table(tokens)[:, 0])[:, : tiny.CLASSES]


class Attention(nn.Module):
    """Parameters that no module's forward shows: an attention's, and one of its own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.gain = nn.Parameter(torch.ones(6))
        self.last = nn.Linear(6, tiny.CLASSES)

    def forward(self, x):
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.last((mixed * self.gain).mean(dim=1))


class Sequential(nn.Module):
    """Tokens first, rows second: a layout that only a comparison with autograd reveals."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, tiny.CLASSES)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x.transpose(0, 1))).mean(dim=0))


class Scale(nn.Module):
    """A layer that turnover does not know."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x):
        return x * self.weight


class WrongScale(Scale):
    """Its rule forgets a factor."""


@register(Scale)
class ScaleRule(Rule):
    def factors(self, module, trained, calls):
        return Explicit(sum((call.back * call.inputs).sum(dim=1) for call in calls))


@register(WrongScale)
class WrongRule(ScaleRule):
    def factors(self, module, trained, calls):
        return Explicit(1.1 * super().factors(module, trained, calls).matrix)


def gained(kind):
    layers = nn.Linear(6, 6), nn.Tanh(), kind(), nn.Flatten(), nn.Linear(30, tiny.CLASSES)
    return nn.Sequential(*layers)


def whole_bert(layers=1):
    from transformers import AutoModelForSequenceClassification, BertConfig

    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=32,
        num_labels=tiny.CLASSES,
    )
    return AutoModelForSequenceClassification.from_config(config)


def tokens():
    return torch.randint(0, 9, (ROWS, 4), generator=torch.Generator().manual_seed(0))


MODELS = {
    "mlp": (tiny.mlp, lambda: tiny.features(ROWS)),
    "mlp with bias": (lambda: tiny.mlp(bias=True), lambda: tiny.features(ROWS)),
    "conv": (tiny.ConvNet, lambda: tiny.features(ROWS, 1, 8, 8)),
    "convs of every kind": (Grouped, lambda: tiny.features(ROWS, 2, 9, 9)),
    "tokens": (
        lambda: nn.Sequential(
            nn.Linear(5, 8),
            nn.LayerNorm(8),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(56, tiny.CLASSES),
        ),
        lambda: tiny.features(ROWS, 7, 5),
    ),
    "few tokens": (
        lambda: nn.Sequential(nn.Linear(30, 40), nn.Flatten(), nn.Linear(80, tiny.CLASSES)),
        lambda: tiny.features(ROWS, 2, 30),
    ),
    "frozen base": (tiny.FunctionalHead, lambda: tiny.features(ROWS)),
    "lora": (tiny.bert, lambda: tiny.texts(ROWS)),
    "bert": (whole_bert, lambda: tiny.texts(ROWS)),
    "gpt2": (tiny.gpt2, lambda: tiny.texts(ROWS)),
    "shared weight": (Recurring, tokens),
    "rule from outside": (lambda: gained(Scale), lambda: tiny.features(ROWS, 5, 6)),
}


class _NormOfChannels(nn.LayerNorm):
    """As ConvNeXt's: rows are (channels, height, width)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ChannelsFirst(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 6, 3),
            _NormOfChannels(6),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(54, tiny.CLASSES),
        )


GENERAL = {
    "weight shared by three": (SharedByThree, tokens),
    "attention": (Attention, lambda: tiny.features(ROWS, 5, 6)),
    "wrong rule": (lambda: gained(WrongScale), lambda: tiny.features(ROWS, 5, 6)),
    "subclass that takes other inputs": (ChannelsFirst, lambda: tiny.features(ROWS, 2, 5, 5)),
    "rows second": (Sequential, lambda: tiny.features(ROWS, ROWS, 5)),
}


def build(name):
    torch.manual_seed(5)
    make, inputs = (MODELS | GENERAL)[name]
    return tiny.randomise(make()).eval(), Batch(inputs(), tiny.labels(ROWS))


def by_hand(model, batch, objective=objectives.margin):
    """Gradients of the rows, one backward each: (rows, parameters)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(batch)):
        row = batch.rows(i, i + 1)
        cost = objective(row.call(model), row).sum()
        found = torch.autograd.grad(cost, trained, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([one.flatten() for one in found]))
    return torch.stack(rows).double().numpy()


def kernel(model, batch, blocks=1, objective=objectives.margin):
    capture = Capture(model, objective, residuals=False)
    step = -(-len(batch) // blocks)
    starts = range(0, len(batch), step)
    made = [block_of([capture.rows(batch.rows(i, i + step))]) for i in starts]
    out = torch.empty(len(batch), len(batch))
    gram_of(made, out)
    cross, scale = cross_of(made[0], made, len(out)), float(out.abs().max())
    np.testing.assert_allclose(cross, out[: made[0].rows], rtol=1e-5, atol=1e-6 * scale)
    return out.numpy()


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_inner_products_are_those_of_all_gradients(name, blocks):
    model, batch = build(name)
    gradients = by_hand(model, batch)
    expected = gradients @ gradients.T
    scale = np.abs(expected).max()
    assert scale > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(
            kernel(model, batch, blocks) / scale, expected / scale, atol=2e-5
        )


@pytest.mark.parametrize("panel", [2, 4])
@pytest.mark.parametrize("group", [1, 2000])
@pytest.mark.parametrize("name", ["convs of every kind", "bert"])
def test_inner_products_are_the_same_however_few_rows_are_in_memory(
    name, group, panel, monkeypatch
):
    model, batch = build(name)
    expected = kernel(model, batch)
    monkeypatch.setattr(kernel_module, "_GROUP", group)
    monkeypatch.setattr(kernel_module, "_PANEL", panel)
    found = kernel(model, batch, blocks=6)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", MODELS)
def test_inner_products_are_the_same_however_many_rows_are_multiplied_at_once(
    name, rows, blocks, monkeypatch
):
    model, batch = build(name)
    expected = kernel(model, batch)
    monkeypatch.setattr(factors_module, "_SQUARE", rows)
    monkeypatch.setattr(kernel_module, "_ENOUGH", rows)
    found = kernel(model, batch, blocks=blocks)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(found, found.T)


@pytest.mark.parametrize("name", GENERAL)
def test_what_has_no_rule_goes_the_general_way_and_says_so(name):
    model, batch = build(name)
    gradients = by_hand(model, batch)
    expected = gradients @ gradients.T
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = kernel(model, batch)
    (only,) = warned
    assert re.search("gram knows no rule for .* parameters", str(only.message))
    np.testing.assert_allclose(found / expected.max(), expected / expected.max(), atol=2e-5)


def test_batches_of_different_lengths_are_one_training_set():
    model, _ = build("bert")
    batches = [Batch(tiny.texts(3, n, seed=n), tiny.labels(3, n)) for n in (4, 9, 6)]
    gradients = np.concatenate([by_hand(model, batch) for batch in batches])
    expected = gradients @ gradients.T
    capture = Capture(model, objectives.margin, residuals=False)
    made = [block_of([capture.rows(batch) for batch in batches])]
    out = torch.empty(9, 9)
    gram_of(made, out)
    np.testing.assert_allclose(out / expected.max(), expected / expected.max(), atol=2e-5)


@pytest.mark.filterwarnings("error:turnover. gram knows no rule")
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-5), (torch.bfloat16, 0.1)])
def test_batch_norms_in_other_precisions(dtype, most):
    """Their statistics are not float32 as the recorded inputs are."""
    found = []
    for kind in (torch.float32, dtype):
        model = tiny.randomise(tiny.ConvNet()).eval().to(kind)
        batch = Batch(tiny.features(ROWS, 1, 8, 8).to(kind), tiny.labels(ROWS))
        capture = Capture(model, objectives.cross_entropy, residuals=False)
        found.append(torch.zeros(ROWS, ROWS))
        gram_of([block_of([capture.rows(batch)])], found[-1])
    assert (found[1] - found[0]).abs().max() < most * found[0].abs().max()


def test_small_numbers_add_up_beside_a_large_one():
    small = torch.full((4, 2**20), 1e-2)
    out = torch.full((4, 4), 1e5)
    Explicit(small).add_gram(Explicit(small), out)
    np.testing.assert_allclose(out - 1e5, 104.8576, rtol=1e-3)


def test_numbers_whose_sum_is_beyond_float32_are_finite():
    all_finite([torch.full((3, 2), 3e38), torch.zeros(3, 0)], "gradient")


@pytest.mark.parametrize("values", [[np.inf, 0], [np.nan, 0], [np.inf, -np.inf]])
def test_numbers_that_are_not_finite_are_found(values):
    with pytest.raises(InputError, match=r"gradient is NaN or infinite for rows \[1"):
        all_finite([torch.ones(3), torch.tensor([0.0, *values])], "gradient")
