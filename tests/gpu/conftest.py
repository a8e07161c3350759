"""Checks on a GPU, which skip without one.

``TURNOVER_GPU_TESTS=cpu`` runs on the CPU what can run there. Nothing but torch, numpy, tqdm and pytest is
needed; checks that need more skip where it is missing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the hub client is imported
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch

ON_CPU = os.environ.get("TURNOVER_GPU_TESTS") == "cpu"


def pytest_report_header() -> str:
    if ON_CPU or not torch.cuda.is_available():
        return f"device: {'the CPU, in place of a GPU' if ON_CPU else 'no GPU'}; torch {torch.__version__}"
    return f"device: {torch.cuda.get_device_name()}; torch {torch.__version__}, CUDA {torch.version.cuda}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    if ON_CPU:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def card(device: torch.device) -> torch.device:
    """The device, for what no CPU can stand in for."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """Products and convolutions without TF32, as results are compared with the CPU's."""
    settings = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [one.allow_tf32 for one in settings]
    for one in settings:
        one.allow_tf32 = False
    torch.manual_seed(0)
    yield
    for one, value in zip(settings, before, strict=True):
        one.allow_tf32 = value
