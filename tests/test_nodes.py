"""Training on two nodes, each in a network of its own, against one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
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
SECONDS = 240
KINDS = {"loop": (), "accelerate": ("accelerate",), "lightning": ("lightning",)}
KINDS["trainer"] = ("accelerate", "datasets", "transformers")


@pytest.fixture(scope="module")
def networks():
    made = Namespaces("node")
    if not made.made:
        made.close()
        pytest.skip("two networks cannot be made here (only root can)")
    yield made
    made.close()


class Nodes:
    """The same script on both nodes, by torchrun."""

    def __init__(self, networks, *arguments, restarts=0, **environment):
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "nodes"),
            *("--rdzv-endpoint", f"{networks.hosts[0]}:29400", "--max-restarts", str(restarts)),
        ]
        # Both networks have this machine's name, by which torchrun would tell who is the first.
        own = [
            ["--local-addr", host, "--rdzv-conf", f"is_host={int(index == 0)}"]
            for index, host in enumerate(networks.hosts)
        ]
        self.processes = [
            subprocess.Popen(
                [*networks.inside(index), *command, *own[index], *map(str, arguments)],
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "GLOO_SOCKET_IFNAME": networks.links[index],
                    "PYTHONPATH": os.pathsep.join([str(HERE.parent / "src"), str(HERE)]),
                    **environment,
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for index in range(2)
        ]

    def ended(self):
        """Exit codes; what they said is shown where they are not as expected."""
        limit = time.monotonic() + SECONDS
        try:
            said = [p.communicate(timeout=max(1, limit - time.monotonic())) for p in self.processes]
        finally:
            for index in range(2):
                self.kill(index)
        sys.stdout.write("\n=====\n".join(text[-3000:] for text, _ in said))
        return [process.returncode for process in self.processes]

    def kill(self, index):
        """Everything of a node at once."""
        try:
            first = psutil.Process(self.processes[index].pid)
            everything = [first, *first.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in everything:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


def begun(folder):
    """Until both processes are in the middle of the training."""
    limit = time.monotonic() + SECONDS
    while not all((folder / f"at-{rank}").exists() for rank in range(2)):
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes, by kind."""

    def made(kind):
        folder = folders.get(kind)
        if folder is None:
            folder = folders[kind] = tmp_path_factory.mktemp(f"alone-{kind}")
            environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
            path = os.pathsep.join([str(HERE.parent / "src"), str(HERE)])
            subprocess.run(
                [sys.executable, HERE / "nodes.py", kind, folder],
                env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
                check=True,
                timeout=SECONDS,
            )
        return folder

    folders = {}
    return made


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def assert_trained_alike(folder, alone, kind):
    found, expected = (load_file(f / f"{kind}.safetensors") for f in (folder, alone))
    assert found.keys() == expected.keys()
    for name, weights in expected.items():
        torch.testing.assert_close(found[name], weights, atol=1e-5, rtol=0)
    assert read(folder, kind) == read(alone, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_two_nodes_train_what_one_process_trains(networks, alone, tmp_path, kind):
    for package in KINDS[kind]:
        pytest.importorskip(package)
    run = Nodes(networks, HERE / "nodes.py", kind, tmp_path, ACCELERATE_USE_CPU="1")
    assert run.ended() == [0, 0]
    assert_trained_alike(tmp_path, alone(kind), kind)
    parts = [read(tmp_path, f"ids-{rank}") for rank in range(2)]
    whole = read(alone(kind), "ids-0")
    assert len(parts[0]) == len(parts[1]) and sorted(parts[0] + parts[1]) == sorted(whole)


def test_a_checkpoint_of_two_nodes_is_loaded_and_scored_in_one_process(networks, alone, tmp_path):
    run = Nodes(networks, HERE / "nodes.py", "loop", tmp_path)
    assert run.ended() == [0, 0]
    scores = []
    for folder in (tmp_path, alone("loop")):
        model = nodes.processes.build()
        model.load_state_dict(load_file(folder / f"epoch-{nodes.EPOCHS - 1}.safetensors"))
        network = turnover.Network.from_dict(model.eval(), read(folder, "masks"))
        scores.append(torch.tensor(nodes.processes.scores(network, "linear")))
    torch.testing.assert_close(*scores, atol=1e-4, rtol=0)
    assert scores[0].abs().max() > 1e-3


def test_a_node_that_is_killed_and_started_anew_ends_what_was_begun(networks, alone, tmp_path):
    (tmp_path / "wait").touch()
    run = Nodes(networks, HERE / "nodes.py", "loop", tmp_path)
    begun(tmp_path)
    run.kill(1)
    (tmp_path / "wait").unlink()
    assert all(run.ended())
    assert not (tmp_path / "loop.safetensors").exists()
    assert Nodes(networks, HERE / "nodes.py", "loop", tmp_path).ended() == [0, 0]
    assert_trained_alike(tmp_path, alone("loop"), "loop")


def test_a_process_that_is_killed_is_started_anew_by_torchrun(networks, alone, tmp_path):
    (tmp_path / "wait").touch()
    # Without it, torch 2.13 tells the nodes different addresses when it starts them anew.
    share = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    run = Nodes(networks, HERE / "nodes.py", "loop", tmp_path, restarts=1, **share)
    begun(tmp_path)
    os.kill(int((tmp_path / "at-1").read_text()), signal.SIGKILL)
    (tmp_path / "wait").unlink()
    assert run.ended() == [0, 0]
    assert_trained_alike(tmp_path, alone("loop"), "loop")
