"""Blocks as Ray tasks: the bits of one process, whoever dies on the way."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

import tiny
import turnover
from test_stored_objective import older
from turnover import Batch, Influence, InputError, objectives
from turnover.influence import blockwise, protocol
from turnover.results.reader import open_result

ray = pytest.importorskip("ray", reason="needs ray: pip install 'turnover[ray]'")

IDS = torch.arange(2500) * 13
HERE = Path(__file__).parent


def networks(count):
    made = [tiny.randomise(tiny.mlp(12), seed).eval() for seed in range(count)]
    return [
        turnover.attach(one, "mlp", turnover.MaskSpec(seed=seed)) for seed, one in enumerate(made)
    ]


def batches():
    return [
        Batch(
            tiny.features(rows, seed=seed), tiny.labels(rows, seed), torch.arange(rows) + 50 * seed
        )
        for seed, rows in enumerate((30, 50, 1, 19))
    ]


def influence(method="linear", objective=objectives.margin, count=1):
    method = tiny.method(method, candidates=5)
    return Influence(networks(count), objective, method, ghosts=50)


def tree(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


PATHS = os.pathsep.join([str(HERE), str(HERE.parent / "src")])
CLUSTER = {
    "num_cpus": 2,
    "object_store_memory": 100 * 2**20,
    "include_dashboard": False,
    "log_to_driver": False,
}


@contextmanager
def connected():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", PATHS)  # of the workers
        ray.init(**CLUSTER)
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def cluster():
    with connected():
        yield


def canceled(*_, **__):
    raise AssertionError("canceled while it ends, a task aborts the process that sent it")


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """One thread, and several blocks of targets and of ids by every method."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(protocol, "_MOST_TARGETS", 32)
    monkeypatch.setattr(protocol, "_SCORE_BYTES", 2**17)
    monkeypatch.setattr(blockwise, "_SCANNED", 1)
    monkeypatch.setattr(ray, "cancel", canceled)
    yield
    torch.set_num_threads(threads)


@pytest.mark.long
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("top", [None, 4])
@pytest.mark.parametrize("method", ["linear", "exact", "rerank"])
def test_the_store_of_many_workers_is_that_of_one_process(method, top, count, cluster, tmp_path):
    make = influence(method, count=count)
    make.estimate(batches(), IDS, top=top, out=tmp_path / "one")
    make.estimate(batches(), IDS, top=top, out=tmp_path / "many", engine="ray")
    assert tree(tmp_path / "many") == tree(tmp_path / "one")
    assert len(list((tmp_path / "many" / "score" / "c").rglob("*"))) > 4


class Deadly:
    """The margin, which takes its process with it where it first comes upon some target."""

    __name__ = "margin"

    def __init__(self, folder, times):
        self.folder, self.times = folder, times

    def __call__(self, outputs, batch):
        done = len(list(self.folder.iterdir()))
        if done < self.times and torch.isclose(batch.inputs[0], tiny.features(50, seed=1)[9]).all():
            (self.folder / str(done)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return objectives.margin(outputs, batch)


@pytest.mark.long
def test_a_block_whose_worker_is_killed_is_computed_again(cluster, tmp_path):
    (tmp_path / "deaths").mkdir()
    influence("exact").estimate(batches(), IDS, out=tmp_path / "one")
    deadly = influence("exact", Deadly(tmp_path / "deaths", times=2))
    deadly.estimate(batches(), IDS, out=tmp_path / "many", engine="ray")
    assert len(list((tmp_path / "deaths").iterdir())) == 2
    one, many = (open_result(tmp_path / name).load() for name in ("one", "many"))
    tiny.assert_same(many, one)


@pytest.mark.long
def test_what_is_wrong_in_a_task_is_said_as_in_one_process(cluster, tmp_path):
    wrong = [Batch(torch.full((2, 6), float("nan")), tiny.labels(2))]
    for engine in ("process", "ray"):
        with pytest.raises(InputError, match=r"NaN or infinite for rows \[0, 1\]"):
            influence().estimate(wrong, IDS, out=tmp_path / engine, engine=engine)


@pytest.mark.long
def test_errors_again_and_again_while_tasks_end_leave_the_process_alive(cluster, tmp_path):
    for number in range(10):
        with pytest.raises(ZeroDivisionError):
            influence().estimate(
                (batch if index < 3 else 1 / 0 for index, batch in enumerate(batches())),
                IDS,
                out=tmp_path / str(number),
                engine="ray",
            )
    influence().estimate(batches(), IDS, out=tmp_path / "0", engine="ray")
    influence().estimate(batches(), IDS, out=tmp_path / "one")
    assert tree(tmp_path / "0") == tree(tmp_path / "one")


@pytest.mark.long
def test_a_damaged_block_is_named_when_going_on(cluster, tmp_path):
    with pytest.raises(ZeroDivisionError):
        influence().estimate(
            (batch if index < 3 else 1 / 0 for index, batch in enumerate(batches())),
            IDS,
            out=tmp_path / "r",
        )
    (tmp_path / "r" / "score" / "c" / "0" / "1").write_bytes(b"")
    with pytest.raises(InputError, match=r"score/c/0/1 is damaged .* delete that file and run"):
        influence().estimate(batches(), IDS, out=tmp_path / "r", engine="ray")


def scaled(factor):
    def cost(outputs, batch):
        return factor * objectives.margin(outputs, batch)

    return cost


@pytest.mark.long
@pytest.mark.parametrize("finished", [False, True])
def test_tasks_do_not_go_on_with_scores_by_another_objective_of_the_name(
    finished, cluster, tmp_path
):
    def given(whole):
        return (b if whole or i < 3 else 1 / 0 for i, b in enumerate(batches()))

    make = influence("linear", scaled(1.0))
    with suppress(ZeroDivisionError):
        make.estimate(given(finished), IDS, out=tmp_path / "r")
    for engine in ("process", "ray"):
        with pytest.raises(InputError, match="another objective, which has the name 'cost'"):
            influence("linear", scaled(2.0)).estimate(
                batches(), IDS, out=tmp_path / "r", engine=engine
            )
    make.estimate(batches(), IDS, out=tmp_path / "r", engine="ray")
    make.estimate(batches(), IDS, out=tmp_path / "one")
    assert tree(tmp_path / "r") == tree(tmp_path / "one")


@pytest.mark.long
def test_tasks_go_on_with_what_an_older_version_began(cluster, tmp_path):
    make = influence("linear", scaled(1.0))
    with pytest.raises(ZeroDivisionError):
        make.estimate(
            (batch if index < 3 else 1 / 0 for index, batch in enumerate(batches())),
            IDS,
            out=tmp_path / "r",
        )
    older(tmp_path / "r")
    with pytest.warns(UserWarning, match="older version"):
        found = make.estimate(batches(), IDS, out=tmp_path / "r", engine="ray").load()
    tiny.assert_same(found, make.estimate(batches(), IDS))


SCRIPT = """
import sys, time
import torch
import test_ray
from turnover.influence import protocol

torch.set_num_threads(1)
protocol._MOST_TARGETS, protocol._SCORE_BYTES = 32, 2**17

class Slow:
    __name__ = "margin"
    def __call__(self, outputs, batch):
        time.sleep(0.01)
        return test_ray.objectives.margin(outputs, batch)

with test_ray.connected():
    make = test_ray.influence("exact", Slow())
    make.estimate(test_ray.batches(), test_ray.IDS, out=sys.argv[1], engine="ray")
"""


@pytest.mark.long
def test_a_result_whose_driver_was_killed_is_gone_on_with(cluster, tmp_path):
    influence("exact").estimate(batches(), IDS, out=tmp_path / "one")
    many = tmp_path / "many"
    driver = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(many)], env=os.environ | {"PYTHONPATH": PATHS}
    )
    limit = time.monotonic() + 120
    while len(list(many.glob("score/c/*/*"))) < 3:
        assert driver.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    written = {path: path.stat().st_mtime_ns for path in many.glob("score/c/*/*")}
    assert len(written) < len(list((tmp_path / "one").glob("score/c/*/*")))
    influence("exact").estimate(batches(), IDS, out=many, engine="ray")
    assert tree(many) == tree(tmp_path / "one")
    assert sum(path.stat().st_mtime_ns == time for path, time in written.items()) >= 3


@pytest.mark.long
@pytest.mark.parametrize("first", ["ray", "process"])
def test_of_two_drivers_on_one_result_the_second_is_refused(first, cluster, tmp_path):
    influence("exact").estimate(batches(), IDS, out=tmp_path / "one")
    many = tmp_path / "many"
    script = SCRIPT.replace('engine="ray"', f'engine="{first}"')
    driver = subprocess.Popen(
        [sys.executable, "-c", script, str(many)], env=os.environ | {"PYTHONPATH": PATHS}
    )
    limit = time.monotonic() + 120
    while not list(many.glob("score/c/*/*")):
        assert driver.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    for engine in ("ray", "process"):
        with pytest.raises(InputError, match="is being written by another process; wait for it"):
            influence("exact").estimate(batches(), IDS, out=many, engine=engine)
    assert driver.wait(120) == 0
    assert tree(many) == tree(tmp_path / "one")


def test_what_ray_cannot_do_is_refused_before_anything_is_written(tmp_path):
    make = influence()
    with pytest.raises(InputError, match="unknown engine 'dask'; there are: process, ray"):
        make.estimate(batches(), IDS, out=tmp_path / "r", engine="dask")
    with pytest.raises(InputError, match="give out="):
        make.estimate(batches(), IDS, engine="ray")
    with pytest.raises(InputError, match="in the memory of this process"):
        make.estimate(batches(), IDS, out="memory://r", engine="ray")
    assert not list(tmp_path.iterdir())


MISSING = """
import sys
sys.modules["ray"] = None
import tiny, turnover
network = turnover.attach(tiny.mlp(), "mlp")
targets = [(tiny.features(3), tiny.labels(3))]
try:
    turnover.Influence(network).estimate(targets, [1, 2], out=sys.argv[1], engine="ray")
except turnover.InputError as error:
    print(error)
"""


def test_without_ray_it_is_said_what_to_install(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", MISSING, str(tmp_path / "r")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": PATHS},
    )
    assert done.stdout.strip() == (
        "engine=\"ray\" needs ray, which is not installed: pip install 'turnover[ray]'"
    )
    assert not (tmp_path / "r").exists()
