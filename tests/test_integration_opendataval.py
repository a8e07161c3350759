"""OpenDataVal's experiments take our evaluator as they take its own."""

import numpy as np
import pytest
import torch

import digits as data
from turnover import Influence, InputError

pytest.importorskip(
    "opendataval", reason="pip install --no-deps opendataval==1.3.0, in its own environment"
)

from opendataval.dataloader import DataFetcher
from opendataval.dataval.api import DataEvaluator
from opendataval.experiment.exper_methods import discover_corrupted_sample, noisy_detection
from opendataval.model import ClassifierMLP

from turnover.evaluation import mislabel
from turnover.integrations.opendataval import TurnoverEvaluator

FIT = {"epochs": 40, "lr": 3e-3}


@pytest.fixture(scope="module")
def digits():
    return data.load()


@pytest.fixture(scope="module")
def fetcher(digits):
    def hot(y):
        return torch.nn.functional.one_hot(y, 10).float()

    test = (digits.test_x.numpy(), hot(digits.test_y).numpy())
    fetcher = DataFetcher.from_data_splits(
        digits.x.numpy(), hot(digits.y).numpy(), *test, *test, one_hot=False
    )
    fetcher.one_hot = True
    fetcher.noisy_train_indices = digits.wrong.nonzero().flatten().numpy()
    return fetcher


def masked(pred_model, x, y):
    """Turn-over dropout in the place of the network that OpenDataVal gives."""
    given = data.Digits(x, y.argmax(dim=1), x[:0], x[:0], x[:0])
    return Influence(data.masked(given, torch.arange(len(x))))


@pytest.mark.parametrize(
    ("train", "values"), [(None, "validation"), (None, "self"), (masked, "self")]
)
def test_corrupted_instances_have_low_values(fetcher, digits, train, values):
    torch.manual_seed(0)
    model = ClassifierMLP(64, 10, layers=3, hidden_dim=64)
    given = {} if train is None else {"train": train}
    evaluator = TurnoverEvaluator(values=values, **given)
    assert isinstance(evaluator, DataEvaluator)
    evaluator.train(fetcher, model, **({} if train else FIT))
    for before, after in zip(model.parameters(), evaluator.pred_model.parameters(), strict=True):
        assert torch.equal(before, after)  # remove_high_low begins from it
    found = evaluator.data_values
    assert found.shape == (data.ROWS,) and found.dtype == np.float32
    assert mislabel(-found, digits.wrong.numpy(), at=[24]).auc > 0.7
    assert noisy_detection(evaluator, fetcher)["kmeans_f1"] > 0.2
    discovered = discover_corrupted_sample(evaluator, fetcher, percentile=0.1)
    assert discovered["corrupt_found"][3] > 0.6


def test_what_gives_no_values_is_refused(fetcher):
    from opendataval.model import ClassifierSkLearnWrapper
    from sklearn.linear_model import LogisticRegression

    with pytest.raises(InputError, match="validation, self"):
        TurnoverEvaluator(values="test")
    plain = ClassifierSkLearnWrapper(LogisticRegression, 10)
    with pytest.raises(InputError, match="torch model"):
        TurnoverEvaluator().train(fetcher, plain)
    regression = TurnoverEvaluator(masked).input_data(*(torch.zeros(4, 1) for _ in range(4)))
    regression.pred_model = None
    with pytest.raises(InputError, match="one-hot"):
        regression.train_data_values()


def test_the_page_shows_what_runs(digits):
    assert data.shown("opendataval", digits)["values"].shape == (data.ROWS,)
