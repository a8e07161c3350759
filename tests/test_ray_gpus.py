"""Ray tasks on GPUs: what they ask for, and what is sent to them."""

import pytest
import torch
from torch import nn

from turnover import InputError

ray = pytest.importorskip("ray", reason="needs ray: pip install 'turnover[ray]'")

from turnover.influence import ray_blocks  # noqa: E402
from turnover.parallel import ray_objects  # noqa: E402
from turnover.parallel.ray import Settings, places  # noqa: E402


@pytest.fixture(autouse=True)
def nodes(monkeypatch):
    """Three nodes, two of them alive, one with two cards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    found = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 4.0}},
        {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: found)
    yield found
    torch.set_num_threads(threads)


class Remote:
    def options(self, **options):
        return options


class Engine:
    def __init__(self, device):
        self.network = self
        self.model = nn.Linear(2, 2)
        self.model.weight = nn.Parameter(torch.empty(2, 2, device="meta"))
        self.type = device


def on(monkeypatch, *devices):
    engines = [Engine(one) for one in devices]
    by_model = {id(one.model): torch.device(one.type) for one in engines}
    monkeypatch.setattr(ray_blocks, "device_of", lambda model: by_model[id(model)])
    return engines


def test_a_task_takes_its_share_of_a_card_if_networks_are_on_cuda(monkeypatch):
    assert (places(), places(1.0), places(0.5)) == (6, 2, 4)
    taken = ray_blocks.settings_of(on(monkeypatch, "cuda:0", "cuda:1"), 0.5).task(Remote())
    assert (taken["num_cpus"], taken["num_gpus"]) == (2, 0.5)
    taken = ray_blocks.settings_of(on(monkeypatch, "cpu"), 1.0).task(Remote())
    assert (taken["num_cpus"], taken["num_gpus"]) == (2, 0)


def test_a_cluster_without_cards_and_other_devices_are_refused(monkeypatch, nodes):
    del nodes[0]["Resources"]["GPU"]
    with pytest.raises(InputError, match="no node of the Ray cluster has 1 GPUs"):
        ray_blocks.settings_of(on(monkeypatch, "cuda"), 1.0)
    with pytest.raises(InputError, match="these are on cpu and cuda"):
        ray_blocks.settings_of(on(monkeypatch, "cpu", "cuda"), 1.0)
    with pytest.raises(InputError, match="these are on mps"):
        ray_blocks.settings_of(on(monkeypatch, "mps"), 1.0)


def test_tensors_of_a_card_are_put_on_the_card_of_the_task(monkeypatch):
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: moved.append(device) or self)
    raw = torch.arange(6.0).view(torch.uint8).numpy()
    for is_parameter in (True, False):
        array = ray_objects._Array(
            raw, torch.float32, torch.Size([2, 3]), is_parameter, False, True
        )
        made = array.tensor()
        assert isinstance(made, nn.Parameter) == is_parameter
        assert torch.equal(made, torch.arange(6.0).view(2, 3))
    assert moved == ["cuda", "cuda"]
    assert Settings.here(1.0).gpus == 1.0
