"""Predictions of training instances by the networks that never learned them."""

import numpy as np
import pytest
import torch
from torch import nn

import tiny
import turnover
from turnover import Batch, InputError, MaskSpec, hidden_predictions


def trained(units: int = 512, rows: int = 60, steps: int = 40, noise: bool = True, keep=None):
    """A wide head that learns random labels (all it says of them, it has by heart), or a rule."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), turnover.WideHead(6, units, 3))
    x = tiny.features(rows)
    y = tiny.labels(rows) if noise else (x[:, :3].argmax(dim=1))
    network = turnover.attach(model, "head", MaskSpec(seed=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    ids = torch.arange(rows) * 7
    if keep is not None:
        x, y, ids = x[keep], y[keep], ids[keep]
    for _ in range(steps):
        with network.exposed(ids):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return network, x, y, ids


def accuracy(probabilities, labels):
    return float((probabilities.argmax(axis=1) == labels.numpy()).mean())


def test_they_are_those_of_the_hidden_networks_in_the_order_of_the_batches():
    network, x, y, ids = trained()
    parts = [Batch(x[rows], y[rows], ids[rows]) for rows in torch.randperm(60).split(17)]
    found = hidden_predictions(network, parts)
    assert found.temperature == 1
    assert found.probabilities.shape == (60, 3) and found.probabilities.dtype == np.float32
    order = torch.cat([part.ids for part in parts])
    assert found.train_ids.tolist() == order.tolist()
    for row in (0, 30, 59):
        with network.without(int(order[row])), torch.no_grad():
            alone = network.model(x[order[row] // 7][None]).softmax(dim=1)[0]
        assert np.allclose(found.probabilities[row], alone.numpy(), atol=1e-6)
    assert np.allclose(found.probabilities.sum(axis=1), 1, atol=1e-6)


def test_what_was_learned_by_heart_they_do_not_know():
    network, x, y, ids = trained(units=4096)
    with network.exposed(ids), torch.no_grad():
        exposed = network.model(x).softmax(dim=1).numpy()
    found = hidden_predictions(network, [(x, y, ids)])
    assert accuracy(exposed, y) > 0.95
    assert accuracy(found.probabilities, y) < 0.6


@pytest.mark.parametrize("rows", [60, 300])
def test_calibrated_they_know_what_a_network_trained_without_the_instance_knows(rows):
    network, x, y, ids = trained(4096, rows, 20, noise=False)
    held_out = tiny.features(400, seed=5)
    labels = held_out[:, :3].argmax(dim=1)
    folds = torch.arange(rows) % 10
    refitted = torch.empty(rows, 3)
    for fold in range(10):
        left = folds != fold
        other, *_ = trained(4096, rows, 20, noise=False, keep=left)
        with torch.no_grad():
            refitted[~left] = other.model(x[~left]).softmax(dim=1)
    plain = hidden_predictions(network, [(x, y, ids)])
    found = hidden_predictions(network, [(x, y, ids)], [(held_out, labels)])
    assert 0 < found.exposed_share < 0.5
    wanted = accuracy(refitted.numpy(), y)
    assert accuracy(plain.probabilities, y) < wanted - 0.05
    assert abs(accuracy(found.probabilities, y) - wanted) < 0.05

    # And row by row, not only in the mean.
    def of_label(probabilities):
        return np.log(probabilities[np.arange(rows), y.numpy()])

    agree = np.corrcoef(of_label(found.probabilities), of_label(refitted.numpy()))[0, 1]
    assert agree > 0.8


def test_calibrated_training_rows_have_the_loss_of_held_out_ones():
    network, x, y, ids = trained(2048, 100, 20, noise=False)
    held_out = tiny.features(400, seed=5)
    labels = held_out[:, :3].argmax(dim=1)
    found = hidden_predictions(network, [(x, y, ids)], [(held_out, labels)])
    with network.hidden(turnover.ghost_ids(400, start=2**33)), torch.no_grad():
        logits = network.model(held_out) / found.temperature
    own = -np.log(found.probabilities[np.arange(100), y.numpy()]).mean()
    assert own == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-3)


def test_the_temperature_brings_them_to_the_confidence_of_the_whole_network():
    network, x, y, ids = trained(units=256)
    held_out = tiny.features(400, seed=5)
    labels = tiny.labels(400, seed=5)
    parts = [(held_out[:150], labels[:150]), (held_out[150:], labels[150:])]
    found = hidden_predictions(network, [(x, y, ids)], parts)
    assert found.temperature != 1

    def divergence(temperature):
        ghosts = turnover.ghost_ids(400, start=2**33)
        with torch.no_grad():
            with network.hidden(ghosts):
                said = (network.model(held_out) / temperature).log_softmax(dim=1)
            whole = network.model(held_out).softmax(dim=1)
        return float(nn.functional.kl_div(said, whole, reduction="batchmean"))

    best = divergence(found.temperature)
    assert best < divergence(1)
    assert best <= divergence(found.temperature * 1.02)
    assert best <= divergence(found.temperature / 1.02)


def test_the_model_keeps_its_mode_and_the_global_generator_its_state():
    network, x, y, ids = trained()
    network.model.train()
    before = torch.get_rng_state()
    hidden_predictions(network, [(x, y, ids)], [(x, y)])
    assert network.model.training
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("batches", "held_out", "said"),
    [
        ([], None, "no training batches"),
        ([(tiny.features(4),)], None, "need the ids"),
        ([(tiny.features(2), None, torch.tensor([1, -1]))], None, "ghosts"),
        ([(tiny.features(2), None, torch.tensor([1, 2]))], [], "no held-out"),
        ([(tiny.features(2), None, torch.tensor([1, 2]))], [(tiny.features(2),)], "has none"),
        (
            [(tiny.features(2), None, torch.tensor([1, 2]))],
            [(tiny.features(2), tiny.labels(2))],
            "has none",
        ),
        ([(torch.full((2, 6), torch.nan), None, torch.tensor([1, 2]))], None, "not finite"),
    ],
)
def test_bad_input_is_named(batches, held_out, said):
    network, *_ = trained(steps=1)
    with pytest.raises(InputError, match=said):
        hidden_predictions(network, batches, held_out)


def test_models_without_logits_are_refused():
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 1, bias=False)).eval()
    network = turnover.attach(model, "mlp")
    with pytest.raises(InputError, match="classifier's logits"):
        hidden_predictions(network, [(tiny.features(2), None, torch.tensor([1, 2]))])


def test_modules_keep_modes_of_their_own():
    network, x, y, ids = trained()
    network.model.train()
    network.model[0].eval()
    hidden_predictions(network, [(x, y, ids)])
    assert network.model.training and not network.model[0].training


def test_with_another_share_kept_the_whole_network_is_the_limit():
    torch.manual_seed(0)
    model = nn.Sequential(turnover.WideHead(6, 512, 3)).eval()
    network = turnover.attach(model, "head", MaskSpec(keep=0.3, balanced=False))
    nn.init.normal_(model[0].classify.weight)
    x, ids, ghosts = tiny.features(200), torch.arange(200), turnover.ghost_ids(200, start=2**33)
    with torch.no_grad():
        with network.exposed(ids):
            learned = model(x).argmax(dim=1)
        with network.hidden(ghosts):
            known = model(x).argmax(dim=1)
    # Held-out rows cost nearly nothing, so training rows are given as much as there is.
    found = hidden_predictions(network, [(x, learned, ids)], [(x, known)])
    assert found.exposed_share == pytest.approx(0.3)
