"""Two nodes, each with a network of its own where root may make one."""

import shutil
import time

import pytest

pytest.importorskip("ray", reason="needs ray: pip install 'turnover[ray]'")

from benchmarks.memory import peak_gib
from benchmarks.scale.cluster import Cluster
from benchmarks.scale.run import Driver, same, wait_for

EXACT = {"method": "exact", "ids": 3072, "targets": 48}
TOP = {"method": "linear", "ids": 20_000, "targets": 40, "top": 5}


@pytest.fixture(scope="module")
def cluster():
    with Cluster() as cluster:
        cluster.join()
        yield cluster


@pytest.fixture
def driver(cluster, tmp_path):
    driver = Driver(cluster, tmp_path)
    yield driver
    driver.close()


@pytest.mark.long
def test_two_nodes_write_what_one_process_does_though_one_is_killed(cluster, driver, tmp_path):
    for asked in (EXACT, TOP):
        driver.estimate(asked, "one", engine="process")
        driver.estimate(asked, "many")
        assert same(tmp_path / "many", tmp_path / "one")
        shutil.rmtree(tmp_path / "many")
    assert all(node.workers() for node in (cluster.head, cluster.other))
    driver.estimate(EXACT, "one", engine="process")
    chunks = len(list((tmp_path / "one").glob("score/c/*/*")))
    out = driver.begin(EXACT, "many")
    while (written := len(list(out.glob("score/c/*/*")))) < chunks // 3:
        time.sleep(0.01)
    cluster.other.kill()
    driver.end()
    assert 0 < written < chunks
    assert same(out, tmp_path / "one")
    wait_for(cluster, 1)


@pytest.mark.long
def test_memory_of_a_worker_does_not_grow_with_ids_and_targets(cluster, tmp_path):
    peaks = []
    for ids, targets in ((140_000, 1024), (420_000, 2048)):
        driver = Driver(cluster, tmp_path)
        driver.estimate({**TOP, "ids": ids, "targets": targets, "units": 8}, "r")
        workers = [w for node in (cluster.head, cluster.other) for w in node.workers()]
        peaks.append(max(peak_gib(worker.pid) for worker in workers))
        driver.close()
    assert peaks[1] < 1.1 * peaks[0]


GRAM = """
import os, sys, time
import ray
import torch
import test_gram_ray as here
from turnover.influence.gram import kernel, stored

torch.set_num_threads(1)
stored._CHUNK = 2**11
for name, value in here.SMALL.items():
    setattr(kernel, name, value)
address, place, engine = sys.argv[1:]
if engine == "ray":
    ray.init(address, include_dashboard=False, configure_logging=False, log_to_driver=False)

class Slow:
    __name__ = "margin"
    def __call__(self, outputs, batch):
        time.sleep(0.03 if engine == "ray" else 0)
        return here.objectives.margin(outputs, batch)

influence = here.Influence(here.models(), Slow(), here.Gram(landmarks=30))
influence.fit(here.batches(), out=place, engine=engine)
found = influence.estimate([here.targets()], top=4, engine=engine)
with open(f"{place}.scores", "wb") as file:
    file.write(found.scores.tobytes() + found.train_ids.tobytes())
"""


@pytest.mark.long
def test_two_nodes_fit_gram_as_one_process_does_though_one_is_killed(tmp_path):
    with Cluster() as cluster:
        cluster.join()

        def begin(engine):
            place = tmp_path / engine
            return cluster.driver("-c", GRAM, cluster.address, str(place), engine)

        assert begin("process").wait(120) == 0
        driver = begin("ray")
        rows, limit = tmp_path / "ray" / "progress" / "rows", time.monotonic() + 120
        while not (rows.exists() and int(rows.read_text())):
            assert driver.poll() is None and time.monotonic() < limit
            time.sleep(0.01)
        assert all(node.workers() for node in (cluster.head, cluster.other))
        cluster.other.kill()
        assert int(rows.read_text()) < 300
        assert driver.wait(240) == 0
        assert same(tmp_path / "ray", tmp_path / "process")
        one, many = ((tmp_path / f"{name}.scores").read_bytes() for name in ("process", "ray"))
        assert many == one
