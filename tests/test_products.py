"""Products of numbers and codes by integers, as a GPU computes them; integers are the same on the CPU."""

import logging

import pytest
import torch

from turnover import MaskSpec
from turnover.influence import linear, products
from turnover.influence.linear import LinearScorer
from turnover.influence.products import CodeProduct


def numbers(rows, draws, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, 1, generator=generator).exp() ** 3  # rows of other scales
    return torch.randn(rows, draws, generator=generator) * spread


def relative(found, expected):
    error = (found.double() - expected).abs().amax(dim=1)
    return float((error / expected.abs().amax(dim=1)).max())


@pytest.mark.parametrize(("rows", "draws", "ids"), [(1, 8, 1), (3, 40, 5), (40, 264, 70)])
def test_products_are_nearer_than_those_of_float32(rows, draws, ids):
    values = numbers(rows, draws)
    bits = torch.randint(256, (ids, draws // 8), dtype=torch.uint8)
    signs = linear._signs(bits).double()
    out = torch.empty(ids, rows)
    CodeProduct(values).into(bits, out.T)
    assert relative(out.T, values.double() @ signs.T) < 1e-6


def test_rows_of_one_large_number_and_of_zeros_are_right():
    values = torch.zeros(3, 512)
    values[0, 5], values[1] = 1e20, 1e-3
    values[1, 7] = 1e3
    bits = torch.randint(256, (900, 64), dtype=torch.uint8)
    out = torch.empty(3, 900)
    CodeProduct(values).into(bits, out)
    expected = values.double() @ linear._signs(bits).double().T
    assert relative(out[:2], expected[:2]) < 1e-5
    assert not out[2].any()


@pytest.mark.parametrize("keep", [0.5, 0.3])
@pytest.mark.parametrize("rows", [2, 70])
def test_scores_by_integers_are_linear_scores_whatever_the_block(keep, rows, monkeypatch):
    units = {"a": 33, "b": 200, "c": 1}
    values, ids = numbers(rows, 234), torch.arange(-20, 700) * 7919
    plain = LinearScorer(values, MaskSpec(keep), units)
    monkeypatch.setattr(linear, "usable", lambda _: True)
    scorer = LinearScorer(values, MaskSpec(keep), units)
    found = scorer.scores(ids)
    assert relative(found, plain.scores(ids).double()) < 1e-5
    assert torch.equal(scorer.by_id(ids).T, found)
    monkeypatch.setattr(linear, "_PRODUCT_IDS", 100)
    assert torch.equal(scorer.scores(ids), found)


def test_a_gpu_without_integer_products_computes_in_float32_and_the_log_says_so(
    monkeypatch, caplog
):
    assert not products.usable(torch.empty(2, 8))  # the CPU has its own way

    def fails(*_):
        raise RuntimeError("no such product")

    monkeypatch.setattr(torch, "_int_mm", fails)
    products._multiplies_integers.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert not products._multiplies_integers(torch.device("cpu"))
    products._multiplies_integers.cache_clear()
    assert "no such product" in caplog.text and "float32" in caplog.text
