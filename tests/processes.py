"""What each of several processes runs under torchrun: training, scoring and saving, by DDP or FSDP2."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tiny
import turnover

ROWS, BATCH = 48, 8
X, Y, IDS = tiny.features(ROWS), tiny.labels(ROWS), torch.arange(ROWS) * 3 + 1
TARGETS = [(X[:3], Y[:3])]
SPEC = turnover.MaskSpec(seed=2)
SITES = ["encoder.1", "head.activation"]


def build() -> nn.Module:
    model = tiny.FunctionalHead(64).requires_grad_(True)
    return tiny.randomise(model)


def train(network, model, rank=0, world=1):
    """Losses of the global batches, and which units of the head each row had."""
    seen = []
    wide = next(m for m in model.modules() if isinstance(m, turnover.WideHead))
    handle = wide.classify.register_forward_pre_hook(lambda _, given: seen.append(given[0] != 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for start in range(0, ROWS, BATCH):
        rows = torch.arange(start, start + BATCH)[rank::world]
        with network.exposed(IDS[rows]):
            loss = nn.functional.cross_entropy(model(X[rows]), Y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    handle.remove()
    model.eval()
    return torch.stack(losses), torch.cat(seen)


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    for part in (model.encoder, model.head, model):
        fully_shard(part)
    return model


def scores(network, method):
    return turnover.Influence(network, method=method).estimate(TARGETS, IDS).scores.tolist()


def refusal(function):
    try:
        function()
    except turnover.InputError as error:
        return str(error)
    return None


def run(kind: str, order: str, out: Path) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build()
    network = turnover.attach(model, SITES, SPEC) if order == "before" else None
    model = wrapped(model, kind)
    network = network or turnover.attach(model, SITES, SPEC)
    audit = refusal(lambda: network.audit((X, Y)))
    losses, seen = train(network, model, rank, world)
    gathered = [torch.empty_like(losses) for _ in range(world)]
    dist.all_gather(gathered, losses)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    found = {
        "losses": torch.stack(gathered).mean(dim=0).tolist(),
        "masks": network.to_dict(),
        "digest": network.digest(),
        "linear": scores(network, "linear"),
        "exact": scores(network, "exact"),
        "audit": audit,
        "gram": refusal(lambda: turnover.Influence(network, method="gram").fit([(X, Y, IDS)])),
    }
    name = f"{kind}-{order}"
    save_file({"seen": seen.to(torch.uint8)}, out / f"{name}-{rank}.safetensors")
    if rank == 0:
        (out / f"{name}.json").write_text(json.dumps(found))
        save_file(state, out / f"{name}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for kind in ("ddp", "fsdp"):
        for order in ("before", "after"):
            run(kind, order, Path(sys.argv[1]))
    dist.destroy_process_group()
