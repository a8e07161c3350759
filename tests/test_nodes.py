"""Training on two nodes, each in a network of its own, against one process."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

import nodes
import turnover

pytest.importorskip("safetensors", reason="needs: pip install 'turnover[evaluation]'")
from benchmarks.scale.namespaces import Namespaces
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is without gloo"),
]
HERE = Path(__file__).parent
SCRIPT = HERE / "nodes.py"
PATHS = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE)]),
}
SECONDS, GRACE = 240, 60
KINDS = {"loop": (), "accelerate": ("accelerate",), "lightning": ("lightning",)}
KINDS["trainer"] = ("accelerate", "datasets", "transformers")


@pytest.fixture(scope="module")
def networks():
    made = Namespaces("node")
    if not made.made:
        made.close()
        pytest.skip("two networks cannot be made here (only root can)")
    yield made
    for index in range(2):
        kill(made, index)
    made.close()


class Nodes:
    """The same command on both nodes: by torchrun, or by ``accelerate launch``."""

    def __init__(self, networks, folder, *command, launcher=None, restarts=0, **environment):
        self._networks = networks
        self.logs = [folder / f"log-{index}" for index in range(2)]
        self.processes = []
        for index in range(2):
            launched = (launcher or torchrun)(networks.hosts, index, restarts)
            with self.logs[index].open("w") as log:
                process = subprocess.Popen(
                    [*networks.inside(index), sys.executable, "-m", *launched, *command],
                    env={
                        **os.environ,
                        **PATHS,
                        "GLOO_SOCKET_IFNAME": networks.links[index],
                        "ACCELERATE_USE_CPU": "1",
                        **environment,
                    },
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            self.processes.append(process)

    def ended(self):
        """Exit codes; what they said is shown where they are not as expected."""
        limit = time.monotonic() + SECONDS
        while None in (codes := [process.poll() for process in self.processes]):
            # torchrun waits five minutes for a node that is no more.
            if any(codes):
                limit = min(limit, time.monotonic() + GRACE)
            if time.monotonic() > limit:
                break
            time.sleep(0.05)
        for index, log in enumerate(self.logs):
            self.kill(index)
            sys.stdout.write(f"===== node {index}\n{log.read_text()[-3000:]}\n")
        return [process.wait() for process in self.processes]

    def kill(self, index):
        """Everything of a node at once, as when its power fails."""
        kill(self._networks, index)


def kill(networks, index):
    for process in networks.processes(index):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def torchrun(hosts, index, restarts):
    return [
        *("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--rdzv-backend", "c10d", "--rdzv-id", "nodes", "--rdzv-endpoint", f"{hosts[0]}:29400"),
        *("--max-restarts", str(restarts)),
        # Both networks have this machine's name, by which torchrun would tell who is the first.
        *("--local-addr", hosts[index], "--rdzv-conf", f"is_host={int(index == 0)}"),
    ]


def accelerate_launch(hosts, index, _):
    return [
        *("accelerate.commands.launch", "--multi_gpu", "--num_machines", "2"),
        *("--num_processes", "2", "--machine_rank", str(index), "--main_process_ip", hosts[0]),
        *("--main_process_port", "29400", "--mixed_precision", "no", "--dynamo_backend", "no"),
    ]


LAUNCHERS = {"accelerate": accelerate_launch}


def begun(folder):
    """Until both processes are in the middle of the training."""
    limit = time.monotonic() + SECONDS
    while not all((folder / f"at-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes, of every kind whose packages are there."""
    folder = tmp_path_factory.mktemp("alone")
    kinds = [kind for kind, packages in KINDS.items() if all(map(find_spec, packages))]
    outside = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    subprocess.run(
        [sys.executable, SCRIPT, folder, *kinds],
        env={**outside, **PATHS, "ACCELERATE_USE_CPU": "1"},
        check=True,
        timeout=SECONDS,
    )
    return folder


@pytest.fixture(scope="module")
def together(networks, tmp_path_factory):
    """What two nodes make, by kind."""

    def made(kind):
        if kind not in folders:
            folder = tmp_path_factory.mktemp(kind)
            run = Nodes(networks, folder, SCRIPT, folder, kind, launcher=LAUNCHERS.get(kind))
            assert run.ended() == [0, 0]
            folders[kind] = folder
        return folders[kind]

    folders = {}
    return made


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def seen(folder, kind, rank=0):
    return load_file(folder / f"{kind}-{rank}.safetensors")


def units_of(ids, units):
    """The one set of units that each id ran under."""
    found = {}
    for one, under in zip(ids.tolist(), units.tolist(), strict=True):
        assert found.setdefault(one, under) == under
    return found


def network_of(kind, folder):
    model = nodes.processes.build()
    missing = model.load_state_dict(load_file(folder / f"{kind}.safetensors"), strict=False)
    assert not missing.unexpected_keys
    return turnover.Network.from_dict(model.eval(), read(folder, kind))


def assert_trained_alike(folder, alone, kind):
    found, expected = (load_file(f / f"{kind}.safetensors") for f in (folder, alone))
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, atol=1e-5, rtol=0)
    assert read(folder, kind) == read(alone, kind)


def assert_ran_alike(folder, alone, kind):
    """Each row under the masks of its id on either node, and global batches with the same losses."""
    parts, whole = [seen(folder, kind, rank) for rank in range(2)], seen(alone, kind)
    ids, units = (torch.cat([part[name] for part in parts]) for name in ("ids", "units"))
    assert len(parts[0]["ids"]) == len(parts[1]["ids"])
    assert sorted(ids.tolist()) == sorted(whole["ids"].tolist())
    assert units_of(ids, units) == units_of(whole["ids"], whole["units"])
    losses = torch.stack([part["losses"] for part in parts]).mean(0)
    torch.testing.assert_close(losses, whole["losses"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_two_nodes_train_what_one_process_trains(kind, together, alone):
    for package in KINDS[kind]:
        pytest.importorskip(package)
    two = together(kind)
    assert_ran_alike(two, alone, kind)
    assert_trained_alike(two, alone, kind)


def test_a_row_that_both_nodes_get_is_trained_under_one_mask(together):
    epoch = len(nodes.X) // 2
    parts = [seen(together("loop"), "loop", rank) for rank in range(2)]
    ids, units = (torch.cat([p[name][:epoch] for p in parts]) for name in ("ids", "units"))
    assert len(units_of(ids, units)) == len(ids) - 1


def test_what_two_nodes_save_one_process_loads_and_scores_the_same(together, alone):
    two, one = (network_of("loop", folder) for folder in (together("loop"), alone))
    assert two.digest() == (together("loop") / "loop.digest").read_text()
    assert two.fingerprint() == one.fingerprint()
    for method in nodes.processes.METHODS:
        scores, expected = (nodes.processes.scores(network, method) for network in (two, one))
        np.testing.assert_allclose(scores, expected, atol=1e-4)
        assert np.abs(expected).max() > 1e-3


def test_a_node_that_is_killed_and_started_anew_ends_what_was_begun(networks, alone, tmp_path):
    (tmp_path / "wait").touch()
    run = Nodes(networks, tmp_path, SCRIPT, tmp_path, "loop")
    begun(tmp_path)
    run.kill(1)
    (tmp_path / "wait").unlink()
    assert all(run.ended())
    assert not (tmp_path / "loop.safetensors").exists()
    assert Nodes(networks, tmp_path, SCRIPT, tmp_path, "loop").ended() == [0, 0]
    assert_trained_alike(tmp_path, alone, "loop")


def test_a_process_that_is_killed_is_started_anew_by_torchrun(networks, alone, tmp_path):
    (tmp_path / "wait").touch()
    # Without it, torch 2.13 tells the nodes different addresses when it starts them anew.
    share = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = Nodes(networks, tmp_path, SCRIPT, tmp_path, "loop", restarts=1, **share)
    begun(tmp_path)
    os.kill(int((tmp_path / "at-1").read_text()), signal.SIGKILL)
    (tmp_path / "wait").unlink()
    assert run.ended() == [0, 0]
    assert_trained_alike(tmp_path, alone, "loop")


def test_the_example_says_on_two_nodes_what_it_says_alone(networks, tmp_path):
    pytest.importorskip("sklearn")
    script = HERE.parent / "examples" / "several_nodes.py"
    alone = subprocess.run(
        [sys.executable, script],
        env={**os.environ, **PATHS},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    run = Nodes(networks, tmp_path, script)
    assert run.ended() == [0, 0]
    assert "helped most by rows" in alone.stdout
    assert [alone.stdout in log.read_text() for log in run.logs] == [True, False]
