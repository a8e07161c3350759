"""Freed memory: kept while a run is trained, and returned after."""

import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from contextlib import nullcontext
from turnover.io.memory import freed_memory_kept

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(12 * 2**20)  # 48 MiB, as the gradient of a wide head
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults()
start = resident()
with freed_memory_kept():
    faults()
    within = faults()
    many = [torch.ones(12 * 2**20) for _ in range(8)]
    del many
print(outside, within, resident() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_kept_within_and_returned_after():
    done = subprocess.run(
        [sys.executable, "-c", STEPS], capture_output=True, text=True, timeout=120, check=True
    )
    outside, within, left = map(float, done.stdout.split())
    assert within < outside / 10
    assert left < 60
