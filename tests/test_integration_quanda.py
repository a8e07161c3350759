"""quanda's metrics take our explainer as they take its own."""

import numpy as np
import pytest
import torch

import digits as data
import turnover
from turnover import Influence, InputError

pytest.importorskip("quanda", reason="pip install quanda==0.5.0 omegaconf, in its own environment")

from quanda.explainers.base import Explainer
from quanda.metrics.downstream_eval import ClassDetectionMetric, MislabelingDetectionMetric
from quanda.metrics.heuristics import ModelRandomizationMetric

from turnover.integrations.quanda import TurnoverExplainer

IDS = torch.arange(data.ROWS) * 7 + 5


@pytest.fixture(scope="module")
def digits():
    return data.load()


@pytest.fixture(scope="module")
def model(digits):
    return data.plain(digits)


@pytest.fixture(scope="module")
def network(digits):
    return data.masked(digits, IDS)


def test_gram_explains_and_detects_classes(digits, model):
    explainer = TurnoverExplainer(model, digits.train)
    assert isinstance(explainer, Explainer)
    scores = explainer.explain(digits.test_x, digits.test_y)
    assert scores.shape == (data.TESTS, data.ROWS)
    influence = Influence(model, method="gram").fit([(digits.x, digits.y)])
    direct = influence.estimate([(digits.test_x, digits.test_y)]).scores
    np.testing.assert_allclose(scores.numpy(), direct, rtol=1e-3, atol=1e-5)
    metric = ClassDetectionMetric(model, digits.train, s=5)
    metric.update(scores, digits.test_y)
    assert metric.compute()["score"] > 0.5


def test_turn_over_finds_mislabels_by_quandas_metric(digits, network):
    def influence(_model):
        return Influence(network, turnover.objectives.cross_entropy, method="exact")

    scores = []
    for options in ({}, {"influence": influence, "train_ids": IDS}):
        metric = MislabelingDetectionMetric(
            network.model,
            digits.train,
            digits.wrong.nonzero().flatten().tolist(),
            explainer_cls=TurnoverExplainer,
            expl_kwargs=options,
        )
        scores.append(float(metric.compute()["score"]))
    assert min(scores) > 0.8


def test_turn_over_scores_are_those_of_the_estimator(digits, network):
    explainer = TurnoverExplainer(
        network.model, digits.train, influence=lambda _: Influence(network), train_ids=IDS
    )
    targets = [(digits.test_x, digits.test_y)]
    direct = Influence(network).estimate(targets, IDS).scores
    assert np.array_equal(explainer.explain(digits.test_x, digits.test_y.tolist()), direct)
    with pytest.raises(InputError, match="train_ids="):
        TurnoverExplainer(
            network.model, digits.train, influence=lambda _: Influence(network)
        ).explain(digits.test_x, digits.test_y)


def test_a_randomised_network_is_explained_otherwise(digits, model, tmp_path):
    path, folder = str(tmp_path / "weights.pt"), str(tmp_path)
    torch.save(model.state_dict(), path)
    metric = ModelRandomizationMetric(
        model, "digits", folder, digits.train, path, TurnoverExplainer
    )
    scores = TurnoverExplainer(model, digits.train).explain(digits.test_x, digits.test_y)
    metric.update(scores, digits.test_x, digits.test_y)
    assert abs(float(metric.compute()["score"])) < 0.6


def test_the_last_checkpoint_is_explained(digits, model, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    fresh = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    explainer = TurnoverExplainer(fresh, digits.train, checkpoints=[str(path)])
    wanted = TurnoverExplainer(model, digits.train).explain(digits.test_x, digits.test_y)
    assert torch.equal(explainer.explain(digits.test_x, digits.test_y), wanted)


def test_the_page_shows_what_runs(digits):
    assert float(data.shown("quanda", digits)["metric"].compute()["score"]) > 0.5
