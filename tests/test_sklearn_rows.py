"""Weights and row identity of the scikit-learn classifier."""

import pickle
import warnings

import numpy as np
import pytest
import torch

import turnover
from turnover import InputError

pytest.importorskip("sklearn", reason="needs: pip install 'turnover[sklearn]'")
pandas = pytest.importorskip("pandas", reason="needs: pip install 'turnover[sklearn]'")
import sklearn  # noqa: E402
from scipy import sparse  # noqa: E402
from sklearn.base import clone  # noqa: E402
from sklearn.datasets import load_iris  # noqa: E402
from sklearn.ensemble import AdaBoostClassifier  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_validate  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

from turnover.integrations import sklearn as classifier  # noqa: E402
from turnover.integrations.sklearn import TurnoverClassifier  # noqa: E402
from turnover.training import mean_cross_entropy  # noqa: E402

small = TurnoverClassifier(units=64, random_state=0, batch_size=64)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(classifier, "_LEAST_STEPS", 60)


def iris():
    X, y = load_iris(return_X_y=True, as_frame=True)
    order = np.random.RandomState(0).permutation(len(y))
    names = np.array(["setosa", "versicolor", "virginica"])
    return X.iloc[order], pandas.Series(names[y.iloc[order]], index=X.index[order])


X, Y = iris()
IDS = np.arange(len(X)) * 3 + 1


def probabilities(**options):
    return clone(small).fit(X, Y, ids=IDS, **options).predict_proba(X)


def overlapping(rows=400, share=0.9):
    """Two classes that overlap, most rows of the first."""
    random = np.random.RandomState(0)
    y = (random.rand(rows) > share).astype(int)
    return random.randn(rows, 3) + y[:, None], y


def test_weights_multiply_the_losses_of_their_rows():
    weights = np.random.RandomState(1).rand(len(X)) * 3
    seen = []

    class Watched(TurnoverClassifier):
        def _train(self, generator, weights):
            seen.append(weights)

    Watched(units=64, random_state=0).fit(X, Y, ids=IDS, sample_weight=weights)
    np.testing.assert_allclose(seen[0], weights / weights.mean(), rtol=1e-6)
    logits = torch.randn(len(X), 3, requires_grad=True)
    labels = torch.arange(len(X)) % 3
    given = torch.tensor(weights, dtype=torch.float32)
    (weighted,) = torch.autograd.grad(mean_cross_entropy(logits, labels, given), logits)
    (plain,) = torch.autograd.grad(mean_cross_entropy(logits, labels, None), logits)
    torch.testing.assert_close(weighted, plain * given[:, None])


def test_weights_of_one_change_nothing_and_their_scale_does_not_matter():
    plain = probabilities()
    for ones in (np.ones(len(X)), [7] * len(X), pandas.Series(0.5, index=X.index), 3.0):
        np.testing.assert_allclose(probabilities(sample_weight=ones), plain, atol=1e-6)
    weights = np.random.RandomState(1).rand(len(X))
    one, other = (probabilities(sample_weight=weights * scale) for scale in (1.0, 1024.0))
    np.testing.assert_array_equal(one, other)
    assert np.abs(one - plain).max() > 1e-3


def test_a_row_of_weight_0_is_as_if_it_had_not_been_there():
    weights = np.ones(len(X))
    weights[::3] = 0
    kept = weights > 0
    strange = X.copy()  # neither a gradient nor a scale comes from these rows
    strange.iloc[~kept] = 1e6
    model = clone(small).fit(strange, Y, ids=IDS, sample_weight=weights)
    other = clone(small).fit(X[kept], Y[kept], ids=IDS[kept], sample_weight=weights[kept])
    np.testing.assert_array_equal(model.predict_proba(X), other.predict_proba(X))
    assert model.network_.digest() == other.network_.digest()
    assert (model.ids_ == IDS).all() and (model.train_index_ == IDS).all()
    np.testing.assert_array_equal(model.weights_ > 0, kept)
    for call in (lambda m: m.influence_on(X[:4], Y[:4]), lambda m: m.self_influence()):
        pandas.testing.assert_frame_equal(call(model), call(other))
    found = clone(small).fit(X, Y, sample_weight=weights).self_influence()
    assert list(found.index) == list(X.index[kept]), "rows keep what they are called"


def test_rows_of_weight_0_score_like_ghosts():
    weights = np.ones(len(X))
    weights[::2] = 0
    model = TurnoverClassifier(units=1024, random_state=0).fit(X, Y, sample_weight=weights)
    own = model.influence_.self_influence([model.train_batch_])
    assert np.abs(own.z[::2].mean()) < 1 < own.z[1::2].mean()


def test_a_group_is_left_out_where_all_of_its_rows_have_weight_0():
    sources = np.array(["a", "b", "c"])[np.arange(len(X)) % 3]
    weights = np.where(sources == "b", 0.0, 1.0)
    weights[0] = 0  # of a, which others of a learned
    model = clone(small).fit(X, Y, ids=sources, sample_weight=weights)
    assert list(model.influence_on(X[:1], Y[:1]).loc[X.index[0]].index) == ["c", "a"]


def test_the_objective_of_influence_is_not_weighted():
    weights = np.random.RandomState(1).rand(len(X)) + 0.1
    model = clone(small).fit(X, Y, ids=IDS, sample_weight=weights)
    encoded = torch.tensor(StandardScaler().fit(X.to_numpy()).transform(X.to_numpy()[:5])).float()
    labels = torch.from_numpy(np.searchsorted(model.classes_, Y[:5].to_numpy()))
    result = turnover.Influence(model.network_).estimate([(encoded, labels)], IDS)
    found = model.influence_on(X[:5], Y[:5]).score.to_numpy().reshape(5, -1)
    np.testing.assert_allclose(found, result.scores, atol=1e-5)


def test_balanced_classes_find_the_few_as_those_of_scikit_learn_do():
    data, y = overlapping()

    def recall(model):
        return (model.fit(data, y).predict(data)[y == 1] == 1).mean()

    plain, balanced = recall(clone(small)), recall(clone(small).set_params(class_weight="balanced"))
    other = recall(LogisticRegression(class_weight="balanced"))
    assert plain < other - 0.2
    assert balanced > other - 0.1


def test_class_weights_are_sample_weights_by_class_and_multiply_them():
    data, y = overlapping(150)
    names = np.array(["many", "few"])[y]
    weights = np.random.RandomState(2).rand(len(y)) + 0.5
    counts = np.bincount(y)

    def fitted(class_weight=None, sample_weight=None):
        model = clone(small).set_params(class_weight=class_weight)
        return model.fit(data, names, sample_weight=sample_weight).predict_proba(data)

    by_class = np.where(y == 1, 5.0, 2.0)
    dictionary = {"many": 2.0, "few": 5.0}
    np.testing.assert_allclose(fitted(dictionary), fitted(None, by_class), atol=1e-6)
    np.testing.assert_allclose(
        fitted(dictionary, weights), fitted(None, by_class * weights), atol=1e-6
    )
    balanced = (len(y) / (2 * counts))[y]
    np.testing.assert_allclose(fitted("balanced"), fitted(None, balanced), atol=1e-6)
    sums = np.bincount(y, weights)
    np.testing.assert_allclose(
        fitted("balanced", weights), fitted(None, weights / sums[y]), atol=1e-6
    )
    np.testing.assert_allclose(fitted({"few": 3}), fitted(None, np.where(y == 1, 3, 1)), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_weight": -np.ones(150)}, "sample_weight must be finite and >= 0, got -1"),
        ({"sample_weight": np.zeros(150)}, "all sample weights are 0|non-zero"),
        ({"sample_weight": np.ones(3)}, "150"),
        ({"sample_weight": np.ones((150, 2))}, "1D"),
        ({"sample_weight": np.where(np.arange(150) == 7, np.nan, 1.0)}, "NaN"),
        (
            {"sample_weight": (Y == "setosa").to_numpy().astype(float)},
            r"one class alone, \['setosa'\]",
        ),
        ({"class_weight": {"setosa": -1.0}}, "class_weight must be finite and >= 0, got -1"),
        ({"class_weight": {"rosa": 2.0}}, "rosa|not in class_weight"),
        ({"class_weight": "even"}, "class_weight"),
        ({"class_weight": {"setosa": 0.0, "virginica": 0.0}}, "one class alone"),
    ],
)
def test_weights_that_say_nothing_are_refused(options, message):
    model = clone(small)
    if "class_weight" in options:
        model.set_params(class_weight=options.pop("class_weight"))
    with pytest.raises(ValueError, match=message):
        model.fit(X, Y, **options)


def test_weights_given_in_the_place_of_ids_are_named():
    with pytest.raises(TypeError, match=r"ids must be integers .* sample_weight="):
        clone(small).fit(X, Y, np.ones(len(X)) * 0.5)


def test_weights_go_through_pipelines_grids_routing_and_ensembles():
    weights = np.random.RandomState(1).rand(len(X))
    alone = clone(small).fit(X, Y, sample_weight=weights)
    piped = make_pipeline(StandardScaler(with_std=False, with_mean=False), clone(small))
    piped.fit(X, Y, turnoverclassifier__sample_weight=weights, turnoverclassifier__ids=IDS)
    np.testing.assert_allclose(piped[-1].weights_, alone.weights_)
    grid = GridSearchCV(clone(small), {"class_weight": [None, "balanced", {"setosa": 2.0}]}, cv=2)
    grid.fit(X, Y, sample_weight=weights)
    assert clone(grid.best_estimator_).get_params() == grid.best_estimator_.get_params()
    AdaBoostClassifier(clone(small), n_estimators=2).fit(X, Y)
    loaded = pickle.loads(pickle.dumps(alone))
    pandas.testing.assert_frame_equal(loaded.self_influence(), alone.self_influence())
    with sklearn.config_context(enable_metadata_routing=True):
        routed = clone(small).set_fit_request(sample_weight=True, ids=True)
        routed.set_score_request(sample_weight=True)
        found = cross_validate(
            routed, X, Y, params={"sample_weight": weights, "ids": IDS}, cv=2, return_estimator=True
        )
        for one in found["estimator"]:
            places = (one.ids_ - 1) // 3
            expected = weights[places] / weights[places].mean()
            np.testing.assert_allclose(one.weights_, expected)


# Which row is which


def test_a_column_whose_index_is_in_another_order_is_refused():
    other = Y.sort_index()
    named = X.set_axis([f"flower {row}" for row in X.index])
    labels = Y.set_axis(named.index)
    with pytest.raises(
        InputError, match=r"index of y has the labels of X in another order.*y\.loc"
    ):
        clone(small).fit(named, labels.iloc[::-1])
    weights = pandas.Series(1.0, index=named.index)
    for columns in ({"sample_weight": weights.iloc[::-1]}, {"ids": weights.iloc[::-1].astype(int)}):
        with pytest.raises(InputError, match=f"index of {next(iter(columns))}"):
            clone(small).fit(named, labels, **columns)
    model = clone(small).fit(named, labels, sample_weight=weights)
    with pytest.raises(InputError, match="index of y"):
        model.influence_on(named[:5], labels[:5].iloc[::-1])
    # Row numbers may be meant, or may be what pandas gives a new column.
    with pytest.warns(UserWarning, match="rows are paired by place; to pair them by label"):
        clone(small).fit(X, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clone(small).fit(X, Y)
        clone(small).fit(X, Y.to_numpy())
        clone(small).fit(X[:90].reset_index(drop=True), Y[:90])
        clone(small).fit(named, Y)


def test_rows_of_a_shuffled_frame_keep_their_names_and_scores():
    order = np.random.RandomState(3).permutation(len(X))
    model = clone(small).fit(X, Y)
    found = model.influence_on(X, Y)
    shuffled = model.influence_on(X.iloc[order], Y.iloc[order])
    for row in X.index[:5]:
        np.testing.assert_allclose(shuffled.loc[row].score, found.loc[row].score, atol=1e-5)
    by_key = clone(small).fit(X, Y, ids=[f"row {row}" for row in X.index])
    assert list(by_key.self_influence().index) == [f"row {row}" for row in X.index]


def test_rows_that_share_a_name_are_said():
    double = X.set_axis(np.arange(len(X)) // 2)
    with pytest.warns(UserWarning, match=r"rows of X share labels in its index, such as 0"):
        model = clone(small).fit(double, Y.set_axis(double.index))
    assert len(model.self_influence()) == len(X)
    plain = clone(small).fit(X, Y)
    with pytest.warns(UserWarning, match="share labels"):
        plain.influence_on(double[:4], Y[:4].to_numpy())


def test_ids_of_mixed_kinds_are_refused_and_integers_as_objects_are_integers():
    mixed = [*range(len(X) - 1), "last"]
    with pytest.raises(TypeError, match="all integers or all strings"):
        clone(small).fit(X, Y, ids=mixed)
    with pytest.raises(TypeError, match="all integers or all strings"):
        clone(small).fit(X, Y, ids=np.array(["a", *[None] * (len(X) - 1)], dtype=object))
    held = clone(small).fit(X, Y, ids=IDS.astype(object))
    assert (held.ids_ == IDS).all()


def test_sparse_rows_are_refused_by_name_and_labels_of_any_kind_are_found_again():
    with pytest.raises(TypeError, match="dense"):
        clone(small).fit(sparse.csr_array(X.to_numpy()), Y)
    with pytest.raises((TypeError, ValueError), match=r"dense|dataframe"):
        clone(small).fit(X.assign(kind="a"), Y).predict(sparse.csr_array(np.ones((2, 5))))
    for labels in (
        Y.astype("category"),
        Y.astype(object),
        (Y == "setosa"),
        Y.map({"setosa": -1, "versicolor": 10, "virginica": 2}),
    ):
        model = clone(small).fit(X, labels)
        assert (model.predict(X) == np.asarray(labels)).mean() > 0.7
        codes = np.unique(np.asarray(labels), return_inverse=True)[1][:5]
        targets = [(model.train_batch_.inputs[:5], torch.from_numpy(codes))]
        right = turnover.Influence(model.network_).estimate(targets, np.arange(len(X))).scores
        found = model.influence_on(X[:5], labels[:5]).score.to_numpy().reshape(right.shape)
        np.testing.assert_allclose(found, right, atol=1e-5)


def test_wrong_labels_are_found_without_those_of_weight_0():
    y = Y.copy()
    wrong = X.index[[3, 40, 77, 110]]
    y[wrong] = np.where(Y[wrong] == "setosa", "virginica", "setosa")
    weights = np.ones(len(X))
    weights[3] = 0
    found = clone(small).fit(X, y, sample_weight=weights).label_errors()
    assert wrong[0] not in found.index and len(found) == len(X) - 1
    assert set(wrong[1:]) <= set(found.nlargest(5, "suspicion").index)
    assert (found.loc[wrong[1:], "label"] == y[wrong[1:]]).all()
    assert (found["label"] != found["suggested"]).all()
    setosa = wrong[1:][(Y[wrong[1:]] == "setosa").to_numpy()]
    assert (found.loc[setosa, "suggested"] == "setosa").all()
    assert 2 < found["probability"].sum() < 25
