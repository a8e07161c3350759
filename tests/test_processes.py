"""Training in two real processes, against one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import processes
import turnover

pytest.importorskip("safetensors", reason="needs: pip install 'turnover[evaluation]'")
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch is without gloo"),
]
HERE = Path(__file__).parent


def torchrun(*arguments: object) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    ran = subprocess.run(
        [*command, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torchrun(HERE / "processes.py", folder)
    return folder


@pytest.fixture(scope="module")
def one():
    model = processes.build()
    network = turnover.attach(model, processes.SITES, processes.SPEC)
    losses, seen = processes.train(network, model)
    return network, losses, seen


@pytest.fixture(params=["ddp-before", "ddp-after", "fsdp-before", "fsdp-after", "lightning"])
def name(request):
    if request.param == "lightning":
        pytest.importorskip("lightning", reason="needs: pip install 'turnover[lightning]'")
    return request.param


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_every_row_has_the_masks_that_it_has_in_one_process(two, one, name):
    _, _, seen = one
    for rank in range(2):
        theirs = load_file(two / f"{name}-{rank}.safetensors")["seen"].bool()
        assert torch.equal(theirs, seen[rank::2])
    assert read(two, name)["description"] == one[0].to_dict()


def test_losses_at_equal_global_batches_are_those_of_one_process(two, one, name):
    assert read(two, name)["losses"] == pytest.approx(one[1].tolist(), abs=1e-5)


def test_influence_within_two_processes_is_that_in_one(two, one, name):
    found = read(two, name)
    for method in processes.METHODS:
        np.testing.assert_allclose(found[method], processes.scores(one[0], method), atol=1e-4)


def test_what_two_processes_trained_and_saved_one_loads_and_scores_the_same(two, name):
    found = read(two, name)
    model = processes.build()
    model.load_state_dict(load_file(two / f"{name}.safetensors"))
    network = turnover.Network.from_dict(model.eval(), found["description"])
    assert network.digest() == found["digest"]
    for method in processes.METHODS:
        np.testing.assert_allclose(found[method], processes.scores(network, method), atol=1e-4)


@pytest.mark.parametrize("order", ["before", "after"])
def test_sharded_parameters_are_refused_where_whole_ones_are_needed(two, order):
    plain, sharded = read(two, f"ddp-{order}"), read(two, f"fsdp-{order}")
    assert plain["audit"] is None and plain["gram"] is None
    assert "audit before fully_shard" in sharded["audit"]
    assert "load it in one process" in sharded["gram"]
