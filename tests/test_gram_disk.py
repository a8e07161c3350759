"""Gram on disk: gradients that do not fit in memory, and conjugate gradients in place of a factor."""

import gc
import tempfile

import numpy as np
import pytest
from scipy import stats

import tiny
from test_gram import cut, problem
from test_gram_gradients import build
from turnover import Influence, objectives
from turnover.influence.gram import iterative
from turnover.influence.gram import kernel as kernel_module
from turnover.influence.gram.disk import Limits


def limited(model, objective=objectives.margin, **limits):
    influence = Influence(model, objective, "gram")
    influence._driver._limits = Limits(**limits)
    return influence


@pytest.mark.parametrize("name", ["mlp", "convs of every kind", "bert"])
def test_gradients_on_disk_are_those_in_memory(name, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(kernel_module, "_ROWS", 3)
    model, batch = build(name)
    memory = Influence(model, method="gram").fit(cut(batch, 2))
    disk = limited(model, memory=0).fit(cut(batch, 2))
    assert list(tmp_path.rglob("*.npy"))
    tiny.assert_same(memory.estimate([batch]), disk.estimate([batch]))
    del disk
    gc.collect()
    assert not list(tmp_path.glob("turnover-gram-*"))


@pytest.mark.parametrize("landmarks", [10, 80, 1000])  # of 240 rows, two for each instance
def test_conjugate_gradients_on_disk_are_the_factored_solve(landmarks, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(iterative, "_PANEL", 4 * 120 * 16)
    model, train, targets = problem(120)
    exact = Influence(model, method="gram").fit(cut(train, 50))
    other = limited(model, rows=100, landmarks=landmarks).fit(cut(train, 50))
    assert list(tmp_path.rglob("*.npy"))
    for call in (lambda one: one.estimate([targets]), lambda one: one.aggregate([targets])):
        wanted, found = call(exact), call(other)
        atol = 1e-4 * np.abs(wanted.scores).max()
        np.testing.assert_allclose(found.scores, wanted.scores, atol=atol)
        np.testing.assert_allclose(found.standard_error, wanted.standard_error, rtol=0.25)
    wanted, found = exact.self_influence(), other.self_influence()
    assert stats.pearsonr(wanted.scores, found.scores).statistic > 0.9
    if landmarks > 240:
        np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-3)
