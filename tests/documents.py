"""README and guides as data: their blocks of Python, their commands, and the names that they share."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import turnover

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

_BLOCK = re.compile(
    r"(?:<!-- (?P<marker>setup|not run:|file:)(?P<said>.*?)-->\s*)?"
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    flags=re.DOTALL | re.MULTILINE,
)
_ENDS = re.compile(r"\||&&|;|\d?>>?")
"""Where a command's arguments end on a shell's line."""


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: as the fence says, or empty.
        code: what stands in it.
        setup: code that is not shown, from a comment ``<!-- setup ... -->`` above the fence.
        not_run: why it is shown and not run, from a comment ``<!-- not run: reason -->``.
        file: what a reader would save it as, from a comment ``<!-- file: name -->``.
    """

    language: str
    code: str
    setup: str
    not_run: str | None
    file: str | None


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    found = []
    for match in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        said, marker = match["said"], match["marker"]
        code = re.sub(rf"^{match['indent']}", "", match["body"], flags=re.MULTILINE)
        setup = said if marker == "setup" else ""
        not_run = said.strip() if marker == "not run:" else None
        file = said.strip() if marker == "file:" else None
        found.append(Block(match["language"], code, setup, not_run, file))
    return found


def python_of(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("python", "py")]


def shell_lines(page: Path) -> list[str]:
    """Commands of the blocks that a terminal takes, without prompts and continuations."""
    return [line for block in blocks(page) for line in _shell_lines(block)]


def _shell_lines(block: Block) -> list[str]:
    if block.language not in ("", "bash", "console", "sh", "shell"):
        return []
    joined = block.code.replace("\\\n", " ")
    return [line.strip().removeprefix("$ ") for line in joined.splitlines()]


def commands(page: Path, *, to_run: bool = False) -> list[list[str]]:
    """Arguments of every ``turnover`` command in the blocks, or in those that are run."""
    found = []
    for block in blocks(page):
        for line in _shell_lines(block):
            if line.startswith("turnover ") and not (to_run and block.not_run):
                words = shlex.split(line, comments=True)[1:]
                end = next((i for i, word in enumerate(words) if _ENDS.fullmatch(word)), None)
                found.append(words[:end])
    return found


def inline_commands(page: Path) -> list[list[str]]:
    """Arguments of every ``turnover`` command in running text, which may leave out what it needs."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    spans = re.findall(r"`turnover ([a-z][^`]*)`", text)
    return [shlex.split(span.replace("\n", " ")) for span in spans]


def vocabulary() -> dict[str, Any]:
    """What pages call what they do not define: a small classifier trained under masks, and its data."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 20, generator=generator)
    y = (x[:, 0] + 0.5 * torch.randn(96, generator=generator) > 0).long()
    x_test = torch.randn(24, 20, generator=generator)
    y_test = (x_test[:, 0] > 0).long()
    ids = torch.arange(96)
    first, second = (_trained(seed, x, y, ids) for seed in (0, 1))
    names = {
        "torch": torch,
        "turnover": turnover,
        "np": np,
        "criterion": nn.functional.cross_entropy,
        "features": x[:, :1] + torch.randn(96, 64, generator=generator),
        "held_out_batches": [(x_test, y_test)],
        "labels": y.numpy(),
        "model": first.model,
        "net": first,
        "net_seed0": first,
        "net_seed1": second,
        "optimizer": torch.optim.AdamW(first.model.head.parameters(), lr=1e-3),
        "row_ids": ids,
        "source": 3,
        "source_ids": ids % 6,
        "sources": torch.arange(6),
        "targets": [(x_test, y_test)],
        "test_batches": [(x_test, y_test)],
        "train_batches": [(x, y, ids)],
        "train_ids": ids,
    }
    return names | {"x": x, "y": y, "ids": ids, "x_test": x_test, "y_test": y_test}


class _Classifier(nn.Module):
    """A frozen encoder under a wide head: nothing in it leaks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 64), nn.GELU()).requires_grad_(False)
        self.head = turnover.WideHead(64, 512, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.encoder(x))
        return logits


def _trained(seed: int, x: torch.Tensor, y: torch.Tensor, ids: torch.Tensor) -> turnover.Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _Classifier()
    net = turnover.attach(model, "head", turnover.MaskSpec(seed=seed))
    optimizer = torch.optim.AdamW(model.head.parameters(), lr=3e-3)
    for _ in range(30):
        with net.exposed(ids):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    return net
