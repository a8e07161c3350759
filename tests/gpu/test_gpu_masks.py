"""Masks on the GPU are those that were published, bit by bit, in every precision."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

import pinned
import turnover
from problems import perceptron
from turnover import MaskSpec

IDS = torch.tensor(pinned.PINNED_IDS)


@pytest.mark.parametrize(("options", "units", "expected"), pinned.PINNED)
def test_masks_are_the_published_ones(device, options, units, expected):
    spec, ids = MaskSpec(**options), IDS.to(device)
    mask = spec.exposed(ids, pinned.SITE, units)
    together = spec.at_sites(ids, {pinned.SITE: units, "other": 70})[pinned.SITE]
    assert mask.device == together.device == device
    for found in (mask, together):
        assert pinned.as_hex(found.cpu()) == expected.split()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("options", "units", "expected"), pinned.PINNED)
def test_modules_are_masked_alike_in_every_precision(device, dtype, options, units, expected):
    layer = nn.Linear(1, units)
    nn.init.zeros_(layer.weight)
    nn.init.ones_(layer.bias)
    model = nn.Sequential(OrderedDict(encoder=nn.Sequential(OrderedDict(fc1=layer))))
    network = turnover.attach(model.eval().to(device, dtype), ["encoder.fc1"], MaskSpec(**options))
    with torch.no_grad(), network.exposed(IDS):
        found = model(torch.zeros(len(IDS), 1, device=device, dtype=dtype))
    assert pinned.as_hex(found.cpu() != 0) == expected.split()
    scale = torch.tensor(1 / network.spec.keep).to(dtype)
    assert torch.equal(found.cpu(), (found.cpu() != 0) * scale)


def test_many_masks_are_those_of_the_cpu(device):
    ids = torch.randint(-(2**62), 2**62, (4000,))
    for spec in (MaskSpec(), MaskSpec(0.3, seed=9)):
        for units in (1, 100, 1025):
            here, there = (spec.packed(one, "site", units) for one in (ids, ids.to(device)))
            assert torch.equal(there.cpu(), here)


def test_sides_of_rows_are_those_of_the_cpu(device):
    network, batch = perceptron()
    ids, sides = torch.arange(len(batch)), torch.arange(len(batch)) % 3 == 0
    with torch.no_grad(), network.bind(ids, sides):
        here = batch.call(network.model)
    network.model.to(device)
    there = batch.to(device)
    for moved in ((ids, sides), (ids.to(device), sides.to(device))):
        with torch.no_grad(), network.bind(*moved):
            found = there.call(network.model)
        torch.testing.assert_close(found.cpu(), here, rtol=1e-5, atol=1e-5)
