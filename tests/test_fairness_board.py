"""The benchmark of fairness: planted labels, actions on rows, the choice of a budget, and its tables."""

import json

import numpy as np
import pytest

pytest.importorskip("sklearn")
from benchmarks import fairness


def test_labels_are_flipped_in_positive_rows_of_one_group():
    table = fairness.made()
    wrong = fairness.flip(table, np.random.default_rng(1))
    assert set(table.y[wrong]) == {1} and set(table.group[wrong]) == {0}
    could = (table.y == 1) & (table.group == 0)
    assert wrong.sum() / could.sum() == pytest.approx(fairness.FLIPPED, abs=0.05)
    rates = [table.y[table.group == group].mean() for group in (0, 1)]
    assert abs(rates[0] - rates[1]) < 0.08


def test_reweighing_makes_group_and_label_independent():
    table = fairness.made()
    table = fairness.Table(table.x, table.y * (table.group | (np.arange(2000) % 2)), table.group)
    weights = fairness.reweighed(table)
    rates = [
        np.average(table.y[table.group == group], weights=weights[table.group == group])
        for group in (0, 1)
    ]
    assert rates[0] == pytest.approx(rates[1]) == pytest.approx(table.y.mean())


def test_actions_take_the_rows_that_widen_the_gap_or_narrow_it():
    table = fairness.made(50)
    scores = np.arange(50.0)
    removed, weights, rows = fairness.changed("remove", table, scores, 0.1)
    assert rows.tolist() == [0, 1, 2, 3, 4] and weights is None and len(removed.y) == 45
    np.testing.assert_array_equal(removed.x, table.x[5:])
    relabeled, _, rows = fairness.changed("relabel", table, scores, 0.1)
    assert (relabeled.y != table.y).nonzero()[0].tolist() == sorted(rows.tolist())
    same, weights, rows = fairness.changed("repeat", table, scores, 0.1)
    assert same is table and set(np.flatnonzero(weights == 2)) == set(range(45, 50)) == set(rows)


def test_a_budget_is_chosen_by_the_gap_among_those_that_keep_the_accuracy():
    def one(accuracy, gap):
        figures = {"accuracy": accuracy, "demographic_parity": gap}
        return {"validation": figures, "test": figures}

    run = {"unchanged": one(0.9, 0.2)}
    run["gram, remove"] = {"0.01": one(0.895, 0.15), "0.02": one(0.88, 0.01), "0.05": one(0.9, 0.1)}
    assert fairness.chosen(run, "gram, remove", "demographic_parity")[0] == "0.05"
    run["gram, remove"] = {"0.01": one(0.5, 0.0)}
    assert fairness.chosen(run, "gram, remove", "demographic_parity")[0] == "0"


def test_committed_figures_are_those_of_the_page():
    found = json.loads(fairness.RESULTS.read_text())["results"]
    assert list(found) == list(fairness.PROBLEMS)
    assert all(len(runs) == fairness.SEEDS for runs in found.values())
    page = fairness.DOCS.read_text()
    for content in fairness.tables(found).values():
        assert content.strip() in page
