"""One of two processes that train one network on one device: ``DEVICE FOLDER RANK``."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tiny
import turnover
from turnover import MaskSpec

ROWS, BATCH = 64, 16
X, Y, IDS = tiny.features(ROWS), tiny.labels(ROWS), torch.arange(ROWS) * 3 + 1


def build(device):
    model = tiny.randomise(tiny.mlp(64)).to(device)
    return turnover.attach(model, "mlp", MaskSpec()), model


def train(network, model, device, rank=0, world=1):
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    for start in range(0, ROWS, BATCH):
        rows = torch.arange(start, start + BATCH)[rank::world]
        with network.exposed(IDS[rows]):
            loss = nn.functional.cross_entropy(model(X[rows].to(device)), Y[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(device: torch.device, folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    network, model = build(device)
    train(network, DistributedDataParallel(model), device, rank, 2)
    trained = [p.detach().cpu().flatten() for p in model.parameters()]
    torch.save(torch.cat(trained), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(torch.device(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
