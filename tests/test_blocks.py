"""Blocks: parallel networks as the units of turn-over dropout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import turnover
from turnover import Blocks, InputError, MaskSpec


def alone(model: Blocks, block: int, inputs: torch.Tensor) -> torch.Tensor:
    """What one block computes, layer by layer."""
    values = inputs
    for layer, (weight, bias) in enumerate(zip(model.weights, model.biases, strict=True)):
        values = values @ weight[block] + bias[block]
        if layer < len(model.weights) - 1:
            if len(model.gains):
                values = functional.layer_norm(values, values.shape[-1:])
                values = values * model.gains[layer][block] + model.shifts[layer][block]
            values = torch.relu(values)
    return values


@settings(max_examples=25, deadline=None)
@given(
    features=st.integers(1, 6),
    hidden=st.lists(st.integers(1, 9), max_size=3),
    outputs=st.integers(1, 4),
    blocks=st.integers(1, 7),
    rows=st.integers(1, 5),
    norm=st.booleans(),
)
def test_blocks_agree_with_a_loop_over_them(features, hidden, outputs, blocks, rows, norm):
    torch.manual_seed(0)
    model = Blocks(features, hidden, outputs, blocks=blocks, norm=norm)
    for one in (*model.gains, *model.shifts):
        nn.init.normal_(one)
    inputs = torch.randn(rows, features)
    wanted = torch.stack([alone(model, block, inputs) for block in range(blocks)], dim=1)
    torch.testing.assert_close(model.each(inputs), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(inputs), wanted.mean(dim=1), atol=1e-5, rtol=1e-4)
    many = torch.randn(blocks * rows, features)
    own = [alone(model, block, many[block * rows : (block + 1) * rows]) for block in range(blocks)]
    torch.testing.assert_close(model.apart(many), torch.cat(own), atol=1e-5, rtol=1e-4)


def test_the_preset_masks_whole_blocks_and_the_output_is_the_mean_of_those_kept():
    model = Blocks(3, [5], 2, blocks=16).eval()
    spec = MaskSpec(keep=0.8, seed=3)
    network = turnover.attach(model, "blocks", spec)
    assert network.sites == ["each_output"] and network.units == {"each_output": 16}
    inputs, ids = torch.randn(4, 3), torch.arange(4)
    kept = spec.exposed(ids, "each_output", 16)
    each = model.each(inputs)
    for context, sides in ((network.exposed(ids), kept), (network.hidden(ids), ~kept)):
        wanted = torch.stack([each[row][side].mean(dim=0) for row, side in enumerate(sides)])
        with context:
            torch.testing.assert_close(model(inputs), wanted)
    torch.testing.assert_close(model(inputs), each.mean(dim=1))


def test_blocks_inside_a_model_are_found_by_the_preset():
    model = nn.ModuleDict({"value": Blocks(3, [4], 1, blocks=4), "policy": Blocks(3, [4], 2)})
    assert turnover.attach(model, "blocks").sites == ["value.each_output", "policy.each_output"]


def test_a_row_without_any_kept_block_is_nan():
    model = Blocks(3, [4], 1, blocks=1).eval()
    network = turnover.attach(model, "blocks", MaskSpec(keep=0.8))
    ids = torch.arange(20)
    kept = network.spec.exposed(ids, "each_output", 1)[:, 0]
    with network.hidden(ids):
        assert torch.equal(model(torch.randn(20, 3)).isnan()[:, 0], kept)


def test_training_exposed_leaves_the_hidden_blocks_without_gradient():
    model = Blocks(3, [4, 4], 1, blocks=12)
    network = turnover.attach(model, "blocks", MaskSpec(keep=0.5, seed=1))
    with network.exposed([7]):
        model(torch.randn(1, 3)).sum().backward()
    kept = network.spec.exposed([7], "each_output", 12)[0]
    for parameter in model.parameters():
        learned = parameter.grad.reshape(12, -1).any(dim=1)
        assert not learned[~kept].any()
    assert model.biases[-1].grad.reshape(12)[kept].all()
    report = network.audit({"inputs": torch.randn(4, 3), "ids": torch.arange(4)})
    assert report.clean


def test_rows_apart_reach_only_their_own_block():
    model = Blocks(3, [4], 1, blocks=4)
    inputs = torch.randn(8, 3)
    model.apart(inputs)[2:4].sum().backward()
    for parameter in model.parameters():
        assert not parameter.grad[[0, 2, 3]].any()
    assert model.weights[0].grad[1].any()


def test_weights_come_from_the_generator_that_is_given():
    one, other = (Blocks(3, [4], 1) for _ in range(2))
    for model in (one, other):
        model.reset_parameters(torch.Generator().manual_seed(4))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Blocks(0, [4], 1),
        lambda: Blocks(3, [0], 1),
        lambda: Blocks(3, [4], 1.5),
        lambda: Blocks(3, [4], 1, blocks=0),
        lambda: Blocks(3, [4], 1, blocks=3).apart(torch.zeros(4, 3)),
    ],
)
def test_bad_sizes_are_refused_by_name(make):
    with pytest.raises(InputError, match="Blocks"):
        make()
