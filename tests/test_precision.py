"""Predictions, losses and scores are of one precision, whatever training computes in."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from test_cli import data, encoder, run  # noqa: F401 - fixtures
from turnover import Influence, objectives
from turnover.data.encoded import batches
from turnover.runs.run import Run
from turnover.tasks import training
from turnover.tasks.linear_probe import frozen
from turnover.tasks.predict import predict_rows
from turnover.tasks.training import evaluate, under_masks


@pytest.mark.parametrize("caller", [nullcontext(), torch.autocast("cpu", torch.bfloat16)])
def test_losses_are_those_that_influence_flips(
    run: Path,  # noqa: F811
    caller: torch.autocast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hidden minus exposed loss, as ``evaluate`` has them, is the exact self-influence."""
    monkeypatch.setattr(training, "native_bfloat16", lambda _: True)
    loaded = Run.load(run)
    rows = loaded.encode(loaded.train)
    with caller:
        exposed, hidden = (
            evaluate(
                loaded.model, rows, range(12), under_masks(loaded.network, rows, None, hidden=h)
            ).loss
            for h in (False, True)
        )
    exact = Influence(loaded.network, objectives.cross_entropy, "exact", ghosts=20)
    scores = exact.estimate(batches(rows, range(12)), rows.ids[:12]).scores
    order = [row for chunk in rows.chunks(range(12)) for row in chunk]
    own = np.empty(12)
    for place, row in enumerate(order):
        own[row] = scores[place, row]
    np.testing.assert_allclose((hidden - exposed).numpy(), own, atol=2e-6, rtol=1e-4)


def test_predictions_and_features_are_float32_under_a_callers_autocast(
    run: Path,  # noqa: F811
) -> None:
    loaded = Run.load(run)
    plain = predict_rows(loaded, loaded.test), frozen(loaded, loaded.test).features
    with torch.autocast("cpu", torch.bfloat16):
        again = predict_rows(loaded, loaded.test), frozen(loaded, loaded.test).features
    np.testing.assert_array_equal(plain[0], again[0])
    assert torch.equal(plain[1], again[1])


def test_a_training_resumes_though_a_parameter_was_never_reached(tmp_path: Path) -> None:
    """A pooler has LoRA components too where all linear layers have, and no row reaches it."""
    from torch import nn

    import turnover
    from turnover.data.text import Tokens
    from turnover.tasks.training import TrainingConfig, train

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(9, 6).requires_grad_(False)
            self.head, self.pooler = turnover.WideHead(6, 16, 2), nn.Linear(6, 6)

        def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(input_ids).mean(dim=1))

    class Killed(Exception):
        pass

    def follow(epoch: int) -> None:
        if epoch == 2 and name == "killed":
            raise Killed

    rows = Tokens([[i % 9, 1] for i in range(12)], [i % 2 for i in range(12)], torch.arange(12), 0)
    found = {}
    for name in ("whole", "killed", "resumed"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Model()
            checkpoint = tmp_path / name.replace("resumed", "killed")
            exposed = turnover.attach(model, "head").exposed
            config = TrainingConfig(3, 4)
            try:
                train(
                    model,
                    rows,
                    config,
                    exposed,
                    name="it",
                    checkpoint=checkpoint,
                    identity="",
                    follow=follow,
                )
            except Killed:
                continue
        found[name] = model.state_dict()
    assert all(torch.equal(value, found["resumed"][key]) for key, value in found["whole"].items())
