"""What each of several processes runs under torchrun: training, scoring, saving; by DDP, FSDP2, Lightning."""

import json
import sys
from importlib.util import find_spec
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
METHODS = ("linear", "exact", "masks")
SITES = ["encoder.1", "head.activation"]


def build() -> nn.Module:
    model = tiny.FunctionalHead(64).requires_grad_(True)
    return tiny.randomise(model)


def watch(model):
    """A list that gets which units of the head each row has, and what ends that."""
    seen = []
    wide = next(m for m in model.modules() if isinstance(m, turnover.WideHead))
    hook = wide.classify.register_forward_pre_hook(lambda _, given: seen.append(given[0] != 0))
    return seen, hook.remove


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)


def train(network, model, rank=0, world=1):
    """Losses of the batches, and which units of the head each row had."""
    seen, end = watch(model)
    optimizer = optimizer_of(model)
    losses = []
    for start in range(0, ROWS, BATCH):
        rows = torch.arange(start, start + BATCH)[rank::world]
        with network.exposed(IDS[rows]):
            loss = nn.functional.cross_entropy(model(X[rows]), Y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    end()
    model.eval()
    return torch.stack(losses), torch.cat(seen)


def train_by_lightning():
    """The same by Lightning's trainer: network, losses and units."""
    import lightning
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    from turnover.integrations.lightning import TurnoverCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            model = build()
            self.encoder, self.head, self.losses = model.encoder, model.head, []

        def forward(self, inputs):
            return self.head(self.encoder(inputs))

        def training_step(self, batch, _):
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self):
            return optimizer_of(self)

    data = turnover.WithIds(TensorDataset(X, Y), IDS)
    module, callback = Module(), TurnoverCallback(SITES, SPEC)
    seen, end = watch(module)
    settings = {"accelerator": "cpu", "strategy": "ddp", "devices": 2, "barebones": True}
    # Its own sampler would shuffle.
    settings["use_distributed_sampler"] = False
    trainer = lightning.Trainer(max_epochs=1, callbacks=callback, **settings)
    trainer.fit(
        module, DataLoader(data, BATCH // 2, sampler=DistributedSampler(data, shuffle=False))
    )
    end()
    module.eval()
    return callback.network, torch.stack(module.losses), torch.cat(seen)


def wrapped(model: nn.Module, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    for part in (model.encoder, model.head, model):
        fully_shard(part)
    return model


def scores(network, method):
    if method == "masks":
        influence = turnover.Influence(network, method=turnover.Gram(features="masks"))
        return influence.fit([(X, Y, IDS)]).estimate(TARGETS).scores.tolist()
    return turnover.Influence(network, method=method).estimate(TARGETS, IDS).scores.tolist()


def refusal(function):
    try:
        function()
    except turnover.InputError as error:
        return str(error)
    return None


def run(kind: str, order: str, out: Path) -> None:
    model = build()
    network = turnover.attach(model, SITES, SPEC) if order == "before" else None
    model = wrapped(model, kind)
    network = network or turnover.attach(model, SITES, SPEC)
    audit = refusal(lambda: network.audit((X, Y)))
    losses, seen = train(network, model, dist.get_rank(), dist.get_world_size())
    gram = refusal(lambda: turnover.Influence(network, method="gram").fit([(X, Y, IDS)]))
    save(network, losses, seen, out / f"{kind}-{order}", audit=audit, gram=gram)


def save(network, losses, seen, out: Path, **refused: str | None) -> None:
    gathered = [torch.empty_like(losses) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, losses)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(network.model, options=options)
    found = {
        "losses": torch.stack(gathered).mean(dim=0).tolist(),
        "description": network.to_dict(),
        "digest": network.digest(),
        **{method: scores(network, method) for method in METHODS},
        **refused,
    }
    rank = dist.get_rank()
    save_file({"seen": seen.to(torch.uint8)}, f"{out}-{rank}.safetensors")
    if rank == 0:
        Path(f"{out}.json").write_text(json.dumps(found))
        save_file(state, f"{out}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
    for kind in ("ddp", "fsdp"):
        for order in ("before", "after"):
            run(kind, order, folder)
    if find_spec("lightning"):
        save(*train_by_lightning(), folder / "lightning")
    dist.destroy_process_group()
