import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from turnover.influence.topk import Extremes, merged


@given(
    targets=st.integers(1, 4),
    ids=st.integers(1, 60),
    count=st.integers(1, 12),
    block=st.integers(1, 60),
    parts=st.integers(1, 7),
    values=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
)
def test_they_are_the_two_ends_of_the_sorted_scores(
    targets, ids, count, block, parts, values, seed
):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, values, (targets, ids), generator=generator).float()
    results = []
    for columns in torch.arange(ids).tensor_split(min(parts, ids)):
        extremes = Extremes(targets, count)
        for some in scores[:, columns].split(block, dim=1):
            extremes.add(some)
        positions, found = extremes.result()
        results.append((positions + int(columns[0]), found))
    positions, found = merged(results, count)
    order = np.argsort(-scores.numpy(), axis=1, kind="stable")
    ends = order if ids <= 2 * count else np.delete(order, np.s_[count:-count], axis=1)
    assert np.array_equal(positions, ends)
    assert np.array_equal(found, np.take_along_axis(scores.numpy(), ends, axis=1))


HELD = """
import ctypes
import sys
import torch
from turnover.influence.topk import Extremes

def held():
    ctypes.CDLL(None).malloc_trim(0)  # what is free is not held
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) / 2**10

extremes = Extremes(512, 50)
generator = torch.Generator().manual_seed(0)
for block in range(120):
    # A product of matrices, as linear scores are: the memory of each block is its own.
    extremes.add(torch.randn(512, 16, generator=generator) @ torch.randn(16, 8192, generator=generator))
    if block == 20:
        early = held()
print(held() - early)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_held_between_blocks_keeps_none_of_their_memory():
    run = subprocess.run(
        [sys.executable, "-c", HELD],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(__file__).parents[1] / "src"), "OMP_NUM_THREADS": "1"},
    )
    assert float(run.stdout) < 48, "MiB, of which a block has 16"
