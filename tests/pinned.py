"""Masks that were published: they are the same on every device, and never change."""

import torch

SITE = "encoder.fc1"
PINNED_IDS = [0, 1, 2**24, 2**24 + 1, 2**53 + 1, 2**62, -1, -(2**40)]
# Bit i of each number is unit i of the site.
PINNED = [
    ({}, 16, "66a6 a59a a695 6666 656a a5a6 aa6a 9a55"),
    (
        {},
        33,
        "6699a55a 5a9a696a 55666565 96a69a56 1596a9a56 66aa65a6 6999a955 9569a56a",
    ),
    ({"balanced": False}, 16, "61b5 e895 5d73 b877 f3d7 a95b 2dcf e581"),
    (
        {"balanced": False},
        33,
        "175f2bfa2 93526a08 c404dc5b 1ef4ab7c0 9e0b9027 16a9be81e d9ac331d 114b39467",
    ),
    ({"keep": 0.3}, 16, "d475 4064 20a0 b922 4218 99a0 d026 3104"),
    (
        {"keep": 0.3},
        33,
        "6160b935 129370d40 997d9060 14108041 1241b61a0 1880a3806 110038228 d1888440",
    ),
    ({"keep": 0.9, "seed": 7}, 16, "ffff 7ffa 7fbf efef f7fe ffbb 7ef7 ffef"),
    (
        {"keep": 0.9, "seed": 7},
        33,
        "17ffbf7ff 1ffeffdbf 1bfebffff ff6f7fff 1ff7fffff 1dfffff6f 14bfefeef 1df7fdfff",
    ),
]


def as_hex(mask: torch.Tensor) -> list[str]:
    return [f"{sum(1 << i for i, bit in enumerate(row) if bit):x}" for row in mask.tolist()]
