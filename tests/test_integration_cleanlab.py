"""cleanlab takes the hidden networks' predictions for those of k-fold training."""

import numpy as np
import pytest
import torch

import digits as data
import turnover
from turnover import InputError

pytest.importorskip("cleanlab", reason="pip install cleanlab==2.9.0")

from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores

from turnover.evaluation import mislabel
from turnover.integrations.cleanlab import label_issues, labels_and_pred_probs

IDS = torch.arange(data.ROWS) * 7 + 5


@pytest.fixture(scope="module")
def digits():
    return data.load()


@pytest.fixture(scope="module")
def network(digits):
    return data.masked(digits, IDS)


@pytest.fixture(scope="module")
def batches(digits):
    parts = (part.split(100) for part in (digits.x, digits.y, IDS))
    return list(zip(*parts, strict=True))


def test_quality_scores_are_low_where_labels_are_wrong(digits, network, batches):
    labels, probabilities = labels_and_pred_probs(network, batches)
    assert np.array_equal(labels, digits.y) and probabilities.shape == (data.ROWS, 10)
    quality = get_label_quality_scores(labels, probabilities)
    assert 0 <= quality.min() <= quality.max() <= 1
    assert mislabel(-quality, digits.wrong.numpy(), at=[24]).auc > 0.9


@pytest.fixture(scope="module")
def held(digits):
    return [(digits.test_x, digits.test_y)]


def test_issues_are_cleanlabs_and_indexed_by_id(digits, network, batches, held):
    issues = label_issues(network, batches, held)
    labels, probabilities = labels_and_pred_probs(network, batches, held)
    assert issues.index.tolist() == IDS.tolist() and issues.index.name == "id"
    assert set(issues) == {"is_label_issue", "label_quality", "given_label", "predicted_label"}
    direct = get_label_quality_scores(labels, probabilities)
    np.testing.assert_allclose(issues["label_quality"], direct, atol=1e-6)
    flagged = issues["is_label_issue"].to_numpy()
    wrong = digits.wrong.numpy()
    assert wrong[flagged].mean() > 0.6 and flagged[wrong].mean() > 0.6
    uncalibrated = find_label_issues(*labels_and_pred_probs(network, batches))
    assert wrong[uncalibrated].mean() < wrong[flagged].mean()


def test_held_out_rows_calibrate(network, batches, held):
    _, probabilities = labels_and_pred_probs(network, iter(batches), held)
    direct = turnover.hidden_predictions(network, batches, held).probabilities
    assert np.array_equal(probabilities, direct)
    _, plain = labels_and_pred_probs(network, batches)
    assert not np.array_equal(probabilities, plain)


def test_a_users_adapter_is_asked(digits, network, batches):
    named = [{"image": x, "digit": y, "row": ids} for x, y, ids in batches]

    def adapter(batch):
        return turnover.Batch(batch["image"], batch["digit"], batch["row"])

    labels, probabilities = labels_and_pred_probs(network, named, named, adapter=adapter)
    direct = labels_and_pred_probs(network, batches, batches)
    assert np.array_equal(labels, direct[0]) and np.array_equal(probabilities, direct[1])


def test_datalab_takes_them(network, batches, held):
    pytest.importorskip("datasets", reason="pip install datasets")
    from cleanlab import Datalab

    labels, probabilities = labels_and_pred_probs(network, batches, held)
    lab = Datalab({"digit": labels.tolist()}, label_name="digit", verbosity=0)
    lab.find_issues(pred_probs=probabilities, issue_types={"label": {}})
    issues = lab.get_issues("label")
    ours = label_issues(network, batches, held)
    assert issues["is_label_issue"].tolist() == ours["is_label_issue"].tolist()


def test_batches_without_labels_are_refused(digits, network):
    with pytest.raises(InputError, match="judges labels"):
        labels_and_pred_probs(network, [turnover.Batch(digits.x, ids=IDS)])


def test_the_page_shows_what_runs(digits):
    left = data.shown("cleanlab", digits)
    assert len(left["issues"]) == len(left["quality"]) == data.ROWS
