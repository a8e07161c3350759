"""What the progress bar says while a run takes its time, captured from the outside."""

import re
import time

import numpy as np
import pytest
import torch
from torch import nn

import tiny
import turnover
from turnover import Batch, Exact, Influence, Rerank


class Slow(nn.Module):
    """Takes its time for each row, forward and backward."""

    def __init__(self, seconds):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 3, bias=False)
        self.seconds = seconds

    def forward(self, x):
        time.sleep(self.seconds)  # by the clock of the test, where it has its own
        return self.last(self.act(self.first(x)))


@pytest.fixture
def clock(monkeypatch):
    """Time that only sleeping takes, so that what else the machine does changes no test."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)


@pytest.fixture
def said(monkeypatch, clock):
    """What bars showed: title, share, when, and the seconds that were said to be left."""
    from tqdm.auto import tqdm

    shown = []
    real = tqdm.update

    def update(self, n=1):
        real(self, n)
        if not self.disable and self.total:
            left = self.postfix[1] if isinstance(self.postfix, list) else None
            shown.append((self.desc, self.n / self.total, time.perf_counter(), left))

    monkeypatch.setattr(tqdm, "format_interval", staticmethod(lambda seconds: f"{seconds:.6f}"))
    monkeypatch.setattr(tqdm, "update", update)
    return shown


def check(said, ended):
    """From a tenth of the way on, what is left is known within a factor of two, give or take a fifth."""
    _, share, start, _ = said[0]
    whole = ended - start
    assert share < 0.35
    assert said[-1][1] >= 0.97
    for _, now, at, left in said:
        if now < 0.1:
            continue
        told, truly = float(left), ended - at
        assert told <= 2 * truly + 0.2 * whole, (now, told, truly)
        assert truly <= 2 * told + 0.2 * whole, (now, told, truly)


def batches(count, rows=2, *, ids=False):
    return [
        Batch(
            tiny.features(rows, 6, seed=i),
            tiny.labels(rows, i),
            torch.arange(rows) + rows * i if ids else None,
        )
        for i in range(count)
    ]


RUNS = {
    "linear": lambda n: Influence(n, ghosts=20, progress=True).estimate(batches(60), range(50)),
    "aggregate": lambda n: Influence(n, ghosts=20, progress=True).aggregate(batches(60), range(50)),
    "exact": lambda n: Influence(n, method=Exact(10), ghosts=20, progress=True).estimate(
        batches(4), range(40)
    ),
    "rerank": lambda n: Influence(n, method=Rerank(5, block=10), ghosts=20, progress=True).estimate(
        batches(16), range(50)
    ),
    "self": lambda n: Influence(n, ghosts=20, progress=True).self_influence(batches(60, ids=True)),
    "self exact": lambda n: Influence(n, method=Exact(10), ghosts=20, progress=True).self_influence(
        batches(8, ids=True)
    ),
    "gram": lambda n: Influence(n.model, method="gram", progress=True).fit(batches(60)),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_bar_counts_what_takes_the_time(run, said):
    # Nothing but the site's own layers, so that the exact method runs the model and makes no product.
    network = turnover.attach(
        tiny.randomise(nn.Sequential(Slow(0.01), nn.Identity())).eval(), "0.act"
    )
    RUNS[run](network)
    ended = time.perf_counter()
    first = said[0][0]
    check([one for one in said if one[0] == first], ended)


def test_a_bar_of_many_pairs_counts_the_pairs(said, monkeypatch):
    from turnover.influence.linear import LinearScorer

    real = LinearScorer.scores

    def slow(self, ids):
        time.sleep(len(ids) * len(self._steps) * 2e-6)
        return real(self, ids)

    monkeypatch.setattr(LinearScorer, "scores", slow)
    network = turnover.attach(tiny.randomise(tiny.mlp()).eval(), "mlp")
    targets = batches(10, 4)
    Influence(network, ghosts=20, progress=True).estimate(targets, torch.arange(2**13))
    check(said, time.perf_counter())


def test_what_was_done_before_is_not_counted_again(said, tmp_path):
    network = turnover.attach(tiny.randomise(nn.Sequential(Slow(0.01))).eval(), "0.act")
    influence = Influence(network, ghosts=20, progress=True)
    for _ in range(2):
        influence.estimate(batches(10), torch.arange(100), out=tmp_path / "scores.zarr")
    assert all(0 <= share <= 1 for _, share, _, _ in said)
    assert np.diff([one[2] for one in said]).min() >= 0


def test_a_bar_is_read_as_targets_with_the_time_left(capsys):
    network = turnover.attach(tiny.randomise(Slow(0.005)).eval(), "act")
    Influence(network, ghosts=20, progress=True).estimate(batches(60), range(50))
    bars = capsys.readouterr().err.split("\r")
    assert re.fullmatch(
        r"influence \(linear\): 100%\|.*\| 120/120 targets \[\d\d:\d\d<00:00\]", bars[-1].strip()
    )
