"""The same work over and over in one process, and what is left of it: run by tests/test_soak.py.

``python soak.py WHAT FOLDER ROUNDS`` prints a JSON list of what the process held, now and then.
"""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import nn

import turnover
from viewing import serving

SAMPLES = 40
Round = Callable[[int], None]


@contextmanager
def estimating(folder: Path) -> Iterator[tuple[Round, nn.Module]]:
    """Training steps, masks put on and taken off, estimates in memory and to a store, results opened."""
    torch.manual_seed(0)
    inputs, labels, ids = torch.randn(64, 20), torch.randint(0, 2, (64,)), torch.arange(64)
    model = nn.Sequential(nn.Linear(20, 32), nn.GELU(), turnover.WideHead(32, 256, 2))
    other = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 2))
    net = turnover.attach(model, ["mlp", "head"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    methods = ("linear", "exact", "rerank", "gram")

    def one(number: int) -> None:
        model.train()
        with net.exposed(ids):
            loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.eval()
        again = turnover.attach(other, ["1"])
        with again.hidden(ids):
            other(inputs)
        again.detach()
        targets = [(inputs[:4], labels[:4])]
        method = methods[number % len(methods)]
        influence = turnover.Influence(net, turnover.objectives.margin, method)
        if method == "gram":
            influence = influence.fit([(inputs, labels, ids)])
        assert influence.estimate(targets, ids).scores.shape == (4, 64)
        if method == "linear":
            influence.self_influence([(inputs, labels, ids)])
            place = folder / f"{number}.zarr"
            influence.estimate(targets, ids, out=place)
            assert turnover.open_result(place).load(slice(0, 2)).q.shape == (2, 64)
            shutil.rmtree(place)

    yield one, nn.ModuleList([model, other])
    net.detach()


@contextmanager
def viewing(folder: Path) -> Iterator[tuple[Round, nn.Module]]:
    """Requests of every kind to the view of a run, and the run opened again."""
    from turnover.runs.run import Run

    kept = Run.load(folder)
    with serving(folder) as server:
        errors = server.get("about")["errors"]

        def one(number: int) -> None:
            assert server.ask(f"/{server.token}/").status == 200
            server.get(f"errors?words=fun&start={number % 3}")
            server.get(f"errors/{number % errors}?top=20&by={('turnover', 'gram')[number % 2]}")
            server.get("train?sort=harmful")
            server.get(f"train/{number % 48}?top=20")
            assert server.ask(f"/{server.token}/errors/1000").status == 400
            assert server.ask("/wrong/about").status == 403
            for decision in ("remove", None):
                assert server.decide(number % 48, decision).status == 200
            kept.open_result("errors").load([0])

        yield one, kept.model


@contextmanager
def leaking(_: Path) -> Iterator[tuple[Round, nn.Module]]:
    """What must be noticed: 64 KiB, an open file, a thread, a hook and a temporary file in every round."""
    held: list[object] = []
    model = nn.Linear(2, 2)
    never = threading.Event()

    def one(_: int) -> None:
        held.append(bytearray(2**16))
        held.append(open(tempfile.mkstemp()[0], "rb"))  # noqa: PTH123, SIM115
        threading.Thread(target=never.wait, daemon=True).start()
        model.register_forward_hook(lambda *_: None)

    yield one, model


def held(model: nn.Module, folder: Path) -> dict[str, int]:
    """What the process holds, after all that can be given back was."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "memory": process.memory_info().rss,
        "descriptors": process.num_fds(),
        "threads": process.num_threads(),
        "hooks": sum(len(getattr(one, kind)) for one in model.modules() for kind in kinds),
        "files": sum(len(list(Path(one).rglob("*"))) for one in (folder, tempfile.gettempdir())),
    }


def main() -> None:
    what, folder, rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    every = max(1, rounds // SAMPLES)
    samples = []
    with {"estimating": estimating, "viewing": viewing, "leaking": leaking}[what](folder) as (
        one,
        model,
    ):
        for number in range(rounds):
            one(number)
            if number % every == every - 1:
                samples.append(held(model, folder))
    json.dump(samples, sys.stdout)


if __name__ == "__main__":
    main()
