"""The wide head, and which sites carry the signal."""

import pytest
import torch
from torch import nn

import tiny
import turnover
from turnover import Influence, InputError, MaskSpec, WideHead, objectives
from turnover.tasks.sites import choose_sites


def test_head_is_linear_activation_site_and_linear_without_bias():
    torch.manual_seed(0)
    head = WideHead(6, 32, 3, gain=2.0)
    x = tiny.features(5)
    hidden = nn.functional.gelu(head.spread(x))
    assert torch.equal(head(x), hidden @ head.classify.weight.T)
    assert head.classify.bias is None
    network = turnover.attach(nn.ModuleDict({"head": head}), "head")
    assert network.sites == ["head.activation"]
    assert network.mask_units == 32


def test_a_head_made_on_no_device_is_drawn_from_the_generator_given():
    with torch.device("meta"):
        head = WideHead(50, 4096, 10)
    head.to_empty(device="cpu")
    before = torch.get_rng_state()
    head.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(0)
    usual = WideHead(50, 4096, 10)
    for name, value in usual.state_dict().items():
        drawn = head.state_dict()[name]
        assert drawn.std().item() == pytest.approx(value.std().item(), rel=0.05), name
        assert drawn.mean().item() == pytest.approx(value.mean().item(), abs=1e-3), name
    again = WideHead(50, 4096, 10)
    again.reset_parameters(torch.Generator().manual_seed(3))
    for name, value in again.state_dict().items():
        assert torch.equal(value, head.state_dict()[name]), name


def test_units_start_at_the_scale_that_gain_says():
    torch.manual_seed(0)
    head = WideHead(50, 4096, 2, gain=0.02)
    head.standardize(torch.randn(300, 50) * 7 + 3)
    unit_inputs = head.spread((torch.randn(100, 50) * 7 + 3 - head.centre) * head.scale)
    assert unit_inputs.std().item() == pytest.approx(0.02, rel=0.1)


def test_standardised_head_does_not_see_shift_and_scale():
    torch.manual_seed(0)
    head, x = WideHead(6, 16, 2), tiny.features(40)
    head.standardize(x)
    plain = head(x)
    head.standardize(x * 5 - 3)
    assert torch.allclose(head(x * 5 - 3), plain, atol=1e-5)


def test_standardisation_travels_with_the_weights_and_is_not_trained():
    head = WideHead(6, 16, 2)
    head.standardize(tiny.features(40) + 2)
    again = WideHead(6, 16, 2)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(tiny.features(3)), head(tiny.features(3)))
    assert {name for name, _ in head.named_parameters()} == {
        "spread.weight",
        "spread.bias",
        "classify.weight",
    }


@pytest.mark.parametrize("shape", [(1, 6), (4, 5), (6,)])
def test_features_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match="standardize needs features"):
        WideHead(6, 16, 2).standardize(torch.zeros(shape))


@pytest.mark.parametrize("arguments", [(0, 8, 2), (4, 0, 2), (4, 8, 0)])
def test_widths_below_one_are_refused(arguments):
    with pytest.raises(InputError, match=">= 1"):
        WideHead(*arguments)


def test_wider_heads_start_smaller_so_that_the_start_is_no_larger_share_of_the_noise():
    spreads = [WideHead(50, units, 2).spread.weight.std().item() for units in (512, 8192, 32768)]
    assert spreads[0] == pytest.approx(spreads[1], rel=0.05)
    assert spreads[2] == pytest.approx(spreads[1] / 2, rel=0.05)


def test_a_gain_of_zero_is_refused():
    with pytest.raises(InputError, match="gain"):
        WideHead(4, 8, 2, gain=0.0)


def test_a_small_start_tells_instances_apart_better_than_a_large_one():
    x, y, ids = tiny.features(200, 20), tiny.labels(200), torch.arange(200)
    z = {}
    for gain in (0.02, 5.0):
        torch.manual_seed(0)
        head = WideHead(20, 1024, tiny.CLASSES, gain=gain)
        network = turnover.attach(head, "activation")
        tiny.train(network, x, y, ids, epochs=60, rate=1e-3)
        z[gain] = Influence(network).self_influence([(x, y, ids)]).z.mean()
    assert z[0.02] > 2 * z[5.0]


def two_sites():
    network = turnover.attach(tiny.randomise(tiny.mlp()).eval(), "mlp", MaskSpec(0.3))
    return network, tiny.features(3), tiny.labels(3)


@pytest.mark.parametrize("method", ["exact", "linear"])
def test_scored_sites_are_flipped_and_the_others_run_whole(method):
    network, x, y = two_sites()
    ids = torch.arange(40)
    influence = Influence(network, objectives.margin, method, sites=["3"], ghosts=10)
    result = influence.estimate([(x, y)], ids)
    assert result.sites == ("3",)
    network.detach()
    alone = turnover.attach(network.model, "3", MaskSpec(0.3))
    expected = Influence(alone, objectives.margin, method, ghosts=10).estimate([(x, y)], ids)
    assert torch.allclose(
        torch.from_numpy(result.scores), torch.from_numpy(expected.scores), atol=1e-5
    )
    assert abs(result.scores).max() > 1e-3


def test_linear_scores_of_sites_add_up_to_those_of_all():
    network, x, y = two_sites()
    scores = [
        Influence(network, sites=sites, ghosts=10).estimate([(x, y)], range(30)).scores
        for sites in (["1"], ["3"], None)
    ]
    assert torch.allclose(
        torch.from_numpy(scores[0] + scores[1]), torch.from_numpy(scores[2]), atol=1e-5
    )


def test_an_unknown_scored_site_is_answered_with_those_there_are():
    network, _, _ = two_sites()
    with pytest.raises(InputError, match="no site of this network matches '7'"):
        Influence(network, sites=["7"])


def test_sites_are_taken_while_they_raise_signal_over_noise():
    sites = {
        "weak": {"signal": 1.1, "noise": 1.7},
        "strong": {"signal": 0.7, "noise": 0.1},
        "useful": {"signal": 0.3, "noise": 0.06},
    }
    assert choose_sites(sites) == ["strong", "useful"]
    assert choose_sites({"only": {"signal": -1.0, "noise": 1.0}}) == ["only"]


@pytest.mark.parametrize("spread", [0.0, 1e-4])
def test_a_feature_that_hardly_varies_in_the_sample_does_not_drown_the_others(spread):
    torch.manual_seed(0)
    head, sample = WideHead(6, 256, 2), tiny.features(40)
    sample[:, 2] = spread * sample[:, 2] + 1
    head.standardize(sample)
    usual = tiny.features(40, seed=5)
    usual[:, 2] = 1
    other = usual.clone()
    other[:, 2] = 2
    moved = (head(other) - head(usual)).std()
    assert moved < 10 * head(usual).std()
