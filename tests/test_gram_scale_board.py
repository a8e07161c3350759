"""The benchmark of gram by landmarks: its judgments by retraining, its rates and its tables."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.fidelity.problems import load
from benchmarks.gram_scale import rate, retrained, table
from benchmarks.gram_scale.networks import Network


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    pytest.importorskip("dattri", reason="make .venv/.bench")
    folder = tmp_path_factory.mktemp("runs")
    problem = replace(load("A"), subsets=20, seeds=1)
    return retrained.judged(Network(problem, folder), folder)


def test_ratios_are_those_of_scores_against_one_truth(judged):
    rows = judged["rows"]
    assert rows["exact gram"]["ratio"] == [1.0, 1.0, 1.0]
    for row in rows.values():
        middle, low, high = row["ratio"]
        assert low <= high
        share = row["class_removed"][0] / rows["exact gram"]["class_removed"][0]
        assert middle == pytest.approx(share, abs=1e-3)
    assert rows["exact cross products, 200"]["ratio"][0] > 0.95
    assert abs(rows["same class"]["ratio"][0]) < 1e-6
    # The same resamples for both: the ratio is far narrower than the scores themselves.
    low, high = rows["landmarks, 200"]["class_removed"][1:]
    assert rows["landmarks, 200"]["ratio"][2] - rows["landmarks, 200"]["ratio"][1] < high - low


def test_peers_store_as_many_bytes_as_landmarks(judged):
    for count in judged["landmarks"]:
        stored = {judged["rows"][f"{way}, {count}"]["stored_bytes"] for way in table.COLUMNS}
        assert stored == {2 * 500 * count * 2**2}


def test_every_cell_is_in_the_table(judged):
    lines = table.retrained({"A": judged}).splitlines()
    rows = [line for line in lines if line.startswith("| A, 500 | ")]
    assert len(rows) == 2 * len(judged["landmarks"])
    assert "failed" not in "".join(rows)
    failed = {"TRAK, 200": {"note": "failed: no memory", "stored_bytes": 0}}
    without = judged | {"rows": judged["rows"] | failed}
    assert table.retrained({"A": without}).count(" failed ") == 2


def test_bounds_go_with_numbers_of_landmarks(judged):
    named = {name: bound for name, _, bound in retrained.beside_bounds(judged)}
    assert named == {
        "exact cross products, 200": 0.93,
        "exact cross products, 125": 0.98,
        "landmarks, 200": 0.85,
        "landmarks, 125": 0.94,
    }


def test_time_is_extrapolated_on_a_line():
    found = rate.extrapolated({1000: 99.0, 2000: 30.0, 4000: 50.0})
    assert found["per_second"] == pytest.approx(100)
    assert found["fit_h"] * 3600 == pytest.approx(50 + 96_000 / 100)
