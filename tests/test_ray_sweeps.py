"""Trainings as Ray tasks: the bits of one process, whoever dies on the way."""

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import pytest
import torch
from torch import nn

import tiny
from turnover import InputError, evaluation
from turnover.evaluation import Masked, Recipe, Subsets, draw_subsets, retrain, train
from turnover.parallel.engines import sweeping

pytest.importorskip("ray", reason="needs ray: pip install 'turnover[ray]'")

from test_ray import PATHS, connected

ROWS, CLASSES = 40, 3
RECIPE = Recipe(epochs=3, learning_rate=0.1, batch_size=10)
X, Y = tiny.features(ROWS), tiny.labels(ROWS)


def mlp(seed):
    with torch.random.fork_rng():
        return tiny.randomise(tiny.mlp(12), seed)


def convolution(seed):
    """Of a kind that is trained alone."""
    with torch.random.fork_rng():
        model = nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(16, CLASSES)
        )
        return tiny.randomise(model, seed)


@pytest.fixture(scope="module")
def cluster():
    with connected():
        yield


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """One thread, and few networks at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(evaluation.training, "_MOST_BATCHED", 3)
    yield
    torch.set_num_threads(threads)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.long
@pytest.mark.parametrize("masked", [None, Masked(("1", "3"))], ids=["plain", "masked"])
def test_networks_retrained_by_many_workers_are_those_of_one_process(
    masked, cluster, tmp_path, capsys
):
    keep = draw_subsets(ROWS, 5).keep
    keep[:2, :7] = True  # of other sizes
    run = partial(
        retrain, mlp, X, Y, RECIPE, Subsets(keep), [4, 2], on=X[:6], masked=masked, progress=True
    )
    one = run(cache=tmp_path / "one")
    capsys.readouterr()
    many = run(cache=tmp_path / "many", engine="ray")
    assert "10/10" in capsys.readouterr().err
    assert many.tobytes() == one.tobytes()
    assert files(tmp_path / "many") == files(tmp_path / "one")


@pytest.mark.long
def test_an_ensemble_of_many_workers_is_that_of_one_process(cluster):
    one, many = (
        train(mlp, X, Y, RECIPE, range(7), checkpoints=(0, 2), engine=engine)
        for engine in ("process", "ray")
    )
    for first, second in ((one.states, many.states), (one.checkpoints[2], many.checkpoints[2])):
        assert len(first) == 7
        for a, b in zip(first, second, strict=True):
            assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.long
def test_leaving_out_and_removing_are_judged_alike(cluster):
    scores = tiny.features(2 * ROWS)[:, 0].view(2, ROWS).numpy()
    given = (scores, convolution, X, Y, RECIPE)
    targets = {"on": X[:2], "on_labels": Y[:2]}
    one, many = (
        evaluation.leave_one_out(*given, [3, 5, 8], [1], **targets, engine=engine).effects
        for engine in ("process", "ray")
    )
    assert many.tobytes() == one.tobytes()
    one, many = (
        evaluation.removal_curve(*given, [4], [1], **targets, draws=1, engine=engine).change
        for engine in ("process", "ray")
    )
    assert many.tobytes() == one.tobytes()


class Deadly:
    """Builds networks, and the first times takes its worker with it."""

    def __init__(self, folder, times):
        self.folder, self.times, self.driver = folder, times, os.getpid()

    def __call__(self, seed):
        if os.getpid() != self.driver and len(list(self.folder.iterdir())) < self.times:
            (self.folder / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return convolution(seed)


@pytest.mark.long
def test_a_network_whose_worker_is_killed_is_trained_again(cluster, tmp_path):
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    given = (X, Y, RECIPE, draw_subsets(ROWS, 3), [1, 2])
    one = retrain(convolution, *given, on=X, cache=tmp_path / "one")
    many = retrain(Deadly(deaths, 2), *given, on=X, cache=tmp_path / "many", engine="ray")
    assert len(list(deaths.iterdir())) >= 2
    assert many.tobytes() == one.tobytes()
    assert files(tmp_path / "many") == files(tmp_path / "one")


SCRIPT = """
import sys, time
import torch
import test_ray_sweeps as here

torch.set_num_threads(1)

def slow(seed):
    time.sleep(0.1)
    return here.convolution(seed)

with here.connected():
    here.some(slow, sys.argv[1], "ray")
"""


def some(build, cache, engine):
    given = (X, Y, RECIPE, draw_subsets(ROWS, 8), [1, 2])
    return retrain(build, *given, on=X[:3], cache=cache, engine=engine)


@pytest.mark.long
def test_a_retraining_whose_driver_was_killed_is_gone_on_with(cluster, tmp_path):
    many = tmp_path / "many"
    driver = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(many)], env=os.environ | {"PYTHONPATH": PATHS}
    )
    limit = time.monotonic() + 120
    while len(list(many.glob("*.safetensors"))) < 3:
        assert driver.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    written = {path: path.stat().st_mtime_ns for path in many.glob("*.safetensors")}
    assert len(written) < 16
    found = some(convolution, many, "ray")
    assert found.tobytes() == some(convolution, tmp_path / "one", "process").tobytes()
    finished = {path.name: path.read_bytes() for path in many.glob("*.safetensors")}
    assert finished == files(tmp_path / "one")
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


@pytest.mark.long
def test_no_more_jobs_are_taken_than_workers_will_soon_do(cluster):
    taken, results, waiting = [], {}, []
    jobs = (taken.append(number) or number for number in range(12))
    with sweeping("ray") as sweep:
        for number, result in sweep(lambda x, row: x[row], (X,), jobs):
            results[number] = result
            waiting.append(len(taken) - len(results))
    assert all(torch.equal(results[row], X[row]) for row in range(12))
    assert 2 <= max(waiting) <= 4


@pytest.mark.long
def test_jobs_under_way_are_given_up_with_the_sweep(cluster):
    start = time.monotonic()
    with sweeping("ray") as sweep:
        next(sweep(time.sleep, (), [0, 300, 300]))
    with sweeping("ray") as sweep:
        assert sorted(sweep(lambda job: job, (), [5, 6])) == [(0, 5), (1, 6)]
    assert time.monotonic() - start < 60


@pytest.mark.long
def test_what_is_wrong_in_a_task_is_said_as_in_one_process(cluster, tmp_path):
    keep = draw_subsets(ROWS, 4).keep
    keep[:, 5] = [False, False, True, False]
    x = X.clone()
    x[5] = torch.inf
    said, kept = [], []
    given = (x, Y, RECIPE, Subsets(keep), [1])
    for engine in ("process", "ray"):
        with pytest.raises(InputError, match=r"seed 1\) has a loss of nan in epoch 1") as error:
            retrain(convolution, *given, on=X, cache=tmp_path / engine, engine=engine)
        said.append(str(error.value))
        kept.append(files(tmp_path / engine))
    assert said[0] == said[1]
    # Another worker may have been faster with the last.
    assert all(kept[1][name] == kept[0][name] for name in kept[0].keys() & kept[1].keys())
    assert all(name.endswith(".safetensors") for name in kept[1])


@pytest.mark.long
def test_what_does_not_pickle_is_refused(cluster, tmp_path):
    lock = threading.Lock()

    def build(seed):
        with lock:
            return convolution(seed)

    with pytest.raises(InputError, match=r"builds the networks .* does not pickle: .*lock"):
        train(build, X, Y, RECIPE, [1], engine="ray")


@pytest.mark.long
def test_data_that_are_not_on_the_cpu_are_refused(cluster):
    with (
        pytest.raises(InputError, match="runs on CPUs, and data are on meta"),
        sweeping("ray") as s,
    ):
        next(s(lambda x, job: job, (X.to("meta"),), [1]))


def test_an_unknown_engine_is_refused_before_anything_is_written(tmp_path):
    given = (mlp, X, Y, RECIPE)
    with pytest.raises(InputError, match="unknown engine 'dask'; there are: process, ray"):
        train(*given, [1], engine="dask")
    subsets = draw_subsets(ROWS, 2)
    with pytest.raises(InputError, match="unknown engine 'dask'"):
        retrain(*given, subsets, [1], on=X, cache=tmp_path / "cache", engine="dask")
    assert not list(tmp_path.iterdir())


MISSING = """
import sys
sys.modules["ray"] = None
import tiny, turnover
from turnover.evaluation import Recipe, draw_subsets, retrain
x, y = tiny.features(9), tiny.labels(9)
given = (x, y, Recipe(1, 0.1, 3), draw_subsets(9, 2), [1])
try:
    retrain(None, *given, on=x, cache=sys.argv[1], engine="ray")
except turnover.InputError as error:
    print(error)
"""


def test_without_ray_it_is_said_what_to_install(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MISSING, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": PATHS},
    )
    assert done.stdout.strip() == (
        "engine=\"ray\" needs ray, which is not installed: pip install 'turnover[ray]'"
    ), done.stderr
    assert not (tmp_path / "cache").exists()
