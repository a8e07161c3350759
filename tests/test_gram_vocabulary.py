"""Gram's gradients by the words' weight: exact, and without those of the logits."""

import gc
import tempfile

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import tiny
import turnover
from test_gram import cut
from test_gram_disk import limited
from test_gram_gradients import ROWS, by_hand
from test_gram_language import PRECISIONS, assert_rules_agree, causal
from test_language_models import passages
from turnover import Batch, InputError
from turnover.influence.gram import kernel as kernel_module
from turnover.influence.gram import vocabulary
from turnover.influence.gram.capture import Capture
from turnover.influence.gram.factors import join
from turnover.influence.gram.kernel import block_of, gram_of
from turnover.influence.gram.sides import Maps
from turnover.influence.gram.vocabulary import Dense, Softmax
from turnover.objectives import completion

WORDS, WIDTH = 40, 6


class Words(nn.Module):
    """Words in, words out, by one weight or two."""

    def __init__(self, *, tied=True, bias=False, words=WORDS, width=WIDTH):
        super().__init__()
        self.table, self.mix = nn.Embedding(words, width), nn.Linear(width, width)
        self.last = nn.Linear(width, words, bias=bias)
        if tied:
            self.last.weight = self.table.weight

    def forward(self, tokens):
        hidden = torch.tanh(self.mix(self.table(tokens).cumsum(dim=1)))
        return self.last(hidden)


def words(**options):
    torch.manual_seed(5)
    return tiny.randomise(Words(**options)).eval()


def texts(rows, length, seed=0):
    """The first tokens are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, WORDS, (rows, length), generator=generator)
    labels = tokens.clone()
    for row in range(rows):
        labels[row, : 1 + row % 2] = -100
    return Batch(tokens, labels)


def sampled(outputs, batch):
    """Minus the log-probability of other words than the labels, of which some are worse than none."""
    weights = torch.tensor([1.0, -0.5, 0.0])[torch.arange(outputs.shape[1]) % 3]
    costs = functional.cross_entropy(outputs.mT, (batch.labels * 7) % WORDS, reduction="none")
    return (costs * weights).sum(dim=1)


def margins(outputs, batch):
    labels = batch.labels.clamp_min(0)[..., None]
    others = outputs.scatter(2, labels, -torch.inf).logsumexp(dim=2)
    return (others - outputs.gather(2, labels)[..., 0]).sum(dim=1)


def smoothed(outputs, batch):
    labels = batch.labels.clamp_min(0)
    costs = functional.cross_entropy(outputs.mT, labels, reduction="none", label_smoothing=0.1)
    return costs.sum(dim=1)


def scaled(outputs, batch):
    return completion(1.5 * outputs, batch)


def capped(outputs, batch):
    return completion(3 * torch.tanh(outputs / 3), batch)


def form(model, batch, objective=completion):
    return Capture(model, objective, residuals=False).rows(batch).parts["last"]


def assert_products(one, other, expected):
    found = torch.zeros(len(one), len(other))
    one.add_gram(other, found)
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3", "gemma", "opt"])
def test_tied_words_have_a_rule(kind, dtype):
    assert_rules_agree(causal(kind, tied=True, dtype=dtype), passages(ROWS), PRECISIONS[dtype])


def test_the_only_trained_weight_may_be_that_of_the_words():
    model = causal("gpt2", tied=True).requires_grad_(False)
    model.transformer.wte.weight.requires_grad_(True)
    assert_rules_agree(model, passages(ROWS), 2e-5)


@pytest.mark.parametrize("length", [3, 30])  # by pairs of tokens, and by words
@pytest.mark.parametrize("chunk", [50, 2000, 2**24])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("objective", [completion, sampled, margins])
def test_products_of_a_cross_entropy_are_those_of_its_gradients(
    objective, bias, tied, chunk, length, monkeypatch
):
    monkeypatch.setattr(vocabulary, "_CHUNK", chunk)
    model = words(tied=tied, bias=bias)
    names = ("last.weight", "last.bias") if bias else ("last.weight",)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name in names or (tied and name == "table.weight"))
    one, other = texts(5, length), texts(4, length + 2, seed=1)
    first, second = (
        torch.from_numpy(by_hand(model, each, objective)).float() for each in (one, other)
    )
    ours, theirs = form(model, one, objective), form(model, other, objective)
    assert isinstance(ours, Softmax)
    torch.testing.assert_close(ours.explicit(), first, atol=1e-4, rtol=1e-4)
    assert_products(ours, theirs, first @ second.T)
    assert_products(ours, ours, first @ first.T)
    assert_products(ours.rows(1, 3), theirs, first[1:3] @ second.T)
    both = torch.cat([first, second])
    assert_products(join([ours, theirs]), join([ours, theirs]), both @ both.T)
    assert ours.nbytes <= 4 * 5 * length * (2 * WIDTH + 6)


def certain(outputs, batch):
    """Labels that the model predicts, but for the first token of a row."""
    labels = outputs.detach().argmax(dim=2)
    labels[:, 0] = batch.labels[:, -1]
    return functional.cross_entropy(outputs.mT, labels, reduction="none").sum(dim=1)


@pytest.mark.parametrize("factor", [10, 30, 100])
def test_tokens_may_be_predicted_almost_for_certain(factor):
    model, batch = words(tied=False), texts(5, 12)
    with torch.no_grad():
        model.last.weight.mul_(factor)
    model.requires_grad_(False)
    model.last.weight.requires_grad_(True)
    made = form(model, batch, certain)
    assert isinstance(made, Softmax)
    expected = torch.from_numpy(by_hand(model, batch, certain)).float()
    assert_products(made, made, expected @ expected.T)


@pytest.mark.parametrize("length", [3, 30])
@pytest.mark.parametrize("objective", [completion, smoothed])
def test_whitened_gradients_are_multiplied_number_by_number(objective, length):
    model = words(bias=True)
    generator = torch.Generator().manual_seed(3)
    by = Maps(None, torch.rand((1, WORDS * (WIDTH + 1)), generator=generator) + 0.5)
    forms, expected = [], []
    for seed in (0, 1):
        made = form(model, texts(4, length, seed), objective)
        expected.append(made.explicit() * by.back)
        forms.append(made.whitened(by))
    assert type(forms[0]) is (Softmax if objective is completion else Dense)
    torch.testing.assert_close(forms[0].explicit(), expected[0], atol=1e-4, rtol=1e-4)
    assert_products(*forms, expected[0] @ expected[1].T)
    torch.testing.assert_close(forms[0].rows(0, 1).explicit(), forms[0].explicit()[:1])


@pytest.mark.parametrize("bias", [True, False])
def test_moments_of_words_are_those_of_each_number(bias):
    made = form(words(bias=bias), texts(5, 7), completion)
    squares = made.explicit().square().sum(dim=0)
    torch.testing.assert_close(made.moments().squares, squares, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("objective", [smoothed, scaled, capped])
def test_other_gradients_of_logits_are_kept_whole(objective, tied):
    model, batch = words(tied=tied), texts(5, 8)
    assert not isinstance(form(model, batch, objective), Softmax)
    assert_rules_agree(model, batch, 2e-5, objective)


def test_a_layer_within_the_model_is_not_taken_for_a_head():
    torch.manual_seed(0)
    narrow = nn.Linear(6, 2), nn.Linear(2, 24), nn.ReLU()  # as an adapter of low rank
    model = nn.Sequential(*narrow, nn.Linear(24, 3)).eval()
    batch = Batch(tiny.features(5), tiny.labels(5))
    capture = Capture(model, turnover.objectives.cross_entropy, residuals=False)
    assert not any(
        isinstance(one, vocabulary.Vocabulary) for one in capture.rows(batch).parts.values()
    )


def test_a_block_holds_both_forms():
    """Batches of which only some are of a cross entropy."""
    model, batch = words(bias=True), texts(6, 8)

    def objective(outputs, batch):
        usual = completion(outputs, batch)
        return torch.where(batch.labels[:, -1] % 2 == 0, usual, smoothed(outputs, batch))

    even = batch.labels[:, -1] % 2 == 0
    rows = torch.cat([even.nonzero(), (~even).nonzero()])[:, 0]
    batch = Batch(batch.inputs[rows], batch.labels[rows])
    capture, count = Capture(model, objective, residuals=False), int(even.sum())
    every = [capture.rows(batch.rows(a, b)) for a, b in ((0, count), (count, 6))]
    assert [type(one.parts["last"]) for one in every] == [Softmax, Dense]
    found = torch.empty(6, 6)
    gram_of([block_of(every)], found)
    gradients = torch.from_numpy(by_hand(model, batch, objective)).float()
    torch.testing.assert_close(found, gradients @ gradients.T, atol=1e-3, rtol=1e-4)


def test_no_row_holds_the_gradients_of_its_logits():
    model = words(words=5000, width=8)
    rows = Capture(model, completion, residuals=False).rows(texts(4, 20))
    assert rows.parts["last"].nbytes < 4 * 4 * 20 * 25


def test_an_embedding_that_scales_its_gradients_goes_the_general_way():
    model = words()
    model.table.scale_grad_by_freq = True
    capture = Capture(model, completion, residuals=False)
    with pytest.warns(UserWarning, match="gram knows no rule for 1 parameters"):
        capture.rows(texts(4, 20))
    assert capture.general == ("last.weight",)


def test_words_on_disk_are_those_in_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(kernel_module, "_ROWS", 3)
    model, batch = causal("gpt2", tied=True), passages(ROWS)
    memory = turnover.Influence(model, completion, "gram").fit(cut(batch, 2))
    disk = limited(model, completion, memory=0).fit(cut(batch, 2))
    files = list(tmp_path.rglob("*.npy"))
    assert files
    assert max(np.load(file).size for file in files) < model.lm_head.weight.numel() * 3
    tiny.assert_same(memory.estimate([batch]), disk.estimate([batch]))
    del disk
    gc.collect()


def test_weights_that_change_after_fit_are_refused():
    model, batch = words(), texts(ROWS, 8)
    influence = turnover.Influence(model, completion, "gram").fit([batch])
    with torch.no_grad():
        model.last.weight.mul_(1.01)
    with pytest.raises(InputError, match=r"weights have changed .* fit again"):
        influence.estimate([batch])
