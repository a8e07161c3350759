"""The benchmark of data values: its methods, its judgments and its tables."""

import json

import numpy as np
import pytest
import torch
from benchmarks.valuation import run, table

from turnover.evaluation import mislabel


@pytest.fixture
def opendataval():
    """OpenDataVal's models, where it is installed."""
    pytest.importorskip(
        "opendataval", reason="pip install --no-deps opendataval==1.3.0, in its own environment"
    )
    from opendataval import model

    return model


@pytest.mark.parametrize(
    ("method", "low", "high"),
    [
        ("LossVal, 5 epochs", 0.8, 1.0),
        ("mean margin (AUM)", 0.8, 1.0),
        ("turn-over, self", 0.8, 1.0),
        ("random", 0.35, 0.65),
    ],
)
def test_a_cell_is_judged_by_the_noise_that_was_planted(opendataval, method, low, high):
    found = run.judge(method, "breast_cancer", "labels", 0)
    assert low < found["auc"] <= high
    assert len(found["found"]) == run.BINS + 1 and found["found"][-1] == 1.0
    assert len(found["without_low"]) == len(found["without_high"]) == run.BINS
    assert found["without_low"][0] > 0.8  # nothing removed yet
    assert "without_low" not in run.judge(method, "breast_cancer", "features", 0)


@pytest.mark.parametrize("seed", range(3))
def test_lossval_gives_wrong_labels_less_weight(opendataval, seed):
    from benchmarks.valuation.evaluators import LossVal

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 8, generator=generator)
    right, wrong = (x[:, 0] > 0).long(), torch.arange(200) % 10 == 3
    labels = right.clone()
    labels[:200][wrong] = 1 - right[:200][wrong]
    hot = torch.eye(2)[labels]
    torch.manual_seed(seed)
    model = opendataval.ClassifierMLP(8, 2, layers=3)
    before = [one.clone() for one in model.parameters()]
    evaluator = LossVal(epochs=10).input_data(x[:200], hot[:200], x[200:], hot[200:])
    values = evaluator.input_model(model).train_data_values().evaluate_data_values()
    assert values.shape == (200,) and values.dtype == np.float32
    assert mislabel(-values, wrong.numpy()).auc > 0.75
    for one, kept in zip(before, evaluator.pred_model.parameters(), strict=True):
        assert torch.equal(one, kept)


def test_committed_figures_are_those_of_the_page():
    results = json.loads(run.RESULTS.read_text())["results"]
    page = table.DOCS.read_text()
    for content in table.tables(results).values():
        assert content.strip() in page
    assert set(results) == set(run.jobs())
