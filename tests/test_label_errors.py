"""Wrong labels by features alone: they are found, counted and corrected; what cannot be judged is refused."""

import numpy as np
import pandas
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import turnover
from turnover import InputError, label_errors
from turnover.evaluation import mislabel
from turnover.labels import label_errors_of, noise, ridge


def blobs(rows=600, classes=4, share=0.2, seed=0, width=12, spread=1.0):
    """Gaussian classes, of which a share of the rows has another label: x, labels, right labels."""
    generator = np.random.default_rng(seed)
    centers = generator.standard_normal((classes, width)) * 2
    right = generator.integers(0, classes, rows)
    x = centers[right] + spread * generator.standard_normal((rows, width))
    labels = right.copy()
    wrong = generator.permutation(rows)[: round(share * rows)]
    labels[wrong] = (labels[wrong] + generator.integers(1, classes, len(wrong))) % classes
    return x, labels, right


@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_wrong_labels_are_found_counted_and_corrected(share):
    x, labels, right = blobs(share=share)
    wrong = labels != right
    found = label_errors(x, labels)
    assert mislabel(found.suspicion, wrong, at=[10]).auc > 0.99
    assert found.expected == pytest.approx(wrong.sum(), rel=0.15)
    assert found.likely == pytest.approx(wrong.sum(), rel=0.15)
    sure = found.probability >= 0.9
    assert sure.sum() > 0.7 * wrong.sum() and wrong[sure].mean() > 0.9
    assert (found.suggested[wrong] == right[wrong]).mean() > 0.95
    assert (found.suggested != labels).all()
    assert wrong[found.order()[:20]].all()


def test_probabilities_are_those_of_a_posterior():
    x, labels, _ = blobs()
    found = label_errors(x, labels)
    assert found.posterior.shape == (600, 4) and found.posterior.dtype == np.float32
    np.testing.assert_allclose(found.posterior.sum(axis=1), 1, rtol=1e-5)
    own = found.posterior[np.arange(600), labels]
    np.testing.assert_allclose(found.probability, 1 - own, atol=1e-5)
    np.testing.assert_allclose(found.transition.sum(axis=1), 1, rtol=1e-5)


def test_a_direction_of_the_noise_is_learned():
    x, labels, right = blobs(rows=900, classes=3, share=0.0)
    generator = np.random.default_rng(1)
    moved = (right == 0) & (generator.random(900) < 0.3)
    labels = np.where(moved, 1, right)
    found = label_errors(x, labels)
    assert found.transition[0, 1] == pytest.approx(0.3, abs=0.08)
    assert found.transition[1, 1] > 0.9 and found.transition[2, 2] > 0.9


def test_labels_without_errors_are_not_doubted():
    x, labels, _ = blobs(share=0.0)
    found = label_errors(x, labels)
    assert found.expected < 0.03 * len(labels) and found.likely < 0.02 * len(labels)


def test_labels_that_features_say_nothing_of_are_not_called_wrong_one_by_one():
    generator = np.random.default_rng(0)
    found = label_errors(generator.standard_normal((500, 8)), generator.integers(0, 2, 500))
    assert found.likely < 50


@given(st.integers(0, 1000), st.integers(2, 4), st.sampled_from([3, 40]))
@settings(max_examples=10, deadline=None)
def test_every_row_is_predicted_without_itself(seed, classes, width):
    x, labels, _ = blobs(30, classes, 0.2, seed, width)
    row = seed % 30
    other = labels.copy()
    other[row] = (labels[row] + 1) % classes
    centered = x - x.mean(axis=0)
    hot, changed = (np.eye(classes)[one] - 1 / classes for one in (labels, other))
    for block in (ridge._linear(centered), ridge._fourier(centered, 0)):
        matrix = block(slice(0, 30))
        scale = (matrix**2).sum() / 30
        error, found = ridge._fit(block, 30, hot)
        kept = np.arange(30) != row

        def slow(one, matrix=matrix, scale=scale, kept=kept):
            others = matrix[kept] - matrix[kept].mean(axis=0)
            square = others.T @ others + one * scale * np.eye(matrix.shape[1])
            own = matrix[row] - matrix[kept].mean(axis=0)
            return own @ np.linalg.solve(square, others.T @ hot[kept])

        close = min(np.abs(slow(one) - found[row]).max() for one in ridge.RIDGES)
        assert close < 1e-6
        assert error == pytest.approx(((found - hot) ** 2).sum())
        # At the same ridge the row's own label plays no part in its prediction.
        before, after = (_at(block, target, row) for target in (hot, changed))
        np.testing.assert_allclose(before, after, atol=1e-8)


def _at(block, hot, row):
    ridges, ridge.RIDGES = ridge.RIDGES, (1.0,)
    try:
        return ridge._fit(block, len(hot), hot)[1][row]
    finally:
        ridge.RIDGES = ridges


def test_blocks_of_rows_give_what_all_at_once_give(monkeypatch):
    x, labels, _ = blobs(rows=200)
    whole = label_errors(x, labels)
    monkeypatch.setattr(ridge, "_ROWS", 37)
    np.testing.assert_allclose(label_errors(x, labels).suspicion, whole.suspicion, atol=1e-6)


def test_the_same_seed_gives_the_same_and_torch_is_taken(recwarn):
    x, labels, _ = blobs(rows=200)
    state = torch.random.get_rng_state()
    found = [
        label_errors(torch.from_numpy(x).float(), torch.from_numpy(labels), seed=1)
        for _ in range(2)
    ]
    assert (found[0].suspicion == found[1].suspicion).all() and not recwarn
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_few_rows_of_many_columns_do_not_tell_their_own_labels(seed):
    noise_alone = np.random.default_rng(seed).standard_normal((100, 768))
    right = np.arange(100) % 2
    labels = right.copy()
    labels[:10] = 1 - right[:10]
    assert label_errors(noise_alone, labels).likelihood < np.log(0.5) + 0.1
    found = label_errors(noise_alone + 0.5 * (2 * right - 1)[:, None], labels)
    assert set(found.order()[:10].tolist()) == set(range(10))
    assert 2 < found.expected < 14


@pytest.mark.parametrize("scale", [1e-20, 1e-8, 1e8, 1e200])
def test_the_scale_of_the_features_does_not_matter(scale, recwarn):
    x, labels, _ = blobs(rows=200)
    expected = label_errors(x, labels).suspicion
    np.testing.assert_allclose(label_errors(scale * x, labels).suspicion, expected, atol=1e-6)
    assert not recwarn


def test_a_class_without_labels_is_not_suggested_and_changes_nothing():
    x, labels, _ = blobs(rows=200, classes=2)
    plain, found = label_errors(x, labels), label_errors(x, 3 * labels, classes=6)
    np.testing.assert_array_equal(found.suspicion, plain.suspicion)
    np.testing.assert_array_equal(found.suggested, 3 * plain.suggested)
    assert found.posterior.shape == (200, 6) and found.transition.shape == (6, 6)
    np.testing.assert_allclose(found.transition.sum(axis=1), 1, rtol=1e-5)
    predictions = np.insert(ridge.leave_one_out(x, labels, 2, 0), 1, 9.0, axis=1)
    assert (label_errors_of(predictions, 2 * labels).suggested == 2 * plain.suggested).all()
    last = label_errors_of(predictions[:, [0, 2, 1]], labels)
    assert last.posterior.shape == (200, 3) and (last.suggested == plain.suggested).all()


def test_arrays_of_other_kinds_give_the_same(recwarn):
    x, labels, _ = blobs(rows=60)
    x = torch.from_numpy(x).bfloat16().double().numpy()
    expected = label_errors(x, labels).suspicion
    shuffled = np.random.default_rng(0).permutation(60)
    read_only = x.copy()
    read_only.setflags(write=False)
    given = [
        (torch.from_numpy(x).bfloat16().requires_grad_(), torch.from_numpy(labels)),
        (pandas.DataFrame(x, index=shuffled), pandas.Series(labels, index=shuffled)),
        (x[::-1].copy()[::-1], labels.astype(np.uint8)),
        (read_only, labels.tolist()),
    ]
    for features, classes in given:
        found = label_errors(features, classes).suspicion
        np.testing.assert_allclose(found, expected, atol=1e-9)
    assert not recwarn


def test_curved_classes_need_and_get_the_random_features():
    generator = np.random.default_rng(0)
    x = generator.standard_normal((800, 2))
    right = ((x**2).sum(axis=1) > 1.4).astype(int)
    labels = right.copy()
    labels[:80] = 1 - right[:80]
    wrong = labels != right
    assert mislabel(label_errors(x, labels).suspicion, wrong, at=[10]).auc > 0.95


def test_predictions_of_ones_own_are_explained():
    x, labels, right = blobs()
    left_out = ridge.leave_one_out(x, labels, 4, 0)
    found = label_errors_of(left_out, labels)
    assert mislabel(found.suspicion, labels != right, at=[10]).auc > 0.99
    worse = label_errors_of(np.random.default_rng(0).standard_normal((600, 4)), labels)
    assert found.likelihood > worse.likelihood
    with pytest.raises(InputError, match=r"\[0, 3\), got 0 to 3"):
        label_errors_of(left_out[:, :3], labels)


@pytest.mark.parametrize("classes", [2, 7])
def test_predictions_of_one_value_say_nothing(classes):
    labels = np.arange(70) % classes
    found = noise.fit(np.zeros((70, classes)), labels)
    assert np.isfinite(found.suspicion).all() and np.isfinite(found.likelihood)


@pytest.mark.parametrize(
    ("x", "labels", "classes", "said"),
    [
        (np.zeros((20, 2)), np.zeros(19, int), None, "labels of rows need"),
        (np.zeros(20), np.zeros(20, int), None, "labels of rows need"),
        (np.zeros((20, 2)), np.zeros(20), None, "integer labels"),
        (np.zeros((5, 2)), np.zeros(5, int), None, "5 rows are too few"),
        (np.full((20, 2), np.nan), np.arange(20) % 2, None, "row 0 are not finite"),
        (np.zeros((20, 2)), np.arange(20) % 3, 2, r"\[0, 2\), got 0 to 2"),
        (np.zeros((20, 2)), np.arange(20) - 1, None, "got -1 to"),
        (np.zeros((20, 2)), np.ones(20, int), None, "all rows have label 1"),
        (np.zeros((20, 0)), np.arange(20) % 2, None, "labels of rows need"),
        (np.zeros((20, 2)), np.array(["a", "b"] * 10), None, "labels .* number the classes from 0"),
        (scipy.sparse.eye_array(20).tocsr(), np.arange(20) % 2, None, r"features .* \.toarray"),
        (torch.eye(20).to_sparse(), torch.arange(20) % 2, None, "features must be a dense array"),
        (np.zeros((20, 2), complex), np.arange(20) % 2, None, "features .* complex128"),
        (np.zeros((20, 2)), np.arange(20) % 2, 0, "classes must be >= 2, got 0"),
        (np.zeros((20, 2)), np.arange(20) % 2, 2.0, "classes must be a whole number"),
    ],
)
def test_what_cannot_be_judged_is_refused(x, labels, classes, said):
    with pytest.raises(InputError, match=said):
        turnover.label_errors(x, labels, classes=classes)


def test_features_without_variance_are_judged_by_nothing():
    found = label_errors(np.zeros((40, 3)), np.arange(40) % 2)
    assert np.isfinite(found.suspicion).all() and found.likely == 0


def test_predictions_against_the_labels_are_not_turned_round():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 400)
    against = generator.standard_normal((400, 2)) - np.eye(2)[labels]
    found = label_errors_of(against, labels)
    assert (found.transition.diagonal() >= 0.5 - 1e-6).all()
    assert found.likelihood < np.log(0.5) + 0.01
    assert found.likelihood < label_errors_of(-against, labels).likelihood


@pytest.mark.parametrize("small", [30, 100, 200])
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_wrong_labels_are_told_from_a_small_class(small, share):
    generator = np.random.default_rng(0)
    right = (np.arange(1000) < small).astype(int)
    x = generator.standard_normal((1000, 10))
    x[:, 0] += 2.5 * right
    wrong = np.zeros(1000, dtype=bool)
    wrong[generator.permutation(1000)[: round(1000 * share)]] = True
    found = label_errors(x, np.where(wrong, 1 - right, right))
    if share:
        assert mislabel(found.suspicion, wrong, at=[10]).auc > 0.95
        assert found.expected < 1.2 * wrong.sum()
    else:
        assert found.expected < 10 and found.likely < 5
