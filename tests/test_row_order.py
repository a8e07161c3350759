"""Rows in another order within the model, and rows that mix where it is hard to see."""

import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import tiny
import turnover
from turnover import Batch, Influence, InputError, objectives
from turnover.influence.gram.capture import Capture

IDS = torch.arange(30)
LABELS = torch.arange(6) % 3


class Sorting(nn.Module):
    """Sorts its rows by their number of tokens for a while, as packing asks for."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.first, self.act = nn.Linear(8, 32), nn.GELU()
        self.second, self.late = nn.Linear(32, 32), nn.GELU()
        self.last = nn.Linear(32, 3)

    def forward(self, x):
        order = (x > 0).sum(1).argsort(descending=True, stable=True)
        hidden = self.act(self.first(self.tokens(x[order]).sum(1)))[order.argsort()]
        return self.last(self.late(self.second(hidden)))


class ByScore(nn.Module):
    """Runs a layer on its rows in the order of a number that it computes."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        order = hidden[:, 0].argsort()
        return self.last(torch.tanh(self.second(hidden[order]))[order.argsort()])


class Centring(nn.Module):
    """Takes the mean of the batch off its rows; may give something large beside its logits."""

    def __init__(self, beside=None):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 3)
        self.beside = beside

    def forward(self, x):
        hidden = self.first(x)
        logits = self.last(self.act(hidden - hidden.mean(0, keepdim=True)))
        if self.beside is None:
            return logits
        if self.beside == "class":  # that is never allowed
            return torch.cat([logits, logits.new_full((len(x), 1), -1e9)], dim=1)
        return {"logits": logits, "mask": torch.full((len(x), 4), self.beside)}


def of_lengths(*lengths):
    x = torch.randint(1, 20, (len(lengths), 6), generator=torch.Generator().manual_seed(1))
    for row, length in enumerate(lengths):
        x[row, length:] = 0
    return x, LABELS[: len(lengths)]


def attached(model, sites="act"):
    return turnover.attach(tiny.randomise(model).eval(), sites)


def kernel(capture, batch):
    parts = capture.rows(batch).parts.values()
    return sum(part.explicit().double() @ part.explicit().double().T for part in parts)


def autograd(model, batch):
    rows = []
    for row in range(len(batch)):
        one = batch.rows(row, row + 1)
        cost = objectives.cross_entropy(one.call(model), one).sum()
        found = torch.autograd.grad(cost, list(model.parameters()))
        rows.append(torch.cat([gradient.flatten() for gradient in found]).double())
    return torch.stack(rows) @ torch.stack(rows).T


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (Sorting, [of_lengths(6, 5, 4, 3), of_lengths(3, 6, 2, 5, 4)]),
        (Sorting, [of_lengths(6, 6, 6, 6), of_lengths(3, 6, 2, 5, 4)]),
        (ByScore, [(tiny.features(1, 6), LABELS[:1]), (tiny.features(6, 6), LABELS)]),
    ],
    ids=["sorted at first", "of one length at first", "one row at first"],
)
def test_gram_is_right_where_rows_are_sorted_in_later_batches_only(model, batches):
    model = tiny.randomise(model()).eval()
    capture = Capture(model, objectives.cross_entropy, residuals=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x, labels in batches:
            found = kernel(capture, Batch(x, labels))
            wanted = autograd(model, Batch(x, labels))
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_site_at_which_rows_are_sorted_is_refused_where_it_matters():
    x, labels = of_lengths(3, 6, 2, 5, 4)
    wrong = attached(Sorting(), "act")
    for call in (
        lambda: Influence(wrong, method="linear", ghosts=20).estimate([(x, labels)], IDS),
        lambda: wrong.audit((x, labels)),
        lambda: turnover.hidden_predictions(wrong, [(x, labels, IDS[:5])]),
    ):
        with pytest.raises(InputError, match=r"'act' sees the rows .* another order"):
            call()
    ordered = of_lengths(6, 5, 4, 3)
    linear = Influence(wrong, method="linear", ghosts=20)
    linear.estimate([ordered], IDS)
    with pytest.raises(InputError, match="another order"):
        linear.estimate([ordered, (x, labels)], IDS)


def test_sorted_batches_and_sites_behind_the_sorting_are_taken():
    x, labels = of_lengths(3, 6, 2, 5, 4)
    late = attached(Sorting(), "late")
    together = Influence(late, method="linear", ghosts=20).estimate([(x, labels)], IDS).scores
    for row in range(5):
        alone = [(x[row : row + 1], labels[row : row + 1])]
        scores = Influence(late, method="linear", ghosts=20).estimate(alone, IDS).scores
        np.testing.assert_allclose(scores[0], together[row], rtol=1e-3, atol=1e-4)
    late.audit((x, labels))
    turnover.hidden_predictions(late, [(x, labels, IDS[:5])])
    attached(Sorting(), "act").audit(of_lengths(6, 5, 4, 3))


def test_a_square_batch_with_tokens_first_within_the_model_is_refused():
    class TokensFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.act, self.last = nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 3)

        def forward(self, x):
            return self.last(self.act(self.first(x.transpose(0, 1)))).mean(0)

    batch = (tiny.features(6, 24).view(6, 6, 4), LABELS)
    with pytest.raises(InputError, match="another axis"):
        Influence(attached(TokensFirst()), method="linear", ghosts=20).estimate([batch], IDS)


@pytest.mark.parametrize("method", ["linear", "exact", "gram"])
@pytest.mark.parametrize("beside", [-1e4, -1e9, "class"])
def test_rows_that_mix_are_seen_beside_large_numbers(method, beside):
    batches = [(tiny.features(6, 6), LABELS)]
    influence = Influence(attached(Centring(beside)), objectives.margin, method=method, ghosts=20)
    with pytest.raises(InputError, match="rows of a batch mix"):
        influence.fit(batches) if method == "gram" else influence.estimate(batches, IDS)


@pytest.mark.parametrize("method", ["linear", "exact", "gram"])
def test_rows_that_mix_are_seen_behind_a_first_batch_of_one_row(method):
    x = tiny.features(6, 6)
    batches = [(x[:1], LABELS[:1]), (x[1:], LABELS[1:])]
    influence = Influence(attached(Centring()), method=method, ghosts=20)
    with pytest.raises(InputError, match="rows of a batch mix"):
        influence.fit(batches) if method == "gram" else influence.estimate(batches, IDS)


def test_an_objective_may_be_huge():
    network = attached(nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 3)), "mlp")
    batches = [(tiny.features(6, 6), LABELS)]

    def huge(outputs, batch):
        return objectives.cross_entropy(outputs, batch) * 1e31

    for method in ("linear", "exact"):
        plain = Influence(network, objectives.cross_entropy, method=method, ghosts=20)
        large = Influence(network, huge, method=method, ghosts=20)
        wanted = plain.estimate(batches, IDS).scores
        np.testing.assert_allclose(
            large.estimate(batches, IDS).scores / 1e31, wanted, rtol=1e-3, atol=1e-5
        )


class Held:
    """A loader that another one is wrapped in, under a name of its own."""

    def __init__(self, loader, name):
        setattr(self, name, loader)
        self.name = name

    def __iter__(self):
        return iter(getattr(self, self.name))


@pytest.mark.parametrize("name", ["dl", "_wrapped"])
def test_a_shuffling_loader_is_seen_in_a_wrapper_of_any_kind(name):
    network = attached(nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 3)), "mlp")
    data = TensorDataset(tiny.features(6, 6), LABELS)
    shuffled = Held(DataLoader(data, batch_size=2, shuffle=True), name)
    for call in (
        lambda: Influence(network, method="gram").fit(shuffled),
        lambda: Influence(network, method="linear", ghosts=20).estimate(shuffled, IDS),
    ):
        with pytest.raises(InputError, match="shuffles"):
            call()
    Influence(network, method="gram").fit(Held(DataLoader(data, batch_size=2), name))


class Beside(nn.Module):
    """Masked logits, and beside them what an unmasked layer makes of the rows, laid out in some way."""

    def __init__(self, layout):
        super().__init__()
        self.first, self.act = nn.Linear(6, 32, bias=False), nn.GELU()
        self.last, self.open = nn.Linear(32, 3, bias=False), nn.Linear(6, 4, bias=False)
        self.layout = layout

    def forward(self, x):
        made = self.open(x)
        laid_out = {
            "two for each row": lambda: torch.cat([made, made]),
            "time first": lambda: torch.stack([made, made, made]),
            "a loss": lambda: made.square().mean(),
            "a penalty on weights": lambda: self.open.weight.square().sum(),
        }
        return self.last(self.act(self.first(x))), laid_out[self.layout]()


@pytest.mark.parametrize("layout", ["two for each row", "time first", "a loss"])
def test_the_audit_follows_outputs_that_have_no_rows_of_their_own(layout):
    report = attached(Beside(layout)).audit((tiny.features(6, 6), LABELS))
    assert {one.name for one in report.parameters if one.leaking} == {"open.weight"}


def test_a_penalty_on_weights_carries_no_instance():
    assert attached(Beside("a penalty on weights")).audit((tiny.features(6, 6), LABELS)).clean


def test_gram_made_while_another_thread_scores_knows_all_parameters():
    network = attached(nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 3)), "mlp")
    batch = (tiny.features(6, 6), LABELS)
    scoring, made = threading.Event(), []

    def objective(outputs, rows):
        if not scoring.is_set():
            scoring.set()
            other.join(0.3)
        return objectives.margin(outputs, rows)

    def make():
        scoring.wait(10)
        made.append(Influence(network, method="gram").fit([batch]).estimate([batch]).scores)

    other = threading.Thread(target=make, daemon=True)
    other.start()

    def targets():
        yield batch

    Influence(network, objective, method="linear", ghosts=20).estimate(targets(), IDS)
    other.join(30)
    wanted = Influence(network, method="gram").fit([batch]).estimate([batch]).scores
    np.testing.assert_allclose(made[0], wanted, rtol=1e-4, atol=1e-5)


def test_a_completion_ends_where_padding_begins():
    tokens = torch.tensor([[3, 4, 5, 6, 7], [3, 4, 5, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    logits = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))

    def cost(labels):
        inputs = {"input_ids": tokens, "attention_mask": mask}
        return objectives.completion(logits, Batch(inputs, labels))

    with pytest.raises(InputError, match=r"row 1, token 4 is padding .* -100"):
        cost(tokens)
    wanted = -logits[1].log_softmax(1)[[0, 1], [4, 5]].sum()
    torch.testing.assert_close(cost(tokens.where(mask > 0, -100))[1], wanted)
    ended = tokens.where(mask > 0, -100)
    ended[1, 3] = 0  # what the last word predicts
    torch.testing.assert_close(cost(ended)[1], wanted - logits[1, 2].log_softmax(0)[0])


def test_gradients_beyond_float32_are_an_error_with_a_fix():
    def huge(outputs, batch):
        return objectives.margin(outputs, batch) * 1e25

    batches = [(tiny.features(6, 6), LABELS)]
    gram = Influence(tiny.randomise(nn.Linear(6, 3)), huge, method="gram")
    with pytest.raises(InputError, match="scale the objective down"):
        gram.fit(batches)
