"""Rows that run through the encoder once: the same predictions and scores as the rows themselves."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'turnover[text]'")
pytest.importorskip("typer")

import transformers

import encoders
from encoders import SHAPE, write_texts
from test_rehearsal import fit
from turnover.data.encoded import batches
from turnover.runs.run import Run
from turnover.tasks.features import Features
from turnover.tasks.score import ScoreConfig, Scoring
from turnover.tasks.training import evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("features")
    model = encoders.folder(transformers.BertConfig(**SHAPE), folder / "model")
    fit(write_texts(folder / "t.csv"), model, folder / "run")
    return Run.load(folder / "run")


def test_scores_by_the_head_are_those_of_the_rows(run: Run) -> None:
    scoring = Scoring(run, ScoreConfig(ghosts=100, sites=("head.*",)))
    assert isinstance(scoring.known, Features)
    rows = range(len(scoring.test))
    assert scoring.known.chunks(rows, 3) == scoring.test.chunks(rows, 3)
    for method in ("linear", "exact"):
        known, plain = (
            scoring.influence(method).estimate(batches(data, rows, 3), scoring.ids)
            for data in (scoring.known, scoring.test)
        )
        scale = np.abs(plain.scores).max()
        np.testing.assert_allclose(known.scores, plain.scores, atol=1e-5 * scale)
        np.testing.assert_allclose(known.noise_floor, plain.noise_floor, rtol=1e-4)
    found = evaluate(run.model, scoring.known, rows, lambda _: run.whole())
    wanted = evaluate(run.model, scoring.test, rows, lambda _: run.whole())
    torch.testing.assert_close(found.loss, wanted.loss)


def test_other_sites_take_the_rows_themselves(run: Run) -> None:
    scoring = Scoring(run, ScoreConfig(ghosts=100, sites=("*",)))
    assert scoring.known is scoring.test


def test_curves_end_with_the_losses_of_the_finished_network(run: Run) -> None:
    metrics = json.loads((run.folder / "metrics.json").read_text())
    curves = metrics["curves"]
    assert curves["steps"] == sorted(set(curves["steps"]))
    for name, points in curves["losses"].items():
        assert len(points) == len(curves["steps"])
        # Fewer rows than a curve has at most: it ends with all of them.
        assert points[-1][0] == pytest.approx(metrics["loss"][name])
    assert metrics["precision"]["curves"] == metrics["precision"]["training"]
