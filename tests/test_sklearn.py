"""The scikit-learn classifier, by scikit-learn's own checks and on its data sets."""

import importlib
import pickle
import sys

import numpy as np
import pytest
import torch

import turnover
from turnover import InputError

pytest.importorskip("sklearn", reason="needs: pip install 'turnover[sklearn]'")
pandas = pytest.importorskip("pandas", reason="needs: pip install 'turnover[sklearn]'")
from sklearn.base import clone  # noqa: E402
from sklearn.datasets import load_breast_cancer, load_digits, make_classification  # noqa: E402
from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402
from sklearn.model_selection import (  # noqa: E402
    GridSearchCV,
    cross_val_predict,
    cross_val_score,
    train_test_split,
)
from sklearn.neural_network import MLPClassifier  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import MinMaxScaler, StandardScaler  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from turnover.integrations.sklearn import TurnoverClassifier  # noqa: E402

small = TurnoverClassifier(units=64, random_state=0)
TWICE = dict.fromkeys(
    ("check_sample_weight_equivalence", "check_sample_weight_equivalence_on_dense_data"),
    "a row of weight 2 is one row, of one mask; a row given twice is two, and their batches are others",
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks([small], expected_failed_checks=lambda _: TWICE)
def test_it_keeps_every_convention_that_scikit_learn_checks(estimator, check):
    check(estimator)


def cancer():
    """Real tumours, one in ten with the wrong label: train and test rows, and which labels are wrong."""
    X, y = load_breast_cancer(return_X_y=True, as_frame=True)
    X.index = [f"case {row}" for row in X.index]
    X, X_test, y, y_test = train_test_split(X, y, random_state=0)
    wrong = np.random.RandomState(0).rand(len(y)) < 0.1
    return X, np.where(wrong, 1 - y, y), wrong, X_test, y_test.to_numpy()


@pytest.fixture(scope="module")
def fitted():
    X, y, wrong, X_test, y_test = cancer()
    return TurnoverClassifier(random_state=0).fit(X, y), X, y, wrong, X_test, y_test


@pytest.mark.parametrize("load", [load_digits, load_breast_cancer])
def test_it_predicts_nearly_as_well_as_logistic_regression(load):
    X, X_test, y, y_test = train_test_split(*load(return_X_y=True), random_state=0)
    plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(X, y)
    model = TurnoverClassifier(random_state=0).fit(X, y)
    assert model.score(X_test, y_test) > plain.score(X_test, y_test) - 0.02


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
def test_its_defaults_learn_what_no_linear_model_can():
    X, y = make_classification(
        1200, 10, n_informative=10, n_redundant=0, n_classes=10, class_sep=2.0, random_state=0
    )
    X, X_test, y, y_test = train_test_split(X, y, random_state=0)
    linear = LogisticRegression(max_iter=1000).fit(X, y).score(X_test, y_test)
    network = make_pipeline(StandardScaler(), MLPClassifier(random_state=0)).fit(X, y)
    found = TurnoverClassifier(random_state=0).fit(X, y).score(X_test, y_test)
    assert linear < 0.6
    assert found > network.score(X_test, y_test) - 0.05


def test_before_anything_is_learned_every_mask_predicts_the_same():
    X, y = load_breast_cancer(return_X_y=True)
    model = clone(small).set_params(learning_rate=1e-12).fit(X, y)
    hidden = turnover.hidden_predictions(model.network_, [model.train_batch_]).probabilities
    np.testing.assert_allclose(hidden, model.predict_proba(X), atol=1e-5)


def test_self_influence_finds_wrong_labels(fitted):
    model, X, _, wrong, *_ = fitted
    found = model.self_influence()
    assert list(found.index) == list(X.index)
    assert list(found.columns) == ["score", "z", "q"]
    assert roc_auc_score(wrong, found.z) > 0.95
    assert wrong[found.z.argsort()[::-1][:20]].mean() >= 0.8


def test_wrong_labels_of_neighbours_harm_a_prediction_and_right_ones_help_it(fitted):
    model, X, _, wrong, X_test, y_test = fitted
    found = model.influence_on(X_test, y_test)
    assert list(found.columns) == ["score", "z", "q"]
    mean = found.score.groupby("train").mean()[X.index]
    assert mean[~wrong].mean() > 0 > mean[wrong].mean()
    assert roc_auc_score(wrong, -mean) > 0.9


def test_influence_is_that_of_the_library_under_the_frames_own_index(fitted):
    model, X, _, _, X_test, y_test = fitted
    found = model.influence_on(X_test[:3], y_test[:3])
    encoded = torch.tensor(StandardScaler().fit(X).transform(X_test[:3]), dtype=torch.float32)
    targets = [(encoded, torch.tensor(y_test[:3]))]
    result = turnover.Influence(model.network_).estimate(targets, np.arange(len(X)))
    for number, row in enumerate(X_test.index[:3]):
        one = found.loc[row]
        assert list(one.index) == list(X.index)
        np.testing.assert_allclose(one.score, result.scores[number], atol=1e-5)
        np.testing.assert_allclose(one.z, result.z[number], atol=1e-4)
        np.testing.assert_allclose(one.q, result.q[number], atol=1e-4)
    assert model.influence_.method == "linear"


def test_rows_are_predicted_out_of_sample_from_the_one_training(fitted):
    model, X, y, wrong, *_ = fitted
    found = turnover.hidden_predictions(model.network_, [model.train_batch_])
    of_label = found.probabilities[np.arange(len(y)), y]
    auc = roc_auc_score(wrong, 1 - of_label)
    folds = cross_val_predict(
        TurnoverClassifier(random_state=0), X, y, cv=5, method="predict_proba"
    )
    assert auc > 0.9
    assert auc > roc_auc_score(wrong, 1 - folds[np.arange(len(y)), y]) - 0.02
    whole = model.predict_proba(X)[np.arange(len(y)), y]
    assert of_label[wrong].mean() < whole[wrong].mean() - 0.1


def test_a_random_state_decides_all_and_no_global_generator_is_touched():
    X, y = load_breast_cancer(return_X_y=True)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    one = clone(small).fit(X, y)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    torch.manual_seed(2)
    same, other = clone(small).fit(X, y), clone(small).set_params(random_state=1).fit(X, y)
    assert same.network_.digest() == one.network_.digest()
    assert other.network_.spec != one.network_.spec
    assert (other.predict_proba(X) != one.predict_proba(X)).any()


def test_a_pickled_model_predicts_and_explains_the_same():
    X, y = load_breast_cancer(return_X_y=True)
    model = clone(small).fit(X, y)
    loaded = pickle.loads(pickle.dumps(model))
    assert (loaded.predict_proba(X) == model.predict_proba(X)).all()
    pandas.testing.assert_frame_equal(
        loaded.influence_on(X[:2], y[:2]), model.influence_on(X[:2], y[:2])
    )
    assert loaded.network_.digest() == model.network_.digest()


def table(rows=200):
    """The label is in a category, with noise beside it."""
    random = np.random.RandomState(0)
    colour = random.choice(["red", "green", "blue"], rows)
    frame = pandas.DataFrame(
        {
            "size": random.randn(rows) * 1e6,
            "colour": pandas.Categorical(colour),
            "shape": random.choice(["round", "flat"], rows),
            "new": random.rand(rows) < 0.5,
        },
        index=random.permutation(rows) + 1000,
    )
    return frame, np.where(colour == "red", "yes", "no")


def test_strings_and_categories_of_a_frame_are_understood():
    X, y = table()
    model = clone(small).fit(X[:150], y[:150])
    assert list(model.classes_) == ["no", "yes"]
    assert list(model.feature_names_in_) == ["size", "colour", "shape", "new"]
    assert model.score(X[150:], y[150:]) > 0.95
    unseen = X[150:].astype({"colour": str}).assign(colour="violet")
    assert np.isfinite(model.predict_proba(unseen)).all()
    found = model.influence_on(X[150:152], y[150:152])
    assert list(found.index.names) == ["row", "train"]
    assert list(found.loc[X.index[150]].index) == list(X.index[:150])


@pytest.mark.parametrize("kind", ["source", 7])
def test_rows_of_one_id_are_scored_as_one(kind):
    X, y = load_breast_cancer(return_X_y=True)
    groups = np.arange(len(y)) % 5
    ids = [f"source {group}" for group in groups] if kind == "source" else groups * kind
    model = clone(small).fit(X, y, ids=ids)
    found = model.influence_on(X[:4], y[:4])
    assert list(found.loc[3].index) == list(ids[:5])
    with model.network_.without(int(model.ids_[2])), torch.no_grad():
        hidden = model.network_.model(model.train_batch_.inputs)
    with model.network_.hidden(torch.from_numpy(model.ids_[2:3]).repeat(len(y))), torch.no_grad():
        assert torch.equal(hidden, model.network_.model(model.train_batch_.inputs))
    with pytest.raises(InputError, match="twice"):
        model.self_influence()


def test_it_is_chosen_and_validated_as_any_classifier_is():
    X, y = load_breast_cancer(return_X_y=True)
    ids = np.arange(len(y)) + 100
    model = make_pipeline(MinMaxScaler(), clone(small))
    grid = GridSearchCV(model, {"turnoverclassifier__units": [16, 64]}, cv=2)
    grid.fit(X, y, turnoverclassifier__ids=ids)
    best = grid.best_estimator_[-1]
    assert best.units in (16, 64) and grid.best_score_ > 0.9
    assert (best.ids_ == ids).all()


@pytest.mark.slow
def test_processes_and_threads_beside_one_another_get_the_same_scores():
    X, y = load_breast_cancer(return_X_y=True)
    alone = cross_val_score(small, X, y, cv=2)
    assert (cross_val_score(small, X, y, cv=2, n_jobs=2) == alone).all()
    import joblib

    with joblib.parallel_config("threading"):
        assert (cross_val_score(small, X, y, cv=2, n_jobs=2) == alone).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": 0}, "units must be an integer >= 1, got 0"),
        ({"units": 64.0}, r"units must be an integer >= 1, got 64\.0"),
        ({"batch_size": "32"}, "batch_size must be an integer >= 1, got '32'"),
        ({"epochs": 0}, "epochs must be an integer >= 1"),
        ({"learning_rate": -1.0}, "learning_rate must be > 0"),
        ({"learning_rate": 1e30}, "lower learning_rate"),
    ],
)
def test_parameters_out_of_range_are_refused(options, message):
    X, y = load_breast_cancer(return_X_y=True)
    with pytest.raises(InputError, match=message):
        clone(small).set_params(**options).fit(X, y)


def test_what_cannot_be_a_training_set_is_refused():
    X, y = table()
    model = clone(small)
    with pytest.raises(InputError, match="column 'when' is of type datetime64"):
        model.fit(X.assign(when=pandas.Timestamp(0)), y)
    with pytest.raises(ValueError, match="contains NaN"):
        model.fit(X.assign(size=[np.nan, *X["size"][1:]]), y)
    with pytest.raises(InputError, match="one class alone, \\['no'\\]"):
        model.fit(X, ["no"] * len(X))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.fit(X, y, ids=[1, 2])
    with pytest.raises(InputError, match="ghosts"):
        model.fit(X, y, ids=-np.arange(len(X)) - 1)
    with pytest.raises(TypeError, match="float"):
        model.fit(X, y, ids=np.arange(len(X)) / 2)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "turnover.integrations.sklearn")
    with pytest.raises(InputError, match=r"pip install 'turnover\[sklearn\]'"):
        importlib.import_module("turnover.integrations.sklearn")


def test_questions_that_have_no_answer_are_refused():
    X, y = table()
    with pytest.raises(NotFittedError):
        clone(small).influence_on(X, y)
    with pytest.raises(NotFittedError):
        clone(small).self_influence()
    model = clone(small).fit(X, y)
    with pytest.raises(InputError, match="not trained on: \\['maybe'\\]"):
        model.influence_on(X[:1], ["maybe"])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        model.influence_on(X[:2], y[:1])
