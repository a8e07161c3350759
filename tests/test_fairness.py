"""Gaps between groups, the rows behind them, and what removing or relabeling those rows does."""

import numpy as np
import pytest
import torch

from turnover import Batch, Influence, InputError, objectives
from turnover.fairness import GAPS, gap_influence, gaps

pytest.importorskip("sklearn")
from turnover.integrations.sklearn import TurnoverClassifier

ROWS, HELD, FLIPPED = 400, 600, 0.4


def table(rows, seed):
    """Two columns decide the label; the third is the group, which does not."""
    random = np.random.default_rng(seed)
    group = (random.random(rows) < 0.5).astype(int)
    x = np.column_stack([random.normal(size=(rows, 2)), group])
    return x, (x[:, 0] + x[:, 1] + 0.5 * random.normal(size=rows) > 0).astype(int), group


class Unfair:
    """A classifier of rows of which positive labels of group 0 were flipped."""

    def __init__(self):
        self.x, self.clean, group = table(ROWS, 0)
        self.flipped = (group == 0) & (self.clean == 1)
        self.flipped &= np.random.default_rng(1).random(ROWS) < FLIPPED
        self.y = np.where(self.flipped, 0, self.clean)
        self.held, self.held_y, self.held_group = table(HELD, 2)
        self.model = self.trained(self.x, self.y)

    def trained(self, x, y):
        return TurnoverClassifier(1024, random_state=0).fit(x, y)

    def gap(self, model, among=None):
        """Of mean probabilities, group 1's minus group 0's."""
        p = model.predict_proba(self.held)[:, 1]
        rows = np.ones(HELD, dtype=bool) if among is None else among
        return p[rows & (self.held_group == 1)].mean() - p[rows & (self.held_group == 0)].mean()

    @property
    def targets(self):
        inputs = torch.from_numpy(self.model.encoder_.transform(self.held)).float()
        batch = Batch(inputs, torch.from_numpy(self.held_y))
        return [batch.rows(0, 250), batch.rows(250, HELD)]

    def scores(self, method, **options):
        influence = Influence(self.model.network_, method=method, ghosts=200)
        if method == "gram":
            influence.fit([self.model.train_batch_])
        ids = torch.from_numpy(self.model.ids_)
        return gap_influence(influence, self.targets, self.held_group, ids, **options)


@pytest.fixture(scope="module")
def unfair():
    return Unfair()


def test_gaps_are_differences_of_rates():
    predicted = ["yes", "yes", "no", "no", "yes", "no", "no", "no"]
    labels = ["yes", "yes", "yes", "no", "yes", "yes", "no", "no"]
    found = gaps(predicted, labels, list("aaaabbbb"), positive="yes")
    assert found.demographic_parity.rates == {"a": 0.5, "b": 0.25}
    assert found.demographic_parity.value == 0.25
    assert found.equal_opportunity.rates == pytest.approx({"a": 2 / 3, "b": 1 / 2})
    assert found.equal_opportunity.rows == {"a": 3, "b": 2}
    assert found.equalized_odds == found.equal_opportunity  # 0 among the others
    assert found.accuracy == 0.75
    turned = gaps(predicted, labels, list("bbbbaaaa"), positive="yes")
    assert turned.demographic_parity.value == 0.25
    assert found.to_dict()["demographic_parity"]["rates"]["b"] == 0.25


def test_interval_is_that_of_newcombes_published_example():
    predicted = np.repeat([1, 0, 1, 0], [56, 14, 48, 32])
    group = np.repeat([0, 1], [70, 80])
    found = gaps(predicted, predicted, group, positive=1).demographic_parity
    assert (found.low, found.value, found.high) == pytest.approx((0.0524, 0.2, 0.3339), abs=1e-4)


def test_gaps_are_those_of_fairlearn():
    metrics = pytest.importorskip("fairlearn.metrics")
    random = np.random.default_rng(0)
    labels, predicted, group = (random.integers(0, 2, 200) for _ in range(3))
    found = gaps(predicted, labels, group, positive=1)
    given = {"sensitive_features": group}
    parity = metrics.demographic_parity_difference(labels, predicted, **given)
    opportunity = metrics.equal_opportunity_difference(labels, predicted, **given)
    odds = metrics.equalized_odds_difference(labels, predicted, **given)
    values = [getattr(found, name).value for name in GAPS]
    np.testing.assert_allclose(values, [parity, opportunity, odds])


def test_a_gap_without_rows_is_unknown():
    found = gaps([1, 0, 0], [1, 0, 0], [0, 1, 1], positive=1)
    assert found.demographic_parity.value == 1
    assert found.equal_opportunity is None and found.equalized_odds is None


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ([0, 0, 0], "1 values .0., .* rows of both"),
        (["a", "b", "c"], "3 values .a, b, c., .* merge"),
        ([0, 1], "2 values of the attribute for 3 rows"),
        ([0, None, 1], "row 1 has no value"),
        ([0.0, 1.0, float("nan")], "row 2 has no value"),
    ],
)
def test_an_attribute_makes_two_groups_of_all_rows(attribute, said, unfair):
    with pytest.raises(InputError, match=said):
        gaps([1, 0, 1], [1, 0, 1], attribute, positive=1)
    influence = Influence(unfair.model.network_, ghosts=10)
    with pytest.raises(InputError, match=said):
        gap_influence(influence, [unfair.targets[0].rows(0, 3)], attribute, [1])


def test_the_positive_class_is_there():
    with pytest.raises(
        InputError, match="no row is predicted or labeled 'ja'; the labels are no, yes"
    ):
        gaps(["yes", "no"], ["yes", "no"], [0, 1], positive="ja")
    with pytest.raises(InputError, match="one for each row"):
        gaps([1], [1, 0], [0, 1], positive=1)


@pytest.mark.parametrize("gap", GAPS)
def test_influence_is_that_on_the_difference_of_mean_probabilities(gap, unfair):
    def probability(outputs, batch):
        return outputs.softmax(dim=1)[:, 1]

    ids = torch.from_numpy(unfair.model.ids_)
    pairs = Influence(unfair.model.network_, probability, ghosts=10).estimate(unfair.targets, ids)
    group, positive = unfair.held_group, unfair.held_y == 1
    among = {
        "demographic_parity": [positive | ~positive],
        "equal_opportunity": [positive],
        "equalized_odds": [positive, ~positive],
    }[gap]
    sides = max(among, key=lambda rows: abs(unfair.gap(unfair.model, rows)))
    assert unfair.gap(unfair.model, sides) > 0.05
    wanted = pairs.scores[sides & (group == 1)].mean(axis=0) - pairs.scores[
        sides & (group == 0)
    ].mean(axis=0)
    found = unfair.scores("linear", gap=gap)
    assert found.objective == gap
    np.testing.assert_allclose(found.scores, wanted, atol=1e-4 * np.abs(wanted).max())
    # Which of the groups is named first, and which class is the positive one of two, changes no sign.
    turned = Influence(unfair.model.network_, ghosts=10)
    if gap == "demographic_parity":
        other = gap_influence(turned, unfair.targets, 1 - group, ids, gap=gap, positive=0)
        np.testing.assert_allclose(other.scores, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("method", ["gram", "linear"])
def test_rows_of_an_unfair_label_widen_the_gap_as_retraining_says(method, unfair):
    result = unfair.scores(method, gap="equal_opportunity")
    scores, flipped, positive = result.scores, unfair.flipped, unfair.held_y == 1
    below = (scores[flipped][:, None] < scores[~flipped][None]).mean()
    assert scores[flipped].mean() < 0 and below > (0.9 if method == "gram" else 0.65)
    count = int(flipped.sum())
    worst = scores.argsort()[:count]
    keep = np.setdiff1d(np.arange(ROWS), worst)
    removed = unfair.trained(unfair.x[keep], unfair.y[keep])
    other = np.random.default_rng(0).permutation(ROWS)[count:]
    random = unfair.trained(unfair.x[other], unfair.y[other])
    relabeled = np.where(np.isin(np.arange(ROWS), worst), 1 - unfair.y, unfair.y)
    again = unfair.trained(unfair.x, relabeled)
    before, *after = (unfair.gap(one, positive) for one in (unfair.model, removed, again, random))
    assert before > 0.15
    assert max(map(abs, after[:2])) < (0.5 if method == "gram" else 0.8) * before
    assert after[2] > 0.8 * before
    if method == "gram":
        assert (result.q[flipped] < 0.05).mean() > 0.5
        few = scores.argsort()[:20]
        kept = np.setdiff1d(np.arange(ROWS), few)
        observed = unfair.gap(unfair.trained(unfair.x[kept], unfair.y[kept]), positive) - before
        assert 0.4 < scores[few].sum() / observed < 1.5


def test_several_networks_are_averaged(unfair):
    other = TurnoverClassifier(1024, random_state=1).fit(unfair.x, unfair.y)
    both = Influence([unfair.model.network_, other.network_], ghosts=50)
    ids = torch.from_numpy(unfair.model.ids_)
    found = gap_influence(both, unfair.targets, unfair.held_group, ids)
    assert found.standard_error.shape == (ROWS,)
    assert np.corrcoef(found.scores, unfair.scores("linear").scores)[0, 1] > 0.6


def test_training_goes_on_in_the_mode_it_was_in(unfair):
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(), torch.nn.Linear(8, 2))
    batch = unfair.targets[0].rows(0, 40)
    influence = Influence(model.train(), method="gram").fit([batch])
    found = [gap_influence(influence, [batch], unfair.held_group[:40]).scores for _ in range(2)]
    np.testing.assert_array_equal(*found)
    assert model.training and model[1].training


def test_what_cannot_be_meant_is_refused(unfair):
    influence = Influence(unfair.model.network_, ghosts=10)
    batch, group = unfair.targets[0].rows(0, 40), unfair.held_group[:40]
    one_label = Batch(batch.inputs, torch.zeros(40, dtype=torch.int64))
    unlabeled = Batch(batch.inputs)

    def refused(said, targets=(batch,), given=influence, **options):
        with pytest.raises(InputError, match=said):
            gap_influence(given, list(targets), group, [1, 2], **options)

    refused("unknown gap 'parity'; there are demographic_parity, ", gap="parity")
    refused("no targets", targets=())
    refused("needs labels", targets=[unlabeled])
    refused("needs labels", targets=[Batch(batch.inputs, batch.labels[:, None])])
    refused("must be a class of the logits", positive=2)
    refused("no row of group '0' is labeled positive", [one_label], gap="equal_opportunity")
    cost = Influence(unfair.model.network_, objectives.cross_entropy, ghosts=10)
    refused("leave the objective of Influence at margin", given=cost)
    same = Batch(batch.inputs[:1].expand(40, -1), batch.labels)
    refused("is 0 already", [same])
