"""A plain Accelerate loop: attach, and one ``with``."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import tiny
import turnover

accelerate = pytest.importorskip("accelerate", reason="pip install 'turnover[text]'")

ROWS = 8


@pytest.fixture(autouse=True)
def _own_state():
    """Accelerate keeps the settings of its first accelerator for the whole process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def model():
    return tiny.randomise(tiny.mlp(32))


def by_hand(one, steps):
    network = turnover.attach(one, "mlp")
    optimizer = torch.optim.SGD(one.parameters(), lr=0.05)
    for _ in range(steps):
        with network.exposed(range(ROWS)):
            loss = cross_entropy(one(tiny.features(ROWS)), tiny.labels(ROWS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return one


def looped(one, ids=None, *, steps=3, size=ROWS, **settings):
    """The user's loop; ids are a column of the data."""
    data = TensorDataset(
        tiny.features(ROWS), tiny.labels(ROWS), torch.arange(ROWS) if ids is None else ids
    )
    accelerator = accelerate.Accelerator(cpu=True, **settings)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.05)
    loader = DataLoader(data, size, shuffle=True)
    network = turnover.attach(one, "mlp")
    prepared, optimizer, loader = accelerator.prepare(one, optimizer, loader)
    prepared.train()
    for _ in range(steps):
        for inputs, labels, rows in loader:
            with accelerator.accumulate(prepared), network.exposed(rows):
                accelerator.backward(cross_entropy(prepared(inputs), labels))
                optimizer.step()
                optimizer.zero_grad()
    return network, optimizer, accelerator


@pytest.mark.parametrize("accumulated", [1, 4])
def test_an_accelerate_loop_learns_what_a_loop_without_it_learns(accumulated):
    one = model()
    expected = by_hand(copy.deepcopy(one), 3)
    looped(one, size=ROWS // accumulated, gradient_accumulation_steps=accumulated)
    for value, other in zip(one.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-6)


def test_masks_are_the_same_bits_under_autocast():
    """All rows are one instance, so what its mask drops stays as it was, bit for bit."""
    one = model()
    before = copy.deepcopy(one.state_dict())
    ids = torch.full((ROWS,), 2**53 + 1)
    network, _, accelerator = looped(one, ids, mixed_precision="bf16")
    with accelerator.autocast():
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    for site, layer in (("1", "0"), ("3", "2")):
        kept = network.spec.exposed(ids[:1], site, 32)[0]
        for name in (f"{layer}.weight", f"{layer}.bias"):
            after = one.state_dict()[name]
            assert torch.equal(after[~kept], before[name][~kept])
            assert not torch.equal(after[kept], before[name][kept])


def test_the_audit_takes_what_accelerate_made_of_the_loop():
    """The optimiser is told by what Accelerate wraps; clipping is a call that only the loop knows of."""
    network, optimizer, _ = looped(model(), steps=1)
    assert network.audit((tiny.features(ROWS),), optimizer=optimizer).settings == ()
    odd = torch.optim.Rprop(network.model.parameters())
    wrapped = accelerate.Accelerator(cpu=True).prepare(odd)
    assert "Rprop" in str(network.audit((tiny.features(ROWS),), optimizer=wrapped))
    clipped = network.audit((tiny.features(ROWS),), optimizer=optimizer, max_grad_norm=1.0)
    assert "global norm" in str(clipped) and not clipped.clean


@pytest.mark.parametrize("clipped", [False, True])
def test_clipping_by_global_norm_moves_what_an_instance_drops(clipped):
    """Unclipped, nothing of an instance reaches what it drops; clipped, its label shows there."""

    def moved(label_of_one):
        one = model()
        network = turnover.attach(one, "mlp")
        accelerator = accelerate.Accelerator(cpu=True)
        optimizer = accelerator.prepare(torch.optim.SGD(one.parameters(), lr=0.05))
        with network.exposed([0, 1]):
            loss = cross_entropy(one(tiny.features(2)), torch.tensor([0, label_of_one]))
            accelerator.backward(loss)
        if clipped:
            accelerator.clip_grad_norm_(one.parameters(), 0.1)
        optimizer.step()
        dropped = ~network.spec.exposed([1], "3", 32)[0]
        return one[4].weight[:, dropped].detach()

    assert torch.equal(moved(1), moved(2)) is not clipped
