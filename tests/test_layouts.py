"""Outputs whose axis 0 is not the batch."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import tiny
import turnover
from turnover import BindingError

IDS = [3, 2**40, 17, 0]


class Recurrent(nn.Module):
    """Sequences first, (steps, rows, features)."""

    def __init__(self, kind, batch_first):
        super().__init__()
        if kind == "encoder":
            layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=batch_first, dropout=0.0)
            self.body = nn.TransformerEncoder(layer, 1)
        elif kind == "attention":
            self.body = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        else:
            self.body = kind(6, 8, batch_first=batch_first)
        self.kind, self.steps = kind, int(batch_first)
        self.head = nn.Linear(6 if kind in ("encoder", "attention") else 8, 3, bias=False)

    def forward(self, x):
        h = self.body(x, x, x) if self.kind == "attention" else self.body(x)
        h = h[0] if isinstance(h, tuple) else h
        return self.head(h.mean(dim=self.steps))


KINDS = {
    "lstm": (nn.LSTM, "body"),
    "gru": (nn.GRU, "body"),
    "rnn": (nn.RNN, "body"),
    "attention": ("attention", "body"),
    "encoder": ("encoder", "body"),
    "part of an encoder": ("encoder", "body.layers.0.linear1"),
}


@pytest.mark.parametrize("name", KINDS)
def test_sequences_first_as_long_as_the_batch_are_refused_by_name(name):
    kind, site = KINDS[name]
    model = Recurrent(kind, batch_first=False)
    network = turnover.attach(model, site)
    for steps in (4, 5):
        x = tiny.features(1, steps, 4, 6)[0]
        with (
            network.exposed(IDS),
            pytest.raises(BindingError, match=rf"'{site}'.*batch_first=True"),
        ):
            model(x)
        with network.mean():
            assert model(x).shape == (4, 3)
    # In scoring the rows of a batch are counted on axis 0.
    for steps in (4, 5):
        batch = turnover.Batch((tiny.features(1, steps, 4, 6)[0],), tiny.labels(steps))
        with pytest.raises((BindingError, turnover.InputError)):
            turnover.Influence(network, ghosts=20).estimate([batch], [1, 2])


@pytest.mark.parametrize("name", KINDS)
def test_the_batch_first_is_masked_by_rows_whatever_the_steps(name):
    kind, site = KINDS[name]
    model = Recurrent(kind, batch_first=True)
    network = turnover.attach(model, site)
    x = tiny.features(4, 4, 6)
    with network.exposed(IDS):
        together = model(x)
    for row in range(4):
        with network.exposed(IDS[row : row + 1]):
            torch.testing.assert_close(model(x[row : row + 1]), together[row : row + 1])


def test_a_layer_behind_one_with_sequences_first_is_masked():
    """The last step alone, or a model that turns its axes, has the batch first."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.act, self.head = nn.LSTM(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)

        def forward(self, x):
            return self.head(self.act(self.body(x.transpose(0, 1))[0].transpose(0, 1))).mean(dim=1)

    model = Last()
    network = turnover.attach(model, "act")
    with network.exposed(IDS):
        assert model(tiny.features(4, 4, 6)).shape == (4, 3)


def loss(model):
    def of_row(parameters, x, y):
        outputs = functional_call(model, parameters, (x[None],))
        return nn.functional.cross_entropy(outputs, y[None])

    return of_row


def test_gradients_of_rows_by_vmap_are_refused_where_rows_have_masks():
    model, x, y = tiny.mlp(), tiny.features(4), tiny.labels(4)
    network = turnover.attach(model, "mlp")
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    of_rows = vmap(grad(loss(model)), (None, 0, 0))
    for context in (network.exposed(IDS), network.hidden(IDS)):
        with context, pytest.raises(BindingError, match=r"'1'.*vmap"):
            of_rows(parameters, x, y)
    with network.without(17):
        found = of_rows(parameters, x, y)["0.weight"]
        alone = torch.stack(
            [grad(loss(model))(parameters, x[i], y[i])["0.weight"] for i in range(4)]
        )
    torch.testing.assert_close(found, alone)


def test_rows_within_vmap_that_are_as_long_as_the_batch_are_refused():
    model = tiny.mlp()
    network = turnover.attach(model, "mlp")
    with network.exposed(IDS), pytest.raises(BindingError, match="vmap"):
        vmap(model)(tiny.features(4, 4, 6))


@pytest.mark.parametrize("members", [2, 4])
def test_vmap_over_models_of_one_architecture_masks_the_rows_of_each(members):
    model, x = tiny.mlp(), tiny.features(4)
    network = turnover.attach(model, "mlp")
    scale = torch.arange(1, members + 1)
    stacked = {
        name: torch.stack([p.detach() * k for k in scale]) for name, p in model.named_parameters()
    }
    with network.exposed(IDS):
        found = vmap(lambda parameters: functional_call(model, parameters, (x,)))(stacked)
        for member in range(members):
            own = {name: value[member] for name, value in stacked.items()}
            torch.testing.assert_close(found[member], functional_call(model, own, (x,)))
    assert torch.equal(network.model[0].weight * 1, stacked["0.weight"][0])
